"""The statistics of gradients to activations in plain PyTorch, accumulated in float64.

[4, C]  n, sum |g|, sum g^2, #nonfinite
"""

import torch
from torch import Tensor

from fastplastic.kernels.reference.pieces import count, count_not, finite_float64, pieces, total
from fastplastic.kernels.tables import check_axis, gradient_table


def gradient_stats(g: Tensor, unit_axis: int = 1, *, out: Tensor | None = None) -> Tensor:
    """Sum up the gradients to the activations of each unit.

    See `fastplastic.kernels.gradient_stats`.
    """
    axis = check_axis(g, unit_axis)
    stats = gradient_table(g, axis, out)
    for start, (piece,) in pieces((g,), axis):
        wide, finite = finite_float64(piece, piece)
        stats[:, start : start + piece.shape[1]] += torch.stack(
            [count(piece, finite), total(wide.abs()), total(wide * wide), count_not(wide, finite)]
        )
    return stats
