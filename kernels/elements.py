"""How to walk through tensors of any strides together, element by element.

A walk takes the dimensions of a weight from the slowest to the fastest in memory and merges those
that are one long stretch in all of its operands: the weight, its gradient, a mask, and the element
number, which counts in the logical row-major order of the whole weight. A contiguous weight becomes
one dimension, an expanded row mask makes it two, and so does a shard of its columns.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastplastic.kernels.checks import Gradients
from fastplastic.kernels.scores import SCORES
from fastplastic.kernels.shards import Shards, WeightShard
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
        firsts: int64 [n], the number of the first element: 0, but for shards.
    """

    addresses: Table
    dtypes: Table
    sizes: Table
    strides: Table
    firsts: Table

    @property
    def counts(self) -> Table:
        """Return the number of elements of each walk."""
        counts: Table = self.sizes.prod(1)
        return counts


def operands_of(
    criterion: str,
    weights: Sequence[Tensor],
    gradients: Gradients,
    masks: Sequence[Tensor | None] | None = None,
) -> list[Operands]:
    """Return what is walked through: the gradients only where the criterion reads them."""
    none = [None] * len(weights)
    read = gradients if SCORES[criterion].dw else None
    return list(zip(weights, read or none, masks or none, strict=True))


def counted_operands(
    criterion: str, weights: Sequence[Tensor], gradients: Gradients, shards: Shards
) -> list[Operands]:
    """Return what is walked through to count: nothing of what another process counts."""
    operands = operands_of(criterion, weights, gradients)
    if shards is None:
        return operands
    return [
        tensors if shard is None or shard.counted else _emptied(tensors)
        for tensors, shard in zip(operands, shards, strict=True)
    ]


def walks(operands: Sequence[Operands], shards: Shards = None) -> Walks:
    """Return the walks through weights; the caller keeps the tensors alive.

    Args:
        operands: Weight, gradient or None, mask or None, of one shape, for each weight.
        shards: Which part of a weight each is.
    """
    parts = shards or [None] * len(operands)
    ways = [_way(tensors, shard) for tensors, shard in zip(operands, parts, strict=True)]
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
        np.array([0 if shard is None else shard.first for shard in parts], dtype=np.int64),
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


def _emptied(tensors: Operands) -> Operands:
    weight, gradient, mask = (None if t is None else t.new_empty(0) for t in tensors)
    assert weight is not None
    return weight, gradient, mask


def _way(tensors: Operands, shard: WeightShard | None) -> list[tuple[int, ...]]:
    """Return (size, stride of weight, gradient, mask, element) of each merged dimension."""
    weight = tensors[0]
    shape = weight.shape
    if not weight.numel():
        return [(0, 1, 1, 1, 1)]
    whole = tuple(shape if shard is None else shard.shape)
    in_one = all(tensor is None or tensor.is_contiguous() for tensor in tensors)
    if in_one and whole[1:] == shape[1:]:
        return [(weight.numel(), 1, 1, 1, 1)]
    element = [math.prod(whole[dim + 1 :]) for dim in range(len(whole))]
    # What is not there keeps no dimensions apart.
    steps = [weight.stride() if t is None else t.stride() for t in tensors]
    ways = [
        (shape[dim], *(step[dim] for step in (*steps, element))) for dim in slowest_first(weight)
    ]
    return merged(ways) or [(1, 0, 0, 0, 0)]
