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

from collections.abc import Sequence

import torch
from torch import Tensor

from fastplastic.kernels.activations import parse_activation
from fastplastic.kernels.gpu.unit_launch import UnitRead, add_unit_sums, maskable_of
from fastplastic.kernels.reference import activation_stats as reference
from fastplastic.kernels.tables import (
    ACTIVATION_ROWS,
    MIN_ROW,
    activation_table,
    check_axis,
    check_columns,
)


def activation_stats(
    x: Tensor, unit_axis: int = 1, activation: str = "identity", *, out: Tensor | None = None
) -> Tensor:
    """Sum up the activations of each unit; see `fastplastic.kernels.activation_stats`."""
    parse_activation(activation)
    axis = check_axis(x, unit_axis)
    if x.dtype == torch.float64:
        return reference.activation_stats(x, unit_axis, activation, out=out)
    table = activation_table(x, axis, out)
    if x.numel():
        add_unit_sums([UnitRead(x, axis, activation, 0)], table, MIN_ROW)
    return table


def foreach_activation_stats(
    xs: Sequence[Tensor],
    unit_axes: Sequence[int],
    activations: Sequence[str],
    columns: Sequence[int],
    *,
    out: Tensor,
    masks: Sequence[Tensor | None] | None = None,
) -> None:
    """Sum up the activations of many tensors.

    See `fastplastic.kernels.foreach_activation_stats`.
    """
    given = check_columns(xs, unit_axes, columns, masks, len(ACTIVATION_ROWS), out)
    reads = []
    for (tensor, dim, column, by), activation in zip(given, activations, strict=True):
        parse_activation(activation)
        x, axis, mask = maskable_of(tensor, dim, by)
        if x.dtype == torch.float64:
            part = out[:, column : column + x.shape[axis]]
            reference.activation_stats(x, axis, activation, out=part)
        elif x.numel():
            reads.append(UnitRead(x, axis, activation, column, mask))
    if reads:
        add_unit_sums(reads, out, MIN_ROW)
