"""Images to fine-tune on: training, test and validation, apart from each other.

What is trained on is augmented by timm's loader; what is measured on is resized and normalised as
the model's timm data configuration says.
"""

import hashlib
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import IterableDataset

from fastplastic.errors import FileError, InputError
from fastplastic.sources.datasets import image_set_of, open_dataset
from fastplastic.sources.images import ImageSet, Sample, balanced
from fastplastic.sources.loaders import Augmentation, Loaders, RaisingLoader
from fastplastic.sources.shape import InputShape

# Folders that timm takes for the splits of these names, and one more that is in use.
_TRAIN = ("train", "training")
_HELD_OUT = ("validation", "val", "valid", "eval", "evaluation", "test")


@dataclass(frozen=True, kw_only=True)
class WantedSplits:
    """How data are to be split.

    Attributes:
        train_split: Name of the training split or folder.
        val_split: Name of the split or folder that is tested on; or a share in (0, 1) of the
            training images that is taken for it; None looks for a folder, and takes 0.2 otherwise.
        validation_share: Share of the training images that is kept apart to choose by, or 0.
        batch_size: Training images in a batch.
        workers: Processes that read files.
        seed: Of the split by shares.
        augmentation: What is done to training images.
    """

    train_split: str = "train"
    val_split: str | None = None
    validation_share: float = 0.0
    batch_size: int = 32
    workers: int = 0
    seed: int = 0
    augmentation: Augmentation = field(default_factory=Augmentation)


@dataclass(frozen=True, eq=False)
class Splits:
    """Loaders of (images, labels), and what is to be told of them.

    Attributes:
        train: Augmented training images in an order that is drawn from torch's global random state.
        plain: Training images as for the test, class balanced in a fixed order.
        test: Images that curves are measured on.
        validation: Images to choose by, or None.
        classes: Their names, in the order of the model's outputs.
        input_config: How an image becomes a tensor: timm's data configuration.
        sizes: {"train": images, "test": ..., "validation": ...}.
        tested_on: Where the test images come from, in words.
        warnings: What a user must see.
        digest: Of names, sizes and labels of all images.
    """

    train: RaisingLoader
    plain: RaisingLoader
    test: RaisingLoader
    validation: RaisingLoader | None
    classes: tuple[str, ...]
    input_config: Mapping[str, Any]
    sizes: Mapping[str, int]
    tested_on: str
    warnings: tuple[str, ...]
    digest: str

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)


@dataclass(frozen=True, eq=False)
class _Part:
    """Some images of a set."""

    images: ImageSet
    indices: Sequence[int]

    def labels(self) -> list[int]:
        assert self.images.labels is not None
        return [self.images.labels[index] for index in self.indices]


def split_data(
    spec: str | os.PathLike[str],
    *,
    model: nn.Module,
    wanted: WantedSplits | None = None,
    img_size: int | tuple[int, int] | None = None,
    in_chans: int | None = None,
    input_size: tuple[int, int, int] | None = None,
) -> Splits:
    """Open data to fine-tune on.

    Args:
        spec: A folder with a folder for each split, or of class folders alone; a tar of one; a name
            for `timm.data.create_dataset`, such as "hfds/NAME"; or "sample".
        model: The model; a timm model knows its data configuration.
        wanted: How to split.
        img_size: Side of the images, or (height, width), in pixels; by default the model's.
        in_chans: Channels; by default the model's.
        input_size: (channels, height, width) in one.

    Raises:
        InputError: Numbers that are not usable, no labels, or fewer images than a batch.
        FileError: The data cannot be read, have one class, or the classes of the splits differ.
    """
    wanted = wanted or WantedSplits()
    name = str(spec)
    shape = InputShape.of(model, img_size, in_chans, input_size)
    train, test, classes, tested_on = _parts(name, wanted)
    validation = None
    if wanted.validation_share:
        train, validation = _shared(name, train, wanted.validation_share, wanted.seed + 1)
    _check(name, train, wanted)
    loaders = Loaders(shape, len(classes), wanted.batch_size, wanted.workers)
    order = balanced(train.labels(), len(train.indices), len(train.indices), wanted.seed)
    parts = {"train": train, "test": test} | ({"validation": validation} if validation else {})
    return Splits(
        train=loaders.augmented(train.images, train.indices, wanted.augmentation),
        plain=loaders.plain(train.images, [train.indices[i] for i in order]),
        test=loaders.plain(test.images, test.indices),
        validation=loaders.plain(validation.images, validation.indices) if validation else None,
        classes=tuple(classes),
        input_config=shape.config,
        sizes={key: len(part.indices) for key, part in parts.items()},
        tested_on=tested_on,
        warnings=tuple(
            dict.fromkeys(
                (
                    *train.images.warnings,
                    *test.images.warnings,
                    *_duplicates(train, test, name),
                )
            )
        ),
        digest=_digest(parts, classes),
    )


def _parts(name: str, wanted: WantedSplits) -> tuple[_Part, _Part, tuple[str, ...], str]:
    """Return training and test images, the classes, and where the test images come from."""
    share = _share(wanted.val_split)
    if name == "noise":
        raise InputError("noise has no labels to learn: expected images: pass --data DIR")
    if name == "sample":
        images: ImageSet = Sample()
        classes: tuple[str, ...] = Sample.CLASSES
        held_out = None
    else:
        images, classes = _image_set(name, wanted.train_split, wanted)
        held_out = None if share is not None else _held_out(name, wanted)
    _check_labels(name, images)
    whole = _Part(images, range(len(images)))
    if held_out is None:
        share = 0.2 if share is None else share
        train, test = _shared(name, whole, share, wanted.seed)
        return train, test, classes, f"{share:.0%} of the images, drawn by seed {wanted.seed}"
    others, other_classes = _image_set(name, held_out, wanted)
    _check_labels(f"{name}, split {held_out}", others)
    _check_classes(name, classes, held_out, other_classes)
    return whole, _Part(others, range(len(others))), classes, f"split {held_out}"


