"""Loaders of images to fine-tune on: augmented by timm's, or as for a test."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from fastplastic.errors import FileError
from fastplastic.sources.images import ChosenImages, ImageSet, Item, Pipeline, collate
from fastplastic.sources.shape import InputShape, timm_data

_EVAL_BATCH = 64


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """What is done to training images, by timm's names.

    Attributes:
        no_aug: Nothing but resizing and normalising.
        scale: Least and largest share of the image that is cut out.
        hflip: Probability of mirroring it.
        vflip: Probability of turning it upside down.
        color_jitter: Size of random changes of brightness, contrast and saturation.
        auto_augment: A policy of timm, such as "rand-m9-mstd0.5".
        re_prob: Probability of erasing a part.
    """

    no_aug: bool = False
    scale: tuple[float, float] = (0.35, 1.0)
    hflip: float = 0.5
    vflip: float = 0.0
    color_jitter: float = 0.0
    auto_augment: str | None = None
    re_prob: float = 0.0

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of `timm.data.create_loader`."""
        if self.no_aug:
            return {"no_aug": True}
        names = ("scale", "hflip", "vflip", "auto_augment", "re_prob")
        jitter = {"color_jitter": self.color_jitter or None}
        return {name: getattr(self, name) for name in names} | jitter


class RaisingLoader:
    """A loader whose datasets return errors in place of images: raises them, with their names.

    Args:
        loader: The loader.
    """

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in self.loader:
            if isinstance(batch, FileError):
                raise batch
            yield batch


@dataclass(frozen=True, eq=False)
class Loaders:
    """Makes the loaders.

    Attributes:
        shape: How an image becomes a tensor.
        num_classes: Number of classes.
        batch_size: Training images in a batch.
        workers: Processes that read files; no more than there are processors are started.
    """

    shape: InputShape
    num_classes: int
    batch_size: int
    workers: int

    def augmented(
        self, images: ImageSet, indices: Sequence[int], augmentation: Augmentation
    ) -> RaisingLoader:
        """Return whole batches in an order that is drawn from torch's random state."""
        return self._loader(
            _Loadable(images, list(indices), self.shape.channels, self.num_classes),
            self.batch_size, is_training=True, **augmentation.arguments(),
        )  # fmt: skip

    def plain(self, images: ImageSet, indices: Sequence[int]) -> RaisingLoader:
        """Return all images in this order, as for a test."""
        loadable = _Loadable(images, list(indices), self.shape.channels, self.num_classes)
        return self._loader(loadable, _EVAL_BATCH, is_training=False)

    def _loader(
        self, loadable: "_Loadable", batch_size: int, *, is_training: bool, **more: Any
    ) -> RaisingLoader:
        config = self.shape.transform_config()
        names = ["input_size", "interpolation", "mean", "std"]
        names += [] if is_training else ["crop_pct", "crop_mode"]
        loader = timm_data().create_loader(
            loadable, batch_size=batch_size, is_training=is_training, collate_fn=collate,
            num_workers=min(self.workers, os.cpu_count() or 1), use_prefetcher=False,
            # Workers that live on would not be seeded anew for the next run.
            persistent_workers=False, **{name: config[name] for name in names if name in config},
            **more,
        )  # fmt: skip
        return RaisingLoader(loader)


class _Loadable(Dataset[Any]):
    """Chosen images whose transform timm's loader sets."""

    transform: Callable[[Any], Tensor]

    def __init__(
        self, images: ImageSet, indices: list[int], channels: int, num_classes: int
    ) -> None:
        self._images, self._indices = images, indices
        self._channels, self._num_classes = channels, num_classes

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, position: int) -> Item:
        pipeline = Pipeline(self.transform, self._channels)
        chosen = ChosenImages(self._images, self._indices, pipeline, self._num_classes)
        return chosen[position]
