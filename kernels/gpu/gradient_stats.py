"""Statistics of the gradients to the activations of each unit, on a GPU.

    gradient_stats  float64 [4, C]  n, sum |g|, sum g^2, #nonfinite

NaN and infinite gradients count in the last row alone. Stage one reads g once, in tiles of units
times positions, and writes float32 partial sums [4, splits, C]; stage two folds them in float64
into the table. A square above 3e38 counts as infinite.
"""

import torch
from torch import Tensor

from fastplastic.kernels.gpu.fold import fold
from fastplastic.kernels.gpu.functions import flat_ends
from fastplastic.kernels.gpu.runtime import launching, scratch
from fastplastic.kernels.gpu.tiles import tiles
from fastplastic.kernels.gpu.unit_sums import unit_kernel
from fastplastic.kernels.reference import gradient_stats as reference
from fastplastic.kernels.tables import GRADIENT_ROWS, check_axis, gradient_table


def gradient_stats(g: Tensor, unit_axis: int = 1, *, out: Tensor | None = None) -> Tensor:
    """Sum up the gradients to the activations of each unit.

    See `fastplastic.kernels.gradient_stats`.
    """
    axis = check_axis(g, unit_axis)
    if g.dtype == torch.float64:
        return reference.gradient_stats(g, unit_axis, out=out)
    table = gradient_table(g, axis, out)
    if g.numel() == 0:
        return table
    with launching(g.device):
        plan = tiles(g, axis)
        parts = scratch(g.device, (len(GRADIENT_ROWS), plan.grid[1], g.shape[axis]))
        unit_kernel[plan.grid](
            parts_ptr=parts,
            slope=0.0,
            ACTIVATION="identity",
            GRADIENT=True,
            **flat_ends("identity"),
            **plan.arguments,
        )
        fold(parts, table)
    return table
