"""How to walk through tensors of any strides together, element by element.

A walk takes the dimensions of a weight from the slowest to the fastest in memory and merges those
that are one long stretch in all of its operands: the weight, its gradient, a mask, and the element
number, which counts in the logical row-major order of the weight. A contiguous weight becomes one
dimension, an expanded row mask makes it two.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastplastic.kernels.strides import merged, slowest_first

# Columns of the operands of a walk.
WEIGHT, GRADIENT, MASK, ELEMENT = range(4)
DTYPES = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.float64: 3,
    torch.bool: 4,
}
_LEAST_TASK = 1 << 16
_TASKS_PER_THREAD = 16
Operands = tuple[Tensor, Tensor | None, Tensor | None]
Table = NDArray[np.int64]


class Walks(NamedTuple):
    """The walks of several weights, as tables; a tuple, because Numba takes those.

    Attributes:
        addresses: int64 [n, 3], of weight, gradient and mask; 0 where there is none.
        dtypes: int64 [n, 3], as in `DTYPES`; 0 where there is none.
        sizes: int64 [n, D], slowest dimension first; 1 where a walk has fewer dimensions.
        strides: int64 [n, 4, D], of each operand, in elements.
    """

    addresses: Table
    dtypes: Table
    sizes: Table
    strides: Table

    @property
    def counts(self) -> Table:
        """Return the number of elements of each walk."""
        counts: Table = self.sizes.prod(1)
        return counts


def walks(operands: Sequence[Operands]) -> Walks:
    """Return the walks through weights; the caller keeps the tensors alive.

    Args:
        operands: Weight, gradient or None, mask or None, of one shape, for each weight.
    """
    ways = [_way(tensors) for tensors in operands]
    depth = max((len(way) for way in ways), default=1)
    table = np.zeros((len(ways), 5, depth), dtype=np.int64)
    table[:, 0] = 1
    for row, way in zip(table, ways, strict=True):
        row[:, depth - len(way) :] = np.array(way).T
    heads = [
        [(0, 0) if t is None else (t.data_ptr(), DTYPES[t.dtype]) for t in tensors]
        for tensors in operands
    ]
    head = np.array(heads, dtype=np.int64).reshape(len(ways), 3, 2)
    return Walks(
        np.ascontiguousarray(head[..., 0]),
        np.ascontiguousarray(head[..., 1]),
        np.ascontiguousarray(table[:, 0]),
        np.ascontiguousarray(table[:, 1:]),
    )


def tasks(counts: Table, n_threads: int) -> Table:
    """Cut walks into pieces: int64 [n_tasks, 3] of walk, first position and end, in that order.

    Args:
        counts: Number of elements of each walk.
        n_threads: How many threads share the pieces.
    """
    # Large enough that a table of counts for each is nothing beside its elements.
    size = max(_LEAST_TASK, int(counts.sum()) // (_TASKS_PER_THREAD * n_threads))
    pieces = -(-counts // size)
    walk = np.repeat(np.arange(len(counts)), pieces)
    start = (np.arange(len(walk)) - np.repeat(pieces.cumsum() - pieces, pieces)) * size
    return np.stack([walk, start, np.minimum(start + size, counts[walk])], axis=1)


def _way(tensors: Operands) -> list[tuple[int, ...]]:
    """Return (size, stride of weight, gradient, mask, element) of each merged dimension."""
    weight = tensors[0]
    if all(tensor is None or tensor.is_contiguous() for tensor in tensors):
        return [(weight.numel(), 1, 1, 1, 1)]
    shape = weight.shape
    element = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    steps = [(0,) * len(shape) if t is None else t.stride() for t in tensors]
    ways = [
        (shape[dim], *(step[dim] for step in (*steps, element))) for dim in slowest_first(weight)
    ]
    return merged(ways) or [(1, 0, 0, 0, 0)]
