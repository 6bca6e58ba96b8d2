"""Dimensions by their strides: what lies in one long stretch is one dimension."""

import math
from collections.abc import Iterable, Iterator, Sequence

from torch import Tensor

# Elements that are copied at a time where the strides cannot be written as [A, C, B].
_PIECE = 1 << 18


def slowest_first(x: Tensor) -> list[int]:
    """Return the dimensions of a tensor, that with the largest stride first."""
    return sorted(range(x.ndim), key=x.stride, reverse=True)


def merged(dimensions: Iterable[Sequence[int]]) -> list[tuple[int, ...]]:
    """Join dimensions that are one long stretch in the memory of every operand.

    Args:
        dimensions: (size, stride in each operand) of each dimension, the slowest first.

    Returns:
        The same of those that are left; dimensions of size 1, whose strides say nothing, are not.
    """
    joined: list[tuple[int, ...]] = []
    for size, *strides in dimensions:
        if size == 1:
            continue
        if joined and joined[-1][1:] == tuple(size * stride for stride in strides):
            joined[-1] = (joined[-1][0] * size, *strides)
        else:
            joined.append((size, *strides))
    return joined


def stretch_of(dimensions: Iterable[tuple[int, int]]) -> tuple[int, int] | None:
    """Return (size, stride) of dimensions as one, the slowest first.

    (1, 1) where all have size 1; None where they are not one stretch.
    """
    joined = merged(dimensions)
    if len(joined) > 1:
        return None
    size, stride = joined[0] if joined else (1, 1)
    return size, stride


def view_of(
    shape: Sequence[int], strides: Sequence[int], axis: int
) -> tuple[tuple[int, int, int], tuple[int, int, int]] | None:
    """Return shape and strides of a tensor as [A, C, B], None where that is impossible.

    A are the positions that change slower than the unit, C the units, B the faster positions.
    """
    unit = strides[axis]
    if shape[axis] == 1:
        # Its stride says nothing; a single unit goes before all that is fast.
        unit = max((s for d, s in enumerate(strides) if d != axis and shape[d] > 1), default=1) + 1
    others = [(n, strides[d]) for d, n in enumerate(shape) if d != axis and n > 1]
    others.sort(key=lambda dimension: dimension[::-1], reverse=True)
    outer = stretch_of(dimension for dimension in others if dimension[1] > unit)
    inner = stretch_of(dimension for dimension in others if dimension[1] <= unit)
    if outer is None or inner is None:
        return None
    return (outer[0], shape[axis], inner[0]), (outer[1], unit, inner[1])


def unit_views(x: Tensor, axis: int) -> Iterator[tuple[int, Tensor]]:
    """Yield (first unit, [A, C', B]) that together cover a tensor once, as views where possible.

    NCHW becomes [N, C, HW], channels_last and (batch, tokens, channels) become [positions, C, 1].
    Where the strides do not allow that (a crop, an expanded tensor), pieces are copied, never the
    whole tensor.
    """
    if x.numel() == 0:
        return
    x = x.detach()
    view = view_of(tuple(x.shape), x.stride(), axis)
    if view is not None and (view[0][2] == 1 or view[1][2] == 1):
        yield 0, x.as_strided(*view)
        return
    for start, (piece,) in pieces_of((x,), axis, _PIECE):
        yield start, piece.contiguous()


def pieces_of(
    tensors: tuple[Tensor, ...], axis: int, limit: int
) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
    """Yield (first unit, pieces [A, C', B]) that together cover tensors of one shape once.

    They are cut along the dimension that is the slowest in the first tensor, until a piece has at
    most `limit` elements: it is then a few long stretches. Pieces are views where possible.
    """
    order = slowest_first(tensors[0])
    unit = order.index(axis)
    permuted = tuple(tensor.permute(order) for tensor in tensors)
    for start, cut in _cut(permuted, unit, 0, limit):
        shape = cut[0].shape
        flat = (math.prod(shape[:unit]), shape[unit], math.prod(shape[unit + 1 :]))
        yield start, tuple(piece.reshape(flat) for piece in cut)


def _cut(
    tensors: tuple[Tensor, ...], unit: int, start: int, limit: int
) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
    shape = tensors[0].shape
    total = math.prod(shape)
    if total <= limit:
        yield start, tensors
        return
    dim = next(d for d, size in enumerate(shape) if size > 1)
    step = max(1, limit * shape[dim] // total)
    for begin in range(0, shape[dim], step):
        size = min(step, shape[dim] - begin)
        narrowed = tuple(tensor.narrow(dim, begin, size) for tensor in tensors)
        yield from _cut(narrowed, unit, start + begin if dim == unit else start, limit)
