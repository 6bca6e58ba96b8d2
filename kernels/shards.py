"""Which part of a weight a tensor is, where each of several processes holds a part.

Random words and ties belong to elements of the whole weight. A walk counts elements by the strides
of the whole weight, from the first one of the part on, so the parts of a weight get what the whole
would get, however it is cut.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class WeightShard:
    """The place of a tensor in a weight that is cut along any of its dimensions.

    Element [i, j, ...] of the tensor is element [offsets[0] + i, offsets[1] + j, ...] of the
    weight, without gaps; its number is that in the logical row-major order of the whole weight. A
    tensor without elements may have any shape.

    Attributes:
        shape: Shape of the whole weight.
        offsets: First index of the tensor in each dimension of the weight.
        counted: Whether `select` counts the elements of this process. Of processes that hold the
            same elements (replicas) exactly one does; masks and values are made in all of them.
    """

    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    counted: bool = True

    def __post_init__(self) -> None:
        """Refuse what lies outside of the weight."""
        for name in ("shape", "offsets"):
            object.__setattr__(self, name, tuple(int(number) for number in getattr(self, name)))
        if len(self.offsets) != len(self.shape):
            raise ValueError(
                f"the shard has offsets {self.offsets} in a weight {self.shape}, "
                "expected one for each dimension"
            )
        if not all(0 <= at <= size for at, size in zip(self.offsets, self.shape, strict=True)):
            raise ValueError(
                f"the shard has offsets {self.offsets} in a weight {self.shape}, "
                "expected offsets from 0 to the size of the dimension"
            )

    @property
    def size(self) -> int:
        """Return the number of elements of the whole weight."""
        return math.prod(self.shape)

    @property
    def strides(self) -> tuple[int, ...]:
        """Return how far neighbours along each dimension are from each other in the weight."""
        return tuple(math.prod(self.shape[dim + 1 :]) for dim in range(len(self.shape)))

    @property
    def first(self) -> int:
        """Return the number of the first element."""
        return sum(at * step for at, step in zip(self.offsets, self.strides, strict=True))

    def elements(self, shape: Sequence[int]) -> NDArray[np.int64]:
        """Return the number of each element of a tensor in the weight, in row-major order.

        Args:
            shape: Shape of the tensor.
        """
        if math.prod(shape) == 0:
            return np.zeros(0, dtype=np.int64)
        numbers = np.full((1,) * len(self.shape), self.first, dtype=np.int64)
        for dim, (size, step) in enumerate(zip(shape, self.strides, strict=True)):
            along = [1] * len(self.shape)
            along[dim] = size
            numbers = numbers + (np.arange(size, dtype=np.int64) * step).reshape(along)
        return numbers.reshape(-1)


# Of each weight; None for a whole one, or for all.
Shards = Sequence[WeightShard | None] | None


def sizes_of(weights: Sequence[Tensor], shards: Shards) -> list[int]:
    """Return the number of elements of each whole weight."""
    if shards is None:
        return [weight.numel() for weight in weights]
    pairs = zip(weights, shards, strict=True)
    return [weight.numel() if shard is None else shard.size for weight, shard in pairs]
