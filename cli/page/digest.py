"""A digest of the data that a model has seen: others can tell whether theirs are the same."""

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from fastplastic.sources import DataSource


class DataDigest:
    """The sha256 of all images and labels of the first reading of a source.

    Attributes:
        value: The digest in hexadecimal; None before the source was read to its end.
    """

    def __init__(self) -> None:
        self.value: str | None = None

    def watch(self, source: "DataSource") -> "DataSource":
        """Return the same source, whose batches are added to the digest as they are read."""

        def make() -> Iterator[Any]:
            return source.make() if self.value else self._hashed(source.make())

        return replace(source, make=make)

    def _hashed(self, batches: Iterator[Any]) -> Iterator[Any]:
        from torch.utils._pytree import tree_leaves

        found = hashlib.sha256()
        for batch in batches:
            for tensor in tree_leaves(batch):
                _add(found, tensor)
            yield batch
        self.value = found.hexdigest()


def _add(found: Any, tensor: "Tensor") -> None:
    import torch

    # With the shape, or the same numbers in other batches would be the same data.
    found.update(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
    if tensor.numel():
        found.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
