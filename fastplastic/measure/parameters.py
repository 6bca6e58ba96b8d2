"""How the weights of a graph are read: all of them by one call of the kernel."""

from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fastplastic.kernels import PARAMETER_COLUMNS, PARAMETER_ROWS, parameter_stats
from fastplastic.measure.alike import Alike
from fastplastic.measure.slots import SlotMap
from fastplastic.model import Part, is_spread, local_of
from fastplastic.wiring import UnitGraph, UnitLayer


@dataclass(frozen=True)
class WeightPiece:
    """A weight, or a block of it, as the kernel takes it: units along dimension 0.

    Attributes:
        name: Name of the weight.
        first, size: Its range of dimension 0, of what this process has of the weight.
        transposed: Whether its units are along dimension 1.
        groups: Groups of columns.
        rows, columns: Numbers of slots, along dimension 0 and 1 of the transposed weight.
        row, column: First slots.
    """

    name: str
    first: int
    size: int
    transposed: bool
    groups: int
    rows: int
    columns: int
    row: int
    column: int

    def view(self, weight: Tensor) -> Tensor:
        """Return the block of the weight, or of its gradient, that the kernel reads."""
        if self.size < weight.shape[0]:
            weight = weight.narrow(0, self.first, self.size)
        return weight.transpose(0, 1) if self.transposed else weight

    def of(self, tables: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the parts of the tables of rows and of columns that its sums go to."""
        rows, columns = tables
        return (
            rows[:, self.row : self.row + self.rows],
            columns[:, self.column : self.column + self.columns],
        )

    def within(self, part: Part) -> Iterator["WeightPiece"]:
        """Yield what a process with a part of the weight reads of it, of whole dimensions >= 2."""
        begin, width = part.offsets[0], part.sizes[1]
        if not width:
            return
        # Rows of one group after the other: each has columns of its own.
        rows = self.size // self.groups
        for group in range(self.groups):
            first = max(self.first + group * rows, begin)
            size = min(self.first + (group + 1) * rows, begin + part.sizes[0]) - first
            if size > 0:
                yield self._block(part, group, first, size)

    def _block(self, part: Part, group: int, first: int, size: int) -> "WeightPiece":
        """Return a range of rows of a group, and the columns of a part."""
        along, across = first - self.first, part.offsets[1]
        rows, columns = size, part.sizes[1]
        if self.transposed:
            along, across, rows, columns = across, along, columns, rows
        across += group * (self.columns // self.groups)
        return replace(
            self, first=first - part.offsets[0], size=size, groups=1, rows=rows, columns=columns,
            row=self.row + along, column=self.column + across,
        )  # fmt: skip


class WeightReader:
    """Reads weights and their gradients into tables of slots.

    Args:
        graph: The wiring.
        columns: {layer name: its columns of the statistics table}.
        model: Its parameters give the shapes.
        parts: {name: what this process reads of the weight}, of those that it does not read whole;
            None for nothing.
        copies: Names of weights that each process reads, though all have the same.
        alike: Counts what all processes of a group have alike; None for no group.

    Attributes:
        names: The names of the weights.
        copies: See above.
        pieces: {name: what the kernel reads of the weight}.
        rows: Slots of the sums over incoming rows.
        columns: Slots of the sums over outgoing columns.
    """

    def __init__(
        self,
        graph: UnitGraph,
        columns: Mapping[str, slice],
        model: nn.Module,
        parts: Mapping[str, Part | None],
        copies: Iterable[str] = (),
        alike: Alike | None = None,
    ) -> None:
        self.rows, self.columns = SlotMap(alike), SlotMap(alike)
        self.pieces: dict[str, list[WeightPiece]] = {}
        named = dict(model.named_parameters(remove_duplicate=False))
        shapes = {name: parameter.shape for name, parameter in named.items()}
        # Plain ones are whole in each process of a group.
        self._same = {name for name in copies if not is_spread(named[name])}
        # A weight that is computed from other parameters is not among them.
        for name, forms in _forms(graph, shapes).items():
            if name in shapes:
                self._reserve(name, shapes[name], *forms)
        self.names = tuple(self.pieces)
        for layer in graph.layers:
            self._map(layer, columns[layer.name].start)
        self._parts = parts
        for name, part in parts.items():
            if name in self.pieces:
                whole = self.pieces[name]
                self.pieces[name] = [x for own in whole for x in own.within(part)] if part else []
        self.copies = frozenset(self.names).intersection(copies)

    def split(
        self, tables: tuple[Tensor, Tensor]
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Return tables of the sums over `copies` alone, and of those over all other weights."""
        rows, columns = tables
        copies = torch.zeros_like(rows), torch.zeros_like(columns)
        others = rows.clone(), columns.clone()
        for piece in (piece for name in self.copies for piece in self.pieces[name]):
            for own, rest in zip(piece.of(copies), piece.of(others), strict=True):
                own += rest
                rest.zero_()
        return copies, others

    def of(self, model: nn.Module, but: Container[str]) -> dict[str, Tensor]:
        """Return {name: what this process has of the weight}, but for some of the weights."""
        parameters = dict(model.named_parameters(remove_duplicate=False))
        return {name: local_of(parameters[name]) for name in self.names if name not in but}

    def add(
        self,
        tables: tuple[Tensor, Tensor],
        weights: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor],
    ) -> None:
        """Add the sums over some weights to the tables, by one call of the kernel.

        Args:
            tables: float64 [PARAMETER_ROWS, slots of rows] and [PARAMETER_COLUMNS, of columns].
            weights: {name: weight}, on the device of the tables.
            gradients: {name: gradient} of those that have one.
        """
        pieces = [piece for name in self.names if name in weights for piece in self.pieces[name]]
        if not pieces:
            return
        given = [piece.view(weights[piece.name].detach()) for piece in pieces]
        steps = [
            piece.view(gradients[piece.name]) if piece.name in gradients else None
            for piece in pieces
        ]
        groups = [piece.groups for piece in pieces]
        if not self._parts and len(weights) == len(self.names):
            parameter_stats(given, steps, groups, out=tables)
            return
        rows, columns = parameter_stats(given, steps, groups)
        tables[0][:, _slots((piece.row, piece.rows) for piece in pieces)] += rows
        tables[1][:, _slots((piece.column, piece.columns) for piece in pieces)] += columns

    def new_tables(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return tables of zeros for `add`."""
        sizes = (len(PARAMETER_ROWS), self.rows.size), (len(PARAMETER_COLUMNS), self.columns.size)
        rows, columns = (torch.zeros(size, dtype=torch.float64, device=device) for size in sizes)
        return rows, columns

    def _reserve(
        self, name: str, shape: torch.Size, transposed: bool, parts: int, groups: int
    ) -> None:
        """Make the pieces of a weight."""
        rows, columns = shape[:2]
        size = rows // parts if transposed else rows
        if transposed:
            rows, columns = columns, size
        same = name in self._same
        self.pieces[name] = [
            WeightPiece(
                name, part * size, size, transposed, groups, rows, groups * columns,
                self.rows.reserve(rows, same=same),
                self.columns.reserve(groups * columns, same=same),
            )
            for part in range(parts)
        ]  # fmt: skip

    def _map(self, layer: UnitLayer, start: int) -> None:
        """Say which units the slots of its weight and of the weights that read it belong to."""
        units = torch.arange(start, start + layer.n_units)
        for part, piece in enumerate(self.pieces.get(layer.weight, ())):
            self.rows.add(piece.row, units[part * piece.rows :][: piece.rows])
        for consumer in layer.consumers:
            columns = torch.where(consumer.unit_of_column >= 0, consumer.unit_of_column + start, -1)
            for part, piece in enumerate(self.pieces.get(consumer.weight, ())):
                first = part * piece.columns
                self.columns.add(piece.column, columns[first:][: piece.columns])


def _forms(graph: UnitGraph, shapes: Mapping[str, torch.Size]) -> dict[str, tuple[bool, int, int]]:
    """Return for each weight: whether units are on dimension 1, their groups, those of columns."""
    forms: dict[str, tuple[bool, int, int]] = {}
    for layer in graph.layers:
        if layer.weight in shapes:
            parts = layer.n_units // shapes[layer.weight][layer.unit_dim]
            forms[layer.weight] = (layer.unit_dim == 1, parts, 1)
    for consumer in (consumer for layer in graph.layers for consumer in layer.consumers):
        transposed, parts, _ = forms.get(consumer.weight, (consumer.column_dim == 0, 1, 1))
        # A layer and those that read it agree on the dimension of its columns.
        assert transposed == (consumer.column_dim == 0), consumer.weight
        groups = 1 if transposed else consumer.groups
        forms[consumer.weight] = (transposed, parts, groups)
    return forms


def _slots(ranges: Iterable[tuple[int, int]]) -> Tensor:
    return torch.cat([torch.arange(first, first + size) for first, size in ranges])
