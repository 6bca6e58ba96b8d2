"""The statistics of weights and their gradients in plain PyTorch, accumulated in float64.

rows     [8, sum D0]           n, sum |w|, sum w^2, n_dw, sum |dw|, sum dw^2, sum |w dw|, #bad
columns  [6, sum groups * D1]  n, sum |w|, sum w^2, n_dw, sum w dw, #bad
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastplastic.kernels.reference.pieces import count, count_not, finite_float64, pieces, total
from fastplastic.kernels.tables import PARAMETER_COLUMNS, PARAMETER_ROWS, parameter_tables

# Sums along one dimension of a weight; each direction keeps some of them.
_SUMS = (
    "n", "sum_abs_w", "sum_sq_w", "n_dw", "sum_abs_dw", "sum_sq_dw", "sum_abs_w_dw", "sum_w_dw",
    "n_nonfinite_dw",
)  # fmt: skip
_OF_ROWS = [_SUMS.index(name) for name in PARAMETER_ROWS]
_OF_COLUMNS = [_SUMS.index(name) for name in PARAMETER_COLUMNS]


def parameter_stats(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    groups: Sequence[int] | None = None,
    *,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum up every weight and its gradient, along rows (dimension 0) and columns (dimension 1).

    See `fastplastic.kernels.parameter_stats`.
    """
    table = parameter_tables(weights, gradients, groups, out)
    row = column = 0
    for weight, gradient, parts in zip(
        weights, gradients, groups or [1] * len(weights), strict=True
    ):
        stats = _one_dimension(weight, gradient, 0)
        table[0][:, row : row + weight.shape[0]] += stats[_OF_ROWS]
        row += weight.shape[0]
        size = weight.shape[0] // parts
        for group in range(parts):
            rows = slice(group * size, (group + 1) * size)
            along = _one_dimension(weight[rows], None if gradient is None else gradient[rows], 1)
            table[1][:, column : column + weight.shape[1]] += along[_OF_COLUMNS]
            column += weight.shape[1]
    return table


def _one_dimension(weight: Tensor, gradient: Tensor | None, dim: int) -> Tensor:
    """Return float64 [9, D], rows as in `_SUMS`, for each index along one dimension."""
    tensors = (weight,) if gradient is None else (weight, gradient)
    stats = weight.new_zeros(len(_SUMS), weight.shape[dim], dtype=torch.float64)
    for start, own in pieces(tensors, dim):
        part = stats[:, start : start + own[0].shape[1]]
        w = own[0].double()
        part[:3] += torch.stack([count(w, None), total(w.abs()), total(w * w)])
        if gradient is not None:
            part[3:] += _parameter_gradient_piece(w, own[1])
    return stats


def _parameter_gradient_piece(w: Tensor, gradient: Tensor) -> Tensor:
    """Return the last six rows of `_SUMS` for one piece [A, D, B]."""
    dw, finite = finite_float64(gradient, gradient)
    product = w * dw if finite is None else (w * dw).where(finite, 0)
    return torch.stack(
        [
            count(dw, finite),
            total(dw.abs()),
            total(dw * dw),
            total(product.abs()),
            total(product),
            count_not(dw, finite),
        ]
    )
