"""The tables of statistics that every backend fills: names of rows, and checks of arguments.

"n..." counts, "sum_..." adds up, "abs" and "sq" are of size and square.

    ACTIVATION_ROWS     n finite positions, sum_h, sum_abs_h, sum_sq_h, min_h, max_h, n_zero where h
                        is 0, n_flat where abs(f'(z)) <= 0.01, n_nonfinite_h where z or h is not
    GRADIENT_ROWS       n_g finite gradients, sum_abs_g, sum_sq_g, n_nonfinite_g
    PARAMETER_ROWS      n weights in the row, sum_abs_w, sum_sq_w, n_dw finite gradients,
                        sum_abs_dw, sum_sq_dw, sum_abs_w_dw of abs(w dw), n_nonfinite_dw
    PARAMETER_COLUMNS   the same of columns, but sum_w_dw with signs: over the columns that read a
                        unit that is its first-order saliency, the sum of h dL/dh
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

ACTIVATION_ROWS = (
    "n", "sum_h", "sum_abs_h", "sum_sq_h", "min_h", "max_h", "n_zero", "n_flat", "n_nonfinite_h",
)  # fmt: skip
MIN_ROW = ACTIVATION_ROWS.index("min_h")
GRADIENT_ROWS = ("n_g", "sum_abs_g", "sum_sq_g", "n_nonfinite_g")
PARAMETER_ROWS = (
    "n", "sum_abs_w", "sum_sq_w", "n_dw", "sum_abs_dw", "sum_sq_dw", "sum_abs_w_dw",
    "n_nonfinite_dw",
)  # fmt: skip
PARAMETER_COLUMNS = ("n", "sum_abs_w", "sum_sq_w", "n_dw", "sum_w_dw", "n_nonfinite_dw")


def check_axis(x: Tensor, axis: int) -> int:
    """Return the axis as a dimension from 0 on.

    Raises:
        ValueError: `x` has no such axis or is not floating point.
    """
    if not x.is_floating_point():
        raise ValueError(f"the tensor is {x.dtype}, expected a floating-point dtype")
    if not -x.ndim <= axis < x.ndim:
        raise ValueError(f"axis is {axis}, expected a dimension of a tensor {tuple(x.shape)}")
    return axis % x.ndim


def check_columns(
    xs: Sequence[Tensor],
    unit_axes: Sequence[int],
    columns: Sequence[int],
    masks: Sequence[Tensor | None] | None,
    rows: int,
    out: Tensor,
) -> Iterator[tuple[Tensor, int, int, Tensor | None]]:
    """Return each tensor with its axis as a dimension from 0 on, its column and its mask.

    Raises:
        ValueError: There are more of one than of another, a tensor has no such axis or is not
            floating point, `out` is no table of so many rows, units are not within its columns, or
            a mask does not fit.
    """
    masks = [None] * len(xs) if masks is None else masks
    if not len(xs) == len(unit_axes) == len(columns) == len(masks):
        raise ValueError(
            f"there are {len(xs)} tensors, {len(unit_axes)} axes, {len(columns)} columns and "
            f"{len(masks)} masks, expected as many of each"
        )
    _checked(out, rows, out.shape[-1], out.device)
    axes = [check_axis(x, axis) for x, axis in zip(xs, unit_axes, strict=True)]
    for x, axis, column, mask in zip(xs, axes, columns, masks, strict=True):
        units = x.shape[axis]
        if not 0 <= column <= out.shape[1] - units:
            raise ValueError(
                f"{units} units go to column {column} of {out.shape[1]}, expected columns that "
                "there are"
            )
        if mask is not None and (mask.dtype != torch.bool or mask.numel() * units != x.numel()):
            raise ValueError(
                f"a mask is {mask.dtype} {tuple(mask.shape)}, expected torch.bool with "
                f"{x.numel() // max(units, 1)} positions"
            )
    return zip(xs, axes, columns, masks, strict=True)


def counted(x: Tensor, axis: int, mask: Tensor) -> Tensor:
    """Return the positions of a tensor that count by a mask, as [positions, units]."""
    chosen: Tensor = x.movedim(axis, -1).reshape(-1, x.shape[axis])[mask.flatten()]
    return chosen


def activation_table(x: Tensor, axis: int, out: Tensor | None) -> Tensor:
    """Return `out`, checked, or a fresh table for the activations x; ValueError if unfit."""
    if out is not None:
        return _checked(out, len(ACTIVATION_ROWS), x.shape[axis], x.device)
    table = _fresh(len(ACTIVATION_ROWS), x.shape[axis], x.device)
    table[MIN_ROW].fill_(math.inf)
    table[MIN_ROW + 1].fill_(-math.inf)
    return table


def gradient_table(g: Tensor, axis: int, out: Tensor | None) -> Tensor:
    """Return `out`, checked, or a fresh table for the gradients g; ValueError if unfit."""
    if out is not None:
        return _checked(out, len(GRADIENT_ROWS), g.shape[axis], g.device)
    return _fresh(len(GRADIENT_ROWS), g.shape[axis], g.device)


def parameter_tables(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    groups: Sequence[int] | None,
    out: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """Check the arguments of parameter_stats; return `out` or fresh tables (rows, columns)."""
    groups = (1,) * len(weights) if groups is None else groups
    if not len(weights) == len(gradients) == len(groups):
        raise ValueError(
            f"there are {len(weights)} weights, {len(gradients)} gradients and {len(groups)} "
            "groups, expected as many of each"
        )
    for weight, gradient, parts in zip(weights, gradients, groups, strict=True):
        _check_parameter(weight, gradient, parts)
    rows = sum(weight.shape[0] for weight in weights)
    columns = sum(n * weight.shape[1] for weight, n in zip(weights, groups, strict=True))
    device = weights[0].device if weights else torch.device("cpu")
    sizes = ((len(PARAMETER_ROWS), rows), (len(PARAMETER_COLUMNS), columns))
    if out is None:
        return _fresh(*sizes[0], device), _fresh(*sizes[1], device)
    return _checked(out[0], *sizes[0], device), _checked(out[1], *sizes[1], device)


def _check_parameter(weight: Tensor, gradient: Tensor | None, groups: int) -> None:
    check_axis(weight, 0)
    if weight.ndim < 2 or groups < 1 or weight.shape[0] % groups:
        raise ValueError(
            f"a weight has shape {tuple(weight.shape)} and {groups} groups, expected two "
            "dimensions or more, the first a multiple of the groups"
        )
    if gradient is not None and gradient.shape != weight.shape:
        raise ValueError(
            f"gradient has shape {tuple(gradient.shape)}, expected that of the weight, "
            f"{tuple(weight.shape)}"
        )


def _fresh(rows: int, units: int, device: torch.device) -> Tensor:
    return torch.zeros(rows, units, dtype=torch.float64, device=device)


def _checked(out: Tensor, rows: int, units: int, device: torch.device) -> Tensor:
    adjacent = units < 2 or out.stride(-1) == 1
    if out.dtype != torch.float64 or out.shape != (rows, units) or not adjacent:
        raise ValueError(
            f"out is {out.dtype} {tuple(out.shape)} with strides {out.stride()}, expected float64 "
            f"({rows}, {units}) with adjacent columns"
        )
    if out.device != device:
        raise ValueError(f"out is on {out.device}, expected the device of the tensor, {device}")
    return out
