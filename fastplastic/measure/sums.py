"""The sums of a model's units on one device, before they are mapped to the statistics table."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from fastplastic.kernels import ACTIVATION_ROWS, GRADIENT_ROWS, parameter_stats
from fastplastic.measure.operators import MASKED, MODES
from fastplastic.measure.parameters import WeightPiece, WeightReader
from fastplastic.measure.scale import ScaledSums
from fastplastic.measure.slots import SlotMap, TensorReads
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
class DeviceSums:
    """Tables that kernels add to: they stay where they are from the first step to the last.

    Attributes:
        activations: float64 [ACTIVATION_ROWS, slots].
        gradients: float64 [GRADIENT_ROWS, slots].
        parameters: float64 [PARAMETER_ROWS, slots] and [PARAMETER_COLUMNS, slots].
        weights: What is read of each weight.
        calls: int64, the calls of the model that compiled code counts, as `add_call` does.
        scaled: The sums of steps that ended, without the factor on their loss; None for no factor.
    """

    activations: Tensor
    gradients: Tensor
    parameters: tuple[Tensor, Tensor]
    weights: WeightReader
    calls: Tensor
    scaled: ScaledSums | None = None
    # Views of the tables, made once: in a step, where caches are cold, each takes 30 us.
    _activation_views: dict[int, Tensor] = field(default_factory=dict)
    _gradient_views: dict[int, Tensor] = field(default_factory=dict)
    _weight_views: dict[str, list[tuple[WeightPiece, tuple[Tensor, Tensor]]]] = field(
        default_factory=dict
    )

    @classmethod
    def empty(
        cls, reads: TensorReads, weights: WeightReader, device: torch.device, *, scaled: bool
    ) -> "DeviceSums":
        """Return the sums of nothing seen, to be told of the factor on the loss or not."""
        gradients = _table(len(GRADIENT_ROWS), reads.gradients, device)
        parameters = weights.new_tables(device)
        sums = cls(
            _table(len(ACTIVATION_ROWS), reads.activations, device),
            gradients,
            parameters,
            weights,
            torch.empty(3 + len(MODES), dtype=torch.int64, device=device),
            ScaledSums((gradients, *parameters)) if scaled else None,
        )
        sums.clear()
        return sums

    def clear(self) -> None:
        """Forget everything, in place."""
        for table in (self.activations, self.gradients, *self.parameters, self.calls):
            table.zero_()
        self.activations[MIN_ROW].fill_(torch.inf)
        self.activations[MIN_ROW + 1].fill_(-torch.inf)
        if self.scaled is not None:
            self.scaled.clear()

    def note_padding(self, mask: Tensor) -> None:
        """Count a call among those with padding if it has any; the host does not wait.

        Args:
            mask: [batch, tokens], 0 where a token is padding.
        """
        self.calls[MASKED] += (mask == 0).any()

    def of_activations(self, slot: int, size: int) -> Tensor:
        """Return the columns of the activations from a slot on, of one read always as many."""
        view = self._activation_views.get(slot)
        if view is None:
            view = self._activation_views[slot] = self.activations[:, slot : slot + size]
        return view

    def of_gradients(self, slot: int, size: int) -> Tensor:
        """Return the columns of the gradients from a slot on, of one read always as many."""
        view = self._gradient_views.get(slot)
        if view is None:
            view = self._gradient_views[slot] = self.gradients[:, slot : slot + size]
        return view

    def add_weight(self, name: str, weight: Tensor, gradient: Tensor) -> None:
        """Add the sums over one weight and its gradient."""
        views = self._weight_views.get(name)
        if views is None:
            pieces = self.weights.pieces[name]
            views = [(piece, piece.of(self.parameters)) for piece in pieces]
            self._weight_views[name] = views
        for piece, out in views:
            given = [piece.view(weight)], [piece.view(gradient)]
            parameter_stats(*given, [piece.groups], out=out)

    def fold_into(self, table: Tensor, copies: Tensor, reads: TensorReads) -> None:
        """Add all sums to statistics tables on the CPU, float64 [statistics, units].

        Under a factor on the loss, those of gradients are of the steps that ended.

        Args:
            table: For all but what follows.
            copies: For the sums over weights that each process reads, though all have the same.
            reads: What is read of tensors.
        """
        gradients, rows, columns = self.gradients, *self.parameters
        if self.scaled is not None:
            gradients, rows, columns = self.scaled.total
        _fold(table, ACTIVATION_STATISTICS, reads.activations, self.activations)
        _fold(table, GRADIENT_STATISTICS, reads.gradients, gradients)
        fold_weights(table, copies, self.weights, (rows, columns))


def fold_weights(
    table: Tensor, copies: Tensor, weights: WeightReader, sums: tuple[Tensor, Tensor]
) -> None:
    """Add the sums over weights to statistics tables on the CPU, as `DeviceSums.fold_into`."""
    if weights.copies:
        own, sums = weights.split(sums)
        _fold(copies, ROW_STATISTICS, weights.rows, own[0])
        _fold(copies, COLUMN_STATISTICS, weights.columns, own[1])
    _fold(table, ROW_STATISTICS, weights.rows, sums[0])
    _fold(table, COLUMN_STATISTICS, weights.columns, sums[1])


def add_weights(
    table: Tensor,
    copies: Tensor,
    reader: WeightReader,
    weights: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
) -> None:
    """Add weights as they are now, by their names, to tables as `DeviceSums.fold_into` does."""
    with reading():
        for device in {weight.device for weight in weights.values()}:
            here = {name: weight for name, weight in weights.items() if weight.device == device}
            sums = reader.new_tables(device)
            reader.add(sums, here, gradients)
            fold_weights(table, copies, reader, sums)


@contextmanager
def reading() -> Iterator[None]:
    """Compute without a graph, on tensors that can be written to later."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def _table(rows: int, slots: SlotMap, device: torch.device) -> Tensor:
    return torch.empty(rows, slots.size, dtype=torch.float64, device=device)


def _fold(table: Tensor, names: tuple[str, ...], slots: SlotMap, sums: Tensor) -> None:
    """Add the rows of `sums` to the rows of the table with these names; compare min and max."""
    first = STATISTICS.index(names[0])
    columns, values = slots.counted(first, sums.cpu())
    compared = [row for row in (MIN_ROW, MAX_ROW) if first <= row < first + len(names)]
    for row in compared:
        how = "amin" if row == MIN_ROW else "amax"
        table[row].scatter_reduce_(0, columns, values[row - first], how)
    bounds = [first - 1, *compared, first + len(names)]
    for before, end in pairwise(bounds):
        added = slice(before + 1, end)
        table[added].index_add_(1, columns, values[added.start - first : added.stop - first])
