"""Gradients under a factor on the loss, as of a GradScaler."""

from torch import Tensor

from fastplastic.stats import STATISTICS

_ROW = {name: row for row, name in enumerate(STATISTICS)}
_NONFINITE_GRADIENTS = [
    _ROW[name] for name in ("n_nonfinite_g", "n_nonfinite_dw", "n_nonfinite_dw_out")
]
_GRADIENT_COUNTS = [_ROW[name] for name in ("n_g", "n_dw", "n_dw_out")]
# How each sum of gradients grows with the scale of the loss.
_POWER_OF_SCALE = {
    "sum_abs_g": 1, "sum_sq_g": 2, "sum_abs_dw": 1, "sum_sq_dw": 2, "sum_abs_w_dw": 1,
    "sum_w_out_dw_out": 1,
}  # fmt: skip


def nonfinite_gradients(table: Tensor) -> float:
    """Return how many gradients of a statistics table are not finite."""
    return float(table[_NONFINITE_GRADIENTS].sum())


def unscaled(table: Tensor, factor: float, drop: bool) -> Tensor:
    """Return a statistics table, changed in place, without the factor on its gradients.

    Args:
        table: float64 [statistics, units].
        factor: The factor on the loss.
        drop: Whether to leave no gradients at all.
    """
    for name, power in _POWER_OF_SCALE.items():
        table[_ROW[name]] /= factor**power
    if drop:
        rows = [*_NONFINITE_GRADIENTS, *_GRADIENT_COUNTS]
        rows += [_ROW[name] for name in _POWER_OF_SCALE]
        table[rows] = 0
    return table
