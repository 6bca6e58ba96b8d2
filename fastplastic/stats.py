"""The additive table of per-unit statistics: one row per statistic, one column per unit."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

# From activations (kernels.activation_stats), in the order of its output rows.
ACTIVATION_STATISTICS = (
    "n", "sum_h", "sum_abs_h", "sum_sq_h", "min_h", "max_h", "n_zero", "n_flat", "n_nonfinite_h",
)  # fmt: skip
# From gradients of the activations (kernels.gradient_stats).
GRADIENT_STATISTICS = ("n_g", "sum_abs_g", "sum_sq_g", "n_nonfinite_g")
# From parameters (kernels.parameter_stats), over the incoming row of the unit ...
ROW_STATISTICS = (
    "n_in", "sum_abs_w", "sum_sq_w", "n_dw", "sum_abs_dw", "sum_sq_dw", "sum_abs_w_dw",
    "n_nonfinite_dw",
)  # fmt: skip
# ... and over its outgoing columns.
COLUMN_STATISTICS = (
    "n_out", "sum_abs_w_out", "sum_sq_w_out", "n_dw_out", "sum_w_out_dw_out", "n_nonfinite_dw_out",
)  # fmt: skip
STATISTICS = ACTIVATION_STATISTICS + GRADIENT_STATISTICS + ROW_STATISTICS + COLUMN_STATISTICS

_ROW = {name: row for row, name in enumerate(STATISTICS)}
MIN_ROW = _ROW["min_h"]
MAX_ROW = _ROW["max_h"]


def empty_table(n_units: int, device: torch.device | None = None) -> Tensor:
    """Return float64 [statistics, n_units] of nothing seen: 0, except min +inf and max -inf."""
    table = torch.zeros(len(STATISTICS), n_units, dtype=torch.float64, device=device)
    table[MIN_ROW].fill_(torch.inf)
    table[MAX_ROW].fill_(-torch.inf)
    return table


def merge_into(table: Tensor, other: Tensor) -> None:
    """Add `other` to `table` in place: sums are added, minima and maxima compared."""
    low = torch.minimum(table[MIN_ROW], other[MIN_ROW])
    high = torch.maximum(table[MAX_ROW], other[MAX_ROW])
    table += other
    table[MIN_ROW] = low
    table[MAX_ROW] = high


@dataclass(frozen=True, eq=False)
class LayerStats:
    """The statistics of one layer; means are per unit, NaN where nothing was counted.

    Attributes:
        table: float64 [statistics, n_units], rows as in `STATISTICS`.
    """

    table: Tensor

    def __getitem__(self, name: str) -> Tensor:
        """Return one statistic, float64 [n_units]; KeyError when there is none of this name."""
        return self.table[_ROW[name]]

    @property
    def n_units(self) -> int:
        """Number of units."""
        return self.table.shape[1]

    @property
    def has_gradients(self) -> bool:
        """Whether a gradient other than 0 reached the incoming weights."""
        return bool((self["sum_abs_dw"] > 0).any())

    @property
    def mean_abs_h(self) -> Tensor:
        """Mean abs(h)."""
        return self._mean("sum_abs_h", "n")

    @property
    def mean_h(self) -> Tensor:
        """Mean h."""
        return self._mean("sum_h", "n")

    @property
    def mean_sq_h(self) -> Tensor:
        """Mean h^2."""
        return self._mean("sum_sq_h", "n")

    @property
    def std_h(self) -> Tensor:
        """Standard deviation of h over all positions (not corrected for sample size)."""
        # Rounding can leave a constant unit with a tiny negative variance.
        return (self.mean_sq_h - self.mean_h**2).clamp(min=0).sqrt()

    @property
    def range_h(self) -> Tensor:
        """Maximum minus minimum of h; NaN where fewer than two positions were seen."""
        return (self["max_h"] - self["min_h"]).where(self["n"] > 1, torch.nan)

    @property
    def flat_share(self) -> Tensor:
        """Share of positions with abs(f'(z)) <= 0.01, in [0, 1]."""
        return self._mean("n_flat", "n")

    @property
    def mean_abs_g(self) -> Tensor:
        """Mean abs(dL/dh); NaN for a layer where it is 0 everywhere."""
        return _unless_all_zero(self._mean("sum_abs_g", "n_g"))

    @property
    def mean_abs_dw(self) -> Tensor:
        """Mean abs(dL/dw) of the incoming weights; NaN for a layer where it is 0 everywhere."""
        return _unless_all_zero(self._mean("sum_abs_dw", "n_dw"))

    @property
    def mean_abs_w(self) -> Tensor:
        """Mean abs(w) of the incoming weights."""
        return self._mean("sum_abs_w", "n_in")

    @property
    def mean_abs_w_out(self) -> Tensor:
        """Mean abs(w) of the outgoing weights."""
        return self._mean("sum_abs_w_out", "n_out")

    @property
    def first_order(self) -> Tensor:
        """abs(sum of h dL/dh) = abs(sum of w_out dw_out); NaN for a layer where all are 0."""
        seen = self["n_dw_out"] > 0
        return _unless_all_zero(self["sum_w_out_dw_out"].abs().where(seen, torch.nan))

    def _mean(self, total: str, count: str) -> Tensor:
        # 0 / 0 is NaN: nothing was counted.
        return self[total] / self[count]


def _unless_all_zero(values: Tensor) -> Tensor:
    """Gradients that are 0 in a whole layer say nothing about its units: return NaN then."""
    return values if bool((values.abs() > 0).any()) else torch.full_like(values, torch.nan)


@dataclass(frozen=True, eq=False)
class UnitStats:
    """The statistics of all layers in one table.

    Attributes:
        table: float64 [statistics, units] on the CPU, rows as in `STATISTICS`.
        columns: {layer name: its columns}.
    """

    table: Tensor
    columns: Mapping[str, slice]

    def __getitem__(self, name: str) -> LayerStats:
        """Return the statistics of one layer; KeyError when there is none of this name."""
        return LayerStats(self.table[:, self.columns[name]])


def columns_of(sizes: Mapping[str, int]) -> dict[str, slice]:
    """Return which columns of the table belong to each layer.

    Args:
        sizes: {layer name: number of its units}, in the order of the table.
    """
    stops = accumulate(sizes.values())
    return {
        name: slice(stop - size, stop)
        for (name, size), stop in zip(sizes.items(), stops, strict=True)
    }
