"""Images that are read by index: which are taken, and how they become tensors."""

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastplastic.errors import FileError
from fastplastic.sources.hub import reason

if TYPE_CHECKING:
    from PIL.Image import Image


class ImageSet(Protocol):
    """Images that can be read by index.

    Attributes:
        labels: The label of each, or None where they are not known before the image is read.
        warnings: What a user must know of all of them.
    """

    labels: Sequence[int] | None
    warnings: tuple[str, ...]

    def __len__(self) -> int: ...

    def read(self, index: int) -> "tuple[Image, Any]":
        """Return an image and its label; any exception when it cannot be read."""

    def describe(self, index: int) -> str:
        """Return what to call the image in an error."""

    def size(self, index: int) -> int:
        """Return a number that the same images share, if possible without reading them.

        Raises FileError when the image cannot be read.
        """

    def content(self, index: int) -> bytes:
        """Return what makes the image: the bytes of its file, or its pixels; or FileError."""


class Sample:
    """The images shipped with the package: 320 of Fashion-MNIST, 32 of each class."""

    FILE = Path(__file__).with_name("sample.npz")
    CLASSES = (
        "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag",
        "Ankle boot",
    )  # fmt: skip
    warnings: tuple[str, ...] = ()

    def __init__(self) -> None:
        import numpy as np

        with np.load(self.FILE, allow_pickle=False) as file:
            self.images = file["images"]
            self.labels: Sequence[int] | None = file["labels"].tolist()

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> "tuple[Image, Any]":
        """Return an image of 28 x 28 grey pixels and its label."""
        from PIL import Image

        return Image.fromarray(self.images[index]), self.labels[index] if self.labels else None

    def describe(self, index: int) -> str:
        """Return what to call the image in an error."""
        return f"sample image {index}"

    def size(self, index: int) -> int:
        """Return the number of pixels."""
        return int(self.images[index].size)

    def content(self, index: int) -> bytes:
        """Return the pixels."""
        return bytes(self.images[index].tobytes())


class Files:
    """What a reader of timm finds: folders, tar files, Hugging Face datasets.

    Args:
        reader: The reader.
        warnings: What a user must know of the images.
    """

    def __init__(self, reader: Any, warnings: tuple[str, ...] = ()) -> None:
        self.reader, self.warnings = reader, warnings
        self.labels: Sequence[int] | None = _labels(reader)

    def __len__(self) -> int:
        return len(self.reader)

    def read(self, index: int) -> "tuple[Image, Any]":
        """Return a decoded image and its label."""
        from PIL import Image

        file, label = self._open(index)
        with file:
            image = Image.open(file)
            image.load()
        return image, label

    def describe(self, index: int) -> str:
        """Return the name of the file."""
        return str(self.reader.filename(index, absolute=True))

    def size(self, index: int) -> int:
        """Return the size of the file in bytes."""
        path = Path(self.describe(index))
        return path.stat().st_size if path.is_file() else len(self.content(index))

    def content(self, index: int) -> bytes:
        """Return the bytes of the file."""
        try:
            file, _ = self._open(index)
            with file:
                return bytes(file.read())
        except OSError as error:
            raise Unreadable(self.describe(index), reason(error)).error() from error

    def _open(self, index: int) -> tuple[Any, Any]:
        """Return a file and its label; OSError for what would never end, such as a pipe."""
        path = Path(self.describe(index))
        if path.exists() and not path.is_file():
            raise OSError("not a regular file")
        # Not through timm's dataset, which takes the next image in place of one it cannot read.
        file, label, *_ = self.reader[index]
        return file, label


class Indexed:
    """A dataset of torchvision."""

    warnings: tuple[str, ...] = ()

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        targets = getattr(dataset, "targets", None)
        known = None if targets is None else [int(target) for target in targets]
        self.labels: Sequence[int] | None = known

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, index: int) -> "tuple[Image, Any]":
        """Return a decoded image and its label."""
        image, label = self.dataset[index]
        return image, label

    def describe(self, index: int) -> str:
        """Return what to call the image in an error."""
        return f"image {index} of {type(self.dataset).__name__}"

    def size(self, index: int) -> int:
        """Return 0: how large an image is, only reading it tells."""
        return 0

    def content(self, index: int) -> bytes:
        """Return the pixels."""
        image, _ = self.dataset[index]
        return bytes(image.tobytes())


