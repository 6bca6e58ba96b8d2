"""The statistics of activations in plain PyTorch, accumulated in float64.

    [9, C]  n, sum h, sum |h|, sum h^2, min h, max h, #(h == 0), #flat, #nonfinite

h = f(z) is evaluated in the dtype of z by torch's own function, because only that gives the zeros
that the network itself sees: GELU in float32 is exactly -0.0 below about -6, in float64 it is not.
Everything after that is float64. A position is flat where |f'(z)| <= 0.01, decided on the exact
value of z by the intervals of `ACTIVATIONS`.
"""

import math

import torch
from torch import Tensor

from fastplastic.kernels.activations import ACTIVATIONS, activate, parse_activation
from fastplastic.kernels.reference.pieces import count, count_not, finite_float64, pieces, total
from fastplastic.kernels.tables import activation_table, check_axis


def activation_stats(
    x: Tensor, unit_axis: int = 1, activation: str = "identity", *, out: Tensor | None = None
) -> Tensor:
    """Sum up the activations of each unit; see `fastplastic.kernels.activation_stats`."""
    parse_activation(activation)
    axis = check_axis(x, unit_axis)
    stats = activation_table(x, axis, out)
    for start, (piece,) in pieces((x,), axis):
        part = _activation_piece(piece, activation)
        part_of = stats[:, start : start + piece.shape[1]]
        lowest = torch.minimum(part_of[4], part[4])
        highest = torch.maximum(part_of[5], part[5])
        part_of += part
        part_of[4] = lowest
        part_of[5] = highest
    return stats


def _activation_piece(z: Tensor, activation: str) -> Tensor:
    """Return [9, C] of one piece [A, C, B]."""
    h = activate(z, activation)
    wide, finite = finite_float64(h, z)
    low, high = (
        (wide, wide) if finite is None else (wide.where(finite, v) for v in (math.inf, -math.inf))
    )
    return torch.stack(
        [
            count(z, finite),
            total(wide),
            total(wide.abs()),
            total(wide * wide),
            low.amin((0, 2)),
            high.amax((0, 2)),
            _count_zero(h, finite),
            _count_flat(z, parse_activation(activation)[0], finite),
            count_not(z, finite),
        ]
    )


def _count_zero(h: Tensor, finite: Tensor | None) -> Tensor:
    # Converting to bool is several times as fast as comparing with 0.
    other = h.bool() if finite is None else h.bool() | ~finite
    return count(h, None) - total(other)


def _count_flat(z: Tensor, name: str, finite: Tensor | None) -> Tensor:
    intervals = ACTIVATIONS[name].flat
    counts = z.new_zeros(z.shape[1], dtype=torch.float64)
    if not intervals:
        return counts
    # A NaN is in no interval. The intervals are disjoint, so their counts add up.
    wide = z.double() if finite is None else z.double().where(finite, torch.nan)
    inside = torch.empty_like(wide)
    for low, high in intervals:
        # Written as numbers, because a comparison that makes bool is several times as slow.
        if high < math.inf:
            counts += total(torch.le(wide, high, out=inside))
        else:
            counts += count(z, finite)
        if low > -math.inf:
            counts -= total(torch.lt(wide, low, out=inside))
    return counts
