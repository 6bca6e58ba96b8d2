"""The sums of a model's units on one device, before they are mapped to the statistics table."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastplastic._parameters import WeightReader
from fastplastic._readers import Readers, SlotMap
from fastplastic.kernels import ACTIVATION_ROWS, GRADIENT_ROWS
from fastplastic.stats import (
    ACTIVATION_STATISTICS,
    COLUMN_STATISTICS,
    GRADIENT_STATISTICS,
    MAX_ROW,
    MIN_ROW,
    ROW_STATISTICS,
    STATISTICS,
)


@dataclass(frozen=True, eq=False)
class Sums:
    """Tables that kernels add to: they stay where they are from the first step to the last.

    Attributes:
        activations: float64 [ACTIVATION_ROWS, slots].
        gradients: float64 [GRADIENT_ROWS, slots].
        parameters: float64 [PARAMETER_ROWS, slots] and [PARAMETER_COLUMNS, slots].
    """

    activations: Tensor
    gradients: Tensor
    parameters: tuple[Tensor, Tensor]

    @classmethod
    def empty(cls, readers: Readers, weights: WeightReader, device: torch.device) -> "Sums":
        """Return the sums of nothing seen."""
        sums = cls(
            _table(len(ACTIVATION_ROWS), readers.activations, device),
            _table(len(GRADIENT_ROWS), readers.gradients, device),
            weights.new_tables(device),
        )
        sums.clear()
        return sums

    def clear(self) -> None:
        """Forget everything, in place."""
        for table in (self.activations, self.gradients, *self.parameters):
            table.zero_()
        self.activations[MIN_ROW].fill_(torch.inf)
        self.activations[MIN_ROW + 1].fill_(-torch.inf)

    def fold_into(self, table: Tensor, readers: Readers, weights: WeightReader) -> None:
        """Add all sums to a statistics table on the CPU, float64 [statistics, units]."""
        _fold(table, ACTIVATION_STATISTICS, readers.activations, self.activations)
        _fold(table, GRADIENT_STATISTICS, readers.gradients, self.gradients)
        fold_weights(table, weights, self.parameters)


def fold_weights(table: Tensor, weights: WeightReader, sums: tuple[Tensor, Tensor]) -> None:
    """Add the sums over weights to a statistics table on the CPU."""
    _fold(table, ROW_STATISTICS, weights.rows, sums[0])
    _fold(table, COLUMN_STATISTICS, weights.columns, sums[1])


def _table(rows: int, slots: SlotMap, device: torch.device) -> Tensor:
    return torch.empty(rows, slots.size, dtype=torch.float64, device=device)


def _fold(table: Tensor, names: tuple[str, ...], slots: SlotMap, sums: Tensor) -> None:
    """Add the rows of `sums` to the rows of the table with these names; compare min and max."""
    chosen, columns = slots.pairs()
    first = STATISTICS.index(names[0])
    for row, values in enumerate(sums.cpu()[:, chosen], start=first):
        if row == MIN_ROW:
            table[row].scatter_reduce_(0, columns, values, "amin")
        elif row == MAX_ROW:
            table[row].scatter_reduce_(0, columns, values, "amax")
        else:
            table[row].index_add_(0, columns, values)