@dataclass(frozen=True, eq=False)
class Pipeline:
    """Decode, resize and normalise one image.

    Attributes:
        transform: Makes a tensor of an image in colour, or a grey one when `channels` is not 3.
        channels: Number of channels; a grey image is repeated to them.
    """

    transform: Callable[["Image"], Tensor]
    channels: int

    def tensor(self, image: "Image") -> Tensor:
        """Return float32 [channels, height, width]."""
        tensor = self.transform(image.convert("RGB" if self.channels == 3 else "L"))
        return tensor.expand(self.channels, -1, -1)


@dataclass(frozen=True)
class Unreadable:
    """An image that cannot be read.

    Attributes:
        name: What it is called.
        reason: Why.
    """

    name: str
    reason: str

    def error(self) -> FileError:
        """Return what to raise where each image is needed."""
        return FileError(
            f"{self.name}: cannot be read as an image ({self.reason}): repair or remove the file"
        )


# What a dataset gives for an image: an error where a label is none of the classes.
Item = tuple[Tensor, int] | Unreadable | FileError


@dataclass(frozen=True, eq=False)
class ChosenImages(Dataset[Any]):
    """The chosen images as (tensor, label), in order; an error is returned in place of a pair.

    Raised in a worker process, it would come out wrapped, with the worker's traceback in its text.
    """

    image_set: ImageSet
    indices: list[int]
    pipeline: Pipeline
    num_classes: int

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> Item:
        index = self.indices[position]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of decoders, on metadata that do not matter here
                image, label = self.image_set.read(index)
                tensor = self.pipeline.tensor(image)
        except Exception as error:  # decoders answer corrupt bytes with exceptions of every kind
            return Unreadable(self.image_set.describe(index), _why(error))
        return checked(tensor, label, self.num_classes, self.image_set.describe(index))


def _why(error: Exception) -> str:
    from PIL import UnidentifiedImageError

    # Its own text is mostly the name of the file once more.
    return "no image" if isinstance(error, UnidentifiedImageError) else reason(error)


def checked(
    tensor: Tensor, label: Any, num_classes: int, name: str
) -> tuple[Tensor, int] | FileError:
    """Return the pair, or an error when the label is not one of the classes."""
    if label is None or not 0 <= int(label) < num_classes:
        return FileError(
            f"{name}: label {label}, expected 0 to {num_classes - 1}: correct the labels"
        )
    return tensor, int(label)


def collate(items: list[Item]) -> tuple[Tensor, Tensor] | FileError:
    """Return images [batch, channels, height, width] and int64 [batch], or the first error."""
    found, unreadable = collate_readable(items)
    return unreadable[0].error() if unreadable else found


def collate_readable(
    items: list[Item],
) -> tuple[tuple[Tensor, Tensor] | FileError, list[Unreadable]]:
    """Return the batch of those that can be read, of 0 images perhaps, and the others."""
    images, labels, unreadable = [], [], []
    for item in items:
        if isinstance(item, FileError):
            return item, []
        if isinstance(item, Unreadable):
            unreadable.append(item)
        else:
            images.append(item[0])
            labels.append(item[1])
    stacked = torch.stack(images) if images else torch.empty(0)
    return (stacked, torch.tensor(labels)), unreadable


def balanced(labels: Sequence[int] | None, available: int, count: int, seed: int) -> list[int]:
    """Draw `count` of the images: one of each class in random order, then one more of each, ..."""
    shuffled = torch.randperm(available, generator=torch.Generator().manual_seed(seed)).tolist()
    if labels is not None:
        seen: Counter[int] = Counter()
        rounds = {}
        for index in shuffled:
            rounds[index] = seen[labels[index]]
            seen[labels[index]] += 1
        shuffled.sort(key=rounds.__getitem__)
    return [int(index) for index in shuffled[:count]]


def _labels(reader: Any) -> list[int] | None:
    """Return all labels without reading an image, or None where that is not possible."""
    targets = getattr(reader, "targets", None)
    if targets is None and isinstance(getattr(reader, "samples", None), list):
        targets = [label for _, label in reader.samples]
    if targets is None and hasattr(reader, "label_key"):
        targets = reader.dataset[reader.label_key]
    return None if targets is None else [int(target) for target in targets]
