"""Statistics of the gradients to the activations of each unit, on a GPU.

    gradient_stats  float64 [4, C]  n, sum |g|, sum g^2, #nonfinite

NaN and infinite gradients count in the last row alone. Stage one reads g once, in tiles of units
times positions, and writes float32 partial sums [4, splits, C]; stage two folds them in float64
into the table. A square above 3e38 counts as infinite.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastplastic.kernels.gpu.unit_launch import UnitRead, add_unit_sums, maskable_of
from fastplastic.kernels.reference import gradient_stats as reference
from fastplastic.kernels.tables import GRADIENT_ROWS, check_axis, check_columns, gradient_table


def gradient_stats(g: Tensor, unit_axis: int = 1, *, out: Tensor | None = None) -> Tensor:
    """Sum up the gradients to the activations of each unit.

    See `fastplastic.kernels.gradient_stats`.
    """
    axis = check_axis(g, unit_axis)
    if g.dtype == torch.float64:
        return reference.gradient_stats(g, unit_axis, out=out)
    table = gradient_table(g, axis, out)
    if g.numel():
        add_unit_sums([UnitRead(g, axis, "", 0)], table)
    return table


def foreach_gradient_stats(
    gs: Sequence[Tensor],
    unit_axes: Sequence[int],
    columns: Sequence[int],
    *,
    out: Tensor,
    masks: Sequence[Tensor | None] | None = None,
) -> None:
    """Sum up the gradients of many tensors; see `fastplastic.kernels.foreach_gradient_stats`."""
    reads = []
    for tensor, dim, column, by in check_columns(
        gs, unit_axes, columns, masks, len(GRADIENT_ROWS), out
    ):
        g, axis, mask = maskable_of(tensor, dim, by)
        if g.dtype == torch.float64:
            reference.gradient_stats(g, axis, out=out[:, column : column + g.shape[axis]])
        elif g.numel():
            reads.append(UnitRead(g, axis, "", column, mask))
    if reads:
        add_unit_sums(reads, out)
