"""Statistics of the activations of each unit, on a GPU.

    activation_stats  float64 [9, C]  n, sum h, sum |h|, sum h^2, min h, max h, #(h == 0), #flat,
                                      #nonfinite

h = f(z) is made in registers from z, in float32. The network rounds h to the dtype of z: so are min
and max here, and h counts as 0 where that makes it 0; sums are of h before. A position is flat
where |f'(z)| <= 0.01, decided on z by comparisons with the ends of intervals. Where z or h is NaN
or infinite, the position counts in the last row alone.

Stage one reads z once, in tiles of units times positions, and writes float32 partial sums [9,
splits, C]; stage two folds them in float64 into the table. A square above 3e38 counts as infinite.
"""

import torch
from torch import Tensor

from fastplastic.kernels.activations import parse_activation
from fastplastic.kernels.gpu.fold import fold
from fastplastic.kernels.gpu.functions import flat_ends
from fastplastic.kernels.gpu.runtime import launching, scratch
from fastplastic.kernels.gpu.tiles import tiles
from fastplastic.kernels.gpu.unit_sums import unit_kernel
from fastplastic.kernels.reference import activation_stats as reference
from fastplastic.kernels.tables import ACTIVATION_ROWS, MIN_ROW, activation_table, check_axis

_LEAKY_SLOPE = 0.01


def activation_stats(
    x: Tensor, unit_axis: int = 1, activation: str = "identity", *, out: Tensor | None = None
) -> Tensor:
    """Sum up the activations of each unit; see `fastplastic.kernels.activation_stats`."""
    name, slope = parse_activation(activation)
    axis = check_axis(x, unit_axis)
    if x.dtype == torch.float64:
        return reference.activation_stats(x, unit_axis, activation, out=out)
    table = activation_table(x, axis, out)
    if x.numel() == 0:
        return table
    with launching(x.device):
        plan = tiles(x, axis)
        parts = scratch(x.device, (len(ACTIVATION_ROWS), plan.grid[1], x.shape[axis]))
        unit_kernel[plan.grid](
            parts_ptr=parts,
            slope=_LEAKY_SLOPE if slope is None else slope,
            ACTIVATION=name,
            GRADIENT=False,
            **flat_ends(name),
            **plan.arguments,
        )
        fold(parts, table, MIN_ROW)
    return table
