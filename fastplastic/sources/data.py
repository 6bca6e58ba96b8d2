"""Batches of images and labels for a model: the shipped sample, noise, folders, timm's datasets.

Images are resized and normalised as the model's own timm data configuration says. The same seed
gives the same batches, as often as they are asked for, and the global RNG is not touched.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import count, islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, IterableDataset

from fastplastic.errors import FileError, InputError
from fastplastic.sources.datasets import class_names_of, image_set_of, open_dataset
from fastplastic.sources.hub import reason
from fastplastic.sources.images import (
    ChosenImages,
    ImageSet,
    Item,
    Sample,
    Unreadable,
    balanced,
    checked,
    collate,
    collate_readable,
)
from fastplastic.sources.shape import InputShape
from fastplastic.sources.share import WHOLE, Share

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class DataSource:
    """Batches that can be iterated over any number of times, each time the same.

    Iterating yields (images, labels): float32 [batch, channels, height, width], normalised, and
    int64 [batch] in 0 .. num_classes - 1, both on the CPU. The last batch may be smaller, and those
    with images that cannot be read. Of texts it yields mappings of the model's arguments.

    Attributes:
        name: The data as they were asked for.
        num_classes: Number of classes.
        class_names: Their names in the order of the labels, or None where unknown.
        samples: Number of images or texts that one iteration yields (at most, for a stream).
        batch_size: Of them in a batch.
        make: Starts one iteration over the batches of a share, by default over all.
        labelled: Whether there is anything to compute a loss from.
        head: What is to be said of a head that the loss brings along, or "".
        loss_fn: (output, targets) -> loss.
        detail: What the data are, in words; by default the number of classes.
        warnings: What a user must know of the images.
        left_out: {name: reason} of the images that could not be read, so far.
        share: The batches that are read; all the rest is of the whole data.
    """

    name: str
    num_classes: int
    class_names: tuple[str, ...] | None
    samples: int
    batch_size: int
    make: Callable[..., Iterator[Batch]]
    labelled: bool = True
    head: str = ""
    loss_fn: Callable[[Any, Any], Tensor] = cross_entropy
    detail: str = ""
    warnings: tuple[str, ...] = ()
    left_out: dict[str, str] = field(default_factory=dict)
    share: Share = WHOLE

    @property
    def says(self) -> str:
        """What the data are, in words."""
        return f"{self.name} ({self.detail or f'{self.num_classes} classes'})"

    def __len__(self) -> int:
        """Return the number of batches of the share."""
        return len(self.share.numbers(-(-self.samples // self.batch_size)))

    def __iter__(self) -> Iterator[Batch]:
        """Start again. Raises FileError when no image of the whole data can be read."""
        return self.make() if self.share == WHOLE else self.make(self.share)

    @property
    def whole(self) -> "DataSource":
        """The same with the batches of all processes."""
        return replace(self, share=WHOLE)

    def unreadable(self) -> FileError:
        """Return the error for data of which no image can be read."""
        return _unreadable(self.name, self.left_out)


def batches(
    spec: str | os.PathLike[str],
    *,
    model: nn.Module,
    batch_size: int = 16,
    max_batches: int | None = None,
    img_size: int | tuple[int, int] | None = None,
    in_chans: int | None = None,
    input_size: tuple[int, int, int] | None = None,
    workers: int = 0,
    seed: int = 0,
) -> DataSource:
    """Return batches of data in the form that a model expects.

    Which images are taken is drawn from the seed, with as many of each class as possible: of a
    folder that is sorted by class, the first batches would show one class only.

    Args:
        spec: "sample" (320 Fashion-MNIST images shipped with the package), "noise" (normal noise
            with random labels), a folder of class folders or a tar of one, or a name with prefix
            for `timm.data.create_dataset`, such as "hfds/NAME" or "torch/cifar10"; "@FOLDER" after
            a name says where it lies or shall be kept.
        model: The model; a timm model knows its data configuration.
        batch_size: Images in a batch.
        max_batches: Stop after so many; None takes all.
        img_size: Side of the images, or (height, width), in pixels; by default the model's.
        in_chans: Channels; by default the model's. Grey images are repeated to them.
        input_size: (channels, height, width) in one.
        workers: Processes that read files; no more than there are processors are started.
        seed: Of the selection, and of noise.

    Raises:
        InputError: A number that is not usable, or a dataset's library is not installed.
        FileError: The folder or dataset does not exist, is empty or cannot be read.
    """
    if batch_size < 1 or (max_batches is not None and max_batches < 1):
        raise InputError(
            f"batch size {batch_size}, batches {max_batches}: expected 1 or more: correct them"
        )
    wanted = _Wanted(str(spec), batch_size, max_batches, workers, seed)
    shape = InputShape.of(model, img_size, in_chans, input_size)
    if wanted.name == "noise":
        return _noise(wanted, shape, model)
    if wanted.name == "sample":
        return _image_source(wanted, shape, Sample(), Sample.CLASSES)
    return _from_timm(wanted, shape, model)


@dataclass(frozen=True)
class _Wanted:
    """What was asked for."""

    name: str
    batch_size: int
    max_batches: int | None
    workers: int
    seed: int

    def samples(self, available: int) -> int:
        limit = available if self.max_batches is None else self.max_batches * self.batch_size
        return min(limit, available)


def _image_source(
    wanted: _Wanted, shape: InputShape, image_set: ImageSet, class_names: tuple[str, ...]
) -> DataSource:
    """Return the source for images that can be read by index."""
    samples = wanted.samples(len(image_set))
    indices = balanced(image_set.labels, len(image_set), samples, wanted.seed)
    chosen = ChosenImages(image_set, indices, shape.pipeline(), len(class_names))
    left_out: dict[str, str] = {}

    def make(share: Share = WHOLE) -> Iterator[Batch]:
        loader = DataLoader(
            chosen,
            batch_sampler=share.batches(range(samples), wanted.batch_size),
            num_workers=min(wanted.workers, os.cpu_count() or 1),
            collate_fn=collate_readable,
            # Without one, the loader draws the seeds of its workers from the global RNG.
            generator=torch.Generator().manual_seed(wanted.seed),
        )
        try:
            yield from _readable(loader, wanted.name, left_out, whole=share == WHOLE)
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise InputError(
                f"{wanted.workers} worker processes: one ended unexpectedly, expected enough "
                "(shared) memory for all: pass --workers 0"
            ) from error

    return DataSource(
        wanted.name, len(class_names), class_names, samples, wanted.batch_size, make,
        warnings=image_set.warnings, left_out=left_out,
    )  # fmt: skip


def _readable(
    loader: Iterable[tuple[Batch | FileError, list[Unreadable]]],
    name: str,
    left_out: dict[str, str],
    *,
    whole: bool,
) -> Iterator[Batch]:
    """Yield the batches with an image that can be read, and note the others."""
    read = 0
    for found, unreadable in loader:
        batch = _raised(found)
        left_out |= {image.name: image.reason for image in unreadable}
        if len(batch[1]):
            read += len(batch[1])
            yield batch
    if whole and left_out and not read:
        raise _unreadable(name, left_out)


def _unreadable(name: str, left_out: dict[str, str]) -> FileError:
    first, why = next(iter(left_out.items()))
    return FileError(
        f"{name}: none of {len(left_out)} images can be read, expected some: the first is {first} "
        f"({why})"
    )


def _noise(wanted: _Wanted, shape: InputShape, model: nn.Module) -> DataSource:
    if wanted.max_batches is None:
        raise InputError("noise has no end: expected a number of batches: pass max_batches")
    size, number = tuple(shape.config["input_size"]), wanted.max_batches
    # A model without a head has no classes of its own.
    num_classes = getattr(model, "num_classes", 0) or 10

    def make(share: Share = WHOLE) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(wanted.seed)
        for batch in range(number):
            images = torch.randn(wanted.batch_size, *size, generator=generator)
            labels = torch.randint(num_classes, (wanted.batch_size,), generator=generator)
            if share.has(batch):
                yield images, labels

    samples = number * wanted.batch_size
    return DataSource(wanted.name, num_classes, None, samples, wanted.batch_size, make)


def _from_timm(wanted: _Wanted, shape: InputShape, model: nn.Module) -> DataSource:
    """Return the source for everything that `timm.data.create_dataset` opens."""
    opened = open_dataset(wanted.name, "validation", wanted.batch_size)
    if isinstance(opened.dataset, IterableDataset):
        return _streamed(wanted, shape, opened.dataset, model)
    image_set, names = image_set_of(opened)
    return _image_source(wanted, shape, image_set, names)


def _streamed(wanted: _Wanted, shape: InputShape, dataset: Any, model: nn.Module) -> DataSource:
    """Return the source for a dataset that can only be read from its start."""
    if wanted.max_batches is None:
        raise InputError(f"{wanted.name}: a stream: expected a number of batches: pass max_batches")
    names = class_names_of(dataset.reader)
    num_classes = len(names) if names else int(getattr(model, "num_classes", 0) or 1000)
    pipeline, samples = shape.pipeline(), wanted.max_batches * wanted.batch_size

    def make(share: Share = WHOLE) -> Iterator[Batch]:
        stream, left = enumerate(_pairs(dataset, wanted.name)), samples
        for batch in count():
            found = list(islice(stream, min(wanted.batch_size, left)))
            if not found:
                return
            left -= len(found)
            if share.has(batch):
                yield _raised(collate([item(*pair) for pair in found]))

    def item(position: int, pair: tuple[Any, Any]) -> Item:
        image, label = pair
        where = f"image {position} of {wanted.name}"
        return checked(pipeline.tensor(image), label, num_classes, where)

    return DataSource(wanted.name, num_classes, names, samples, wanted.batch_size, make)


def _pairs(dataset: Any, name: str) -> Iterator[tuple[Any, Any]]:
    """Yield the images of a stream and their labels."""
    pairs = iter(dataset)
    for position in count():
        try:
            image, label, *_ = next(pairs)
        except StopIteration:
            return
        except Exception as error:  # many libraries stand behind a stream
            raise FileError(
                f"{name}: broke off at image {position} ({reason(error)}): try again"
            ) from error
        yield image, label


def _raised(batch: Batch | FileError) -> Batch:
    if isinstance(batch, FileError):
        raise batch
    return batch
