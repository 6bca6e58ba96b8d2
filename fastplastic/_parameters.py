"""The rows of the statistics table that come from weights and their gradients."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fastplastic.kernels import PARAMETER_ROWS, parameter_stats
from fastplastic.stats import COLUMN_STATISTICS, MAX_ROW, MIN_ROW, ROW_STATISTICS, STATISTICS
from fastplastic.wiring import UnitGraph, UnitLayer

_FIRST_ROW = STATISTICS.index(ROW_STATISTICS[0])
_FIRST_COLUMN = STATISTICS.index(COLUMN_STATISTICS[0])


def _rows_of(*names: str) -> Tensor:
    return torch.tensor([PARAMETER_ROWS.index(name) for name in names])


# Which of the kernel's rows make ROW_STATISTICS (incoming) and COLUMN_STATISTICS (outgoing).
_INCOMING = _rows_of(
    "n", "sum_abs_w", "sum_sq_w", "n_dw", "sum_abs_dw", "sum_sq_dw", "sum_abs_w_dw",
    "n_nonfinite_dw",
)  # fmt: skip
_OUTGOING = _rows_of("n", "sum_abs_w", "sum_sq_w", "n_dw", "sum_w_dw", "n_nonfinite_dw")


@dataclass(frozen=True, eq=False)
class Part:
    """Sums to be added to the table.

    Attributes:
        row: First row of the table.
        columns: int64, the column of the table for each column of `sums`; repeats add up.
        sums: float64 [rows, columns].
    """

    row: int
    columns: Tensor
    sums: Tensor


def add_part(table: Tensor, row: int, columns: Tensor, sums: Tensor) -> None:
    """Add sums to the columns of the table from `row` on; minima and maxima are compared."""
    for offset, values in enumerate(sums):
        target = table[row + offset]
        if row + offset == MIN_ROW:
            target.scatter_reduce_(0, columns, values, "amin")
        elif row + offset == MAX_ROW:
            target.scatter_reduce_(0, columns, values, "amax")
        else:
            target.index_add_(0, columns, values)


@dataclass
class _Reading:
    """What one weight tells: units through `dim`, or through the columns of its readers."""

    incoming: list[tuple[int, Tensor]] = field(default_factory=list)
    # (column dimension, number of columns): several layers may be read through the same columns.
    outgoing: dict[tuple[int, int], list[Tensor]] = field(default_factory=dict)


class WeightReader:
    """Reads every weight of a graph with its gradient, by name of the weight.

    Args:
        graph: The wiring.
        starts: {layer name: first column of the table}.
    """

    def __init__(self, graph: UnitGraph, starts: Mapping[str, int]) -> None:
        self._readings: dict[str, _Reading] = {}
        for layer in graph.layers:
            self._plan(layer, starts[layer.name])

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the weights."""
        return tuple(self._readings)

    def read(self, name: str, weight: Tensor, gradient: Tensor | None) -> Iterator[Part]:
        """Yield the sums over one weight, for the units it makes and the units it reads."""
        reading = self._readings[name]
        for dim, columns in reading.incoming:
            sums = _stats(weight, gradient, dim, columns.numel())
            yield Part(_FIRST_ROW, columns, sums[_INCOMING.to(sums.device)])
        for (dim, size), targets in reading.outgoing.items():
            sums = _stats(weight, gradient, dim, size)[_OUTGOING.to(weight.device)]
            for columns in targets:
                known = columns >= 0
                yield Part(_FIRST_COLUMN, columns[known], sums[:, known.to(sums.device)])

    def add_all(
        self,
        table: Tensor,
        model: nn.Module,
        gradients: Mapping[str, Tensor],
        done: Collection[str] = (),
    ) -> None:
        """Add the sums over all weights of a model, except those `done`, to a table on the CPU."""
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for name in self._readings:
            # A weight that is computed from other parameters is not among them.
            if name in parameters and name not in done:
                for part in self.read(name, parameters[name].detach(), gradients.get(name)):
                    add_part(table, part.row, part.columns, part.sums.cpu())

    def _plan(self, layer: UnitLayer, start: int) -> None:
        units = torch.arange(start, start + layer.n_units)
        self._readings.setdefault(layer.weight, _Reading()).incoming.append((layer.unit_dim, units))
        for consumer in layer.consumers:
            unit = consumer.unit_of_column
            columns = torch.where(unit >= 0, unit + start, -1)
            reading = self._readings.setdefault(consumer.weight, _Reading())
            reading.outgoing.setdefault((consumer.column_dim, unit.numel()), []).append(columns)


def _stats(weight: Tensor, gradient: Tensor | None, dim: int, size: int) -> Tensor:
    """Return [9, size] for the `size` units or columns that run along `dim`."""
    if weight.shape[dim] == size:
        return parameter_stats(weight, gradient, dim)
    spread = None if gradient is None else _ungrouped(gradient, dim, size)
    return parameter_stats(_ungrouped(weight, dim, size), spread, 1)


def _ungrouped(weight: Tensor, dim: int, size: int) -> Tensor:
    """Return the weight of a grouped convolution with its columns, of all groups, as dimension 1.

    Group k has its own range of the other dimension, and index c of `dim` there is column
    k * (columns per group) + c.
    """
    groups = size // weight.shape[dim]
    rows_first = weight.transpose(0, 1) if dim == 0 else weight
    rows, columns, *kernel = rows_first.shape
    by_group = rows_first.reshape(groups, rows // groups, columns, *kernel)
    return by_group.transpose(0, 1).reshape(rows // groups, size, *kernel)