def _share(val_split: str | None) -> float | None:
    """Return the share that --val-split gives, or None for a name."""
    try:
        share = float(val_split) if val_split is not None else None
    except ValueError:
        return None
    if share is not None and not 0 < share < 1:
        raise InputError(
            f"val_split {val_split}: expected the name of a split or a share between 0 and 1, "
            "such as 0.2"
        )
    return share


def _held_out(name: str, wanted: WantedSplits) -> str | None:
    """Return the split to test on: the one that was named, or a folder beside that of training."""
    if wanted.val_split is not None:
        if Path(name).is_dir() and not Path(name, wanted.val_split).is_dir():
            raise FileError(
                f"{name}: has no folder {wanted.val_split}, expected one with the same classes: "
                "name another with --val-split, or a share such as 0.2"
            )
        return wanted.val_split
    if not Path(name).exists():
        return "validation"
    beside = [folder for folder in _HELD_OUT if Path(name, folder).is_dir()]
    apart = any(Path(name, folder).is_dir() for folder in (wanted.train_split, *_TRAIN))
    return beside[0] if beside and apart else None


def _image_set(name: str, split: str, wanted: WantedSplits) -> tuple[ImageSet, tuple[str, ...]]:
    # timm looks for the folder of a split under some names only.
    folder = Path(name, split)
    opened = open_dataset(str(folder) if folder.is_dir() else name, split, wanted.batch_size)
    if isinstance(opened.dataset, IterableDataset):
        raise InputError(
            f"{name}: a stream, which cannot be shuffled or split: expected images that can be "
            "read by index: take a folder"
        )
    return image_set_of(opened)


def _check_labels(name: str, images: ImageSet) -> None:
    if images.labels is None or min(images.labels, default=-1) < 0:
        raise InputError(f"{name}: has no labels, expected a class for each image: sort the images")


def _check_classes(
    name: str, classes: Sequence[str], other: str, other_classes: Sequence[str]
) -> None:
    if tuple(classes) == tuple(other_classes):
        return
    missing = [x for x in classes if x not in other_classes]
    more = [x for x in other_classes if x not in classes]
    found = [f"{', '.join(missing[:3])} in training only"] * bool(missing)
    found += [f"{', '.join(more[:3])} in {other} only"] * bool(more)
    raise FileError(
        f"{name}: training has {len(classes)} classes, {other} {len(other_classes)} "
        f"({'; '.join(found) or 'in another order'}): expected the same: rearrange the folders"
    )


def _shared(name: str, part: _Part, share: float, seed: int) -> tuple[_Part, _Part]:
    """Return the rest and the share of each class, drawn by the seed."""
    generator = torch.Generator().manual_seed(seed)
    by_class: dict[int, list[int]] = defaultdict(list)
    for index, label in zip(part.indices, part.labels(), strict=True):
        by_class[label].append(index)
    kept, taken = [], []
    for _, indices in sorted(by_class.items()):
        order = torch.randperm(len(indices), generator=generator).tolist()
        number = round(share * len(indices))
        taken += [indices[i] for i in order[:number]]
        kept += [indices[i] for i in order[number:]]
    if not kept or not taken:
        raise InputError(
            f"{name}: {len(part.indices)} images cannot be split at a share of {share:g}, expected "
            "some of a class on both sides: add images or take another share"
        )
    return _Part(part.images, sorted(kept)), _Part(part.images, sorted(taken))


def _check(name: str, train: _Part, wanted: WantedSplits) -> None:
    if len(train.indices) < wanted.batch_size:
        raise InputError(
            f"{name}: {len(train.indices)} training images, expected at least a batch of "
            f"{wanted.batch_size}: pass a smaller batch size, or more images"
        )


def _duplicates(train: _Part, test: _Part, name: str) -> tuple[str, ...]:
    """Return a warning where the same image is in both, byte by byte."""
    sizes = {part: _by_size(part) for part in (train, test)}
    shared = sizes[train].keys() & sizes[test].keys()
    digests: dict[_Part, set[bytes]] = {}
    for part in (train, test):
        found = (i for size in shared for i in sizes[part][size])
        digests[part] = {hashlib.blake2b(part.images.content(i)).digest() for i in found}
    both = len(digests[train] & digests[test])
    if not both:
        return ()
    return (
        f"{name}: {both} image{'s' * (both != 1)} of the test {'are' if both > 1 else 'is'} among "
        "the training images too, so the accuracy is too high: take them out",
    )


def _by_size(part: _Part) -> dict[int, list[int]]:
    """Return the indices by size in bytes: only images of one size can be the same."""
    found: dict[int, list[int]] = defaultdict(list)
    for index in part.indices:
        found[part.images.size(index)].append(index)
    return found


def _digest(parts: Mapping[str, _Part], classes: Sequence[str]) -> str:
    text = hashlib.blake2b(digest_size=16)
    text.update(repr(tuple(classes)).encode())
    for key, part in parts.items():
        text.update(key.encode())
        for index, label in zip(part.indices, part.labels(), strict=True):
            text.update(f"{index} {label} {part.images.size(index)}\n".encode())
    return text.hexdigest()
