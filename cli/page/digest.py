"""A digest of the data that a model has seen: others can tell whether theirs are the same."""

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fastplastic.cli.launch import heard_of_all

if TYPE_CHECKING:
    from torch import Tensor

    from fastplastic.sources import DataSource


class DataDigest:
    """The sha256 of all images and labels of the first reading of a source.

    It is made of those of the batches, in the order of the digests: several processes that share
    the batches have the same as one.
    """

    def __init__(self) -> None:
        self._batches: list[str] | None = None

    @property
    def value(self) -> str | None:
        """The digest in hexadecimal; None before the source was read to its end."""
        if self._batches is None:
            return None
        return hashlib.sha256("\n".join(sorted(self._batches)).encode()).hexdigest()

    def put_together(self) -> None:
        """Take in the batches of all other processes."""
        self._batches = [own for read in heard_of_all(self._batches) for own in read or ()]

    def watch(self, source: "DataSource") -> "DataSource":
        """Return the same source, whose batches are added to the digest as they are read."""

        def make(*share: Any) -> Iterator[Any]:
            made = source.make(*share)
            return self._hashed(made) if self._batches is None else made

        return replace(source, make=make)

    def _hashed(self, batches: Iterator[Any]) -> Iterator[Any]:
        from torch.utils._pytree import tree_leaves

        read = []
        for batch in batches:
            found = hashlib.sha256()
            for tensor in tree_leaves(batch):
                _add(found, tensor)
            read.append(found.hexdigest())
            yield batch
        self._batches = read


def _add(found: Any, tensor: "Tensor") -> None:
    import torch

    # With the shape, or the same numbers in other batches would be the same data.
    found.update(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
    if tensor.numel():
        found.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
