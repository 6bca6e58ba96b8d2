"""Any tensor as [A, C, B]: positions that change slower than the unit, units, faster positions."""

import itertools
import math
from collections.abc import Iterator, Sequence

from torch import Tensor

# Elements that are copied at a time where the strides cannot be written as [A, C, B].
_PIECE = 1 << 18


def unit_views(x: Tensor, axis: int) -> Iterator[tuple[int, Tensor]]:
    """Yield (first unit, [A, C', B]) that together cover a tensor once, as views where possible.

    Dimensions are merged by their strides: NCHW becomes [N, C, HW], channels_last and
    (batch, tokens, channels) become [positions, C, 1]. Where the strides do not allow that (a crop,
    an expanded tensor), pieces are copied, never the whole tensor.
    """
    if x.numel() == 0:
        return
    x = x.detach()
    view = _as_view(x, axis)
    if view is not None:
        yield 0, view
        return
    order = sorted(range(x.ndim), key=x.stride, reverse=True)
    yield from _copies(x.permute(order), order.index(axis), 0)


def _as_view(x: Tensor, axis: int) -> Tensor | None:
    view = view_of(tuple(x.shape), x.stride(), axis)
    if view is None or (view[0][2] > 1 and view[1][2] != 1):
        return None
    return x.as_strided(*view)


def view_of(
    shape: Sequence[int], strides: Sequence[int], axis: int
) -> tuple[tuple[int, int, int], tuple[int, int, int]] | None:
    """Return shape and strides of a tensor as [A, C, B], None where that is impossible."""
    unit = strides[axis]
    if shape[axis] == 1:
        # Its stride says nothing; a single unit goes before all that is fast.
        unit = max((s for d, s in enumerate(strides) if d != axis and shape[d] > 1), default=1) + 1
    others = [(strides[d], n) for d, n in enumerate(shape) if d != axis and n > 1]
    others.sort(reverse=True)
    outer = _merged([item for item in others if item[0] > unit])
    inner = _merged([item for item in others if item[0] <= unit])
    if outer is None or inner is None:
        return None
    return (outer[1], shape[axis], inner[1]), (outer[0], unit, inner[0])


def _merged(dimensions: Sequence[tuple[int, int]]) -> tuple[int, int] | None:
    """Return (stride, size) of dimensions, slowest first, as one; None where that is impossible."""
    for (stride, _), (inner, size) in itertools.pairwise(dimensions):
        if stride != inner * size:
            return None
    if not dimensions:
        return 1, 1
    return dimensions[-1][0], math.prod(size for _, size in dimensions)


def _copies(x: Tensor, axis: int, start: int) -> Iterator[tuple[int, Tensor]]:
    """Cut along the slowest dimension until a piece is small enough to be copied."""
    if x.numel() <= _PIECE:
        shape = x.shape
        flat = (math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :]))
        yield start, x.contiguous().view(flat)
        return
    dim = next(d for d, size in enumerate(x.shape) if size > 1)
    step = max(1, _PIECE * x.shape[dim] // x.numel())
    for begin in range(0, x.shape[dim], step):
        piece = x.narrow(dim, begin, min(step, x.shape[dim] - begin))
        yield from _copies(piece, axis, start + begin if dim == axis else start)
