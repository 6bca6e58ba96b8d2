"""What the processes of a batch group see alike: counted once, and compared instead of believed."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastplastic.errors import InputError
from fastplastic.model import BatchGroup, local_of
from fastplastic.stats import (
    ACTIVATION_STATISTICS,
    GRADIENT_STATISTICS,
    MAX_ROW,
    MIN_ROW,
    STATISTICS,
)

ACTIVATIONS, GRADIENTS, WEIGHT_GRADIENTS = "activations", "gradients", "gradients of weights"
# What is computed twice from the same is mostly the same bits; halves of a batch are not that
# close: sums over n positions differ by about 1 / sqrt(n).
_SAME = 1e-5
_SAME_INPUTS = 1e-9
# Weights of inputs, so that the same ones in another order are others; a prime.
_WEIGHTS = 8191


def _rows(names: Sequence[str]) -> list[int]:
    return [STATISTICS.index(name) for name in names]


_KINDS = {
    ACTIVATIONS: _rows(ACTIVATION_STATISTICS),
    GRADIENTS: _rows(GRADIENT_STATISTICS),
    WEIGHT_GRADIENTS: _rows([name for name in STATISTICS if "dw" in name]),
}
# Sums of what has a sign may be anything near 0.
_COMPARED = [name.startswith(("n", "sum_abs_", "sum_sq_")) for name in STATISTICS]


@dataclass(frozen=True, eq=False)
class SeenAlike:
    """What all processes of a group have to have seen alike.

    Attributes:
        layers: float64 [statistics, layers], sums over what each has whole.
        inputs: A sum over the inputs of the model, each element with a weight of its own.
    """

    layers: Tensor
    inputs: float


class Alike:
    """Sums over what all processes of a group have alike, of each layer.

    Args:
        columns: {layer name: its columns of the statistics table}.
        group: The processes.

    Attributes:
        group: See above.
    """

    def __init__(self, columns: Mapping[str, slice], group: BatchGroup) -> None:
        self.group, self._layers = group, len(columns)
        sizes = torch.tensor([own.stop - own.start for own in columns.values()], dtype=torch.int64)
        self._layer_of_column = torch.arange(len(columns)).repeat_interleave(sizes)
        self.clear()

    def clear(self) -> None:
        """Forget everything seen."""
        self._sums = torch.zeros(len(STATISTICS), self._layers, dtype=torch.float64)
        self._inputs: Tensor | float = 0.0

    @property
    def seen(self) -> SeenAlike:
        """What was seen so far."""
        return SeenAlike(self._sums.clone(), float(self._inputs))

    def note_inputs(self, values: Sequence[Any]) -> None:
        """Take note of what the model is called with; the host does not wait."""
        for tensor in (local_of(value) for value in values if isinstance(value, Tensor)):
            numbers = tensor.detach().reshape(-1).double()
            weights = torch.arange(numbers.numel(), device=numbers.device) % _WEIGHTS + 1
            self._inputs = numbers @ weights.double() + self._inputs

    def count(self, first: int, columns: Tensor, values: Tensor, same: Tensor) -> Tensor:
        """Take note of sums before they are added to a statistics table.

        Args:
            first: Their first row of the table.
            columns: int64 [sums], their columns.
            values: float64 [rows, sums].
            same: bool [sums], of what all processes of the group have alike.

        Returns:
            bool [sums], which of them count in this process.
        """
        own = self._sums[first : first + len(values)]
        own.index_add_(1, self._layer_of_column[columns[same]], values[:, same])
        return ~same | self.group.first


def check_inputs(seen: Sequence[SeenAlike | None], groups: Sequence[Sequence[int]]) -> None:
    """Refuse other batches in processes that share them; arguments as of `differing`.

    Raises:
        InputError: In all processes.
    """
    for one, first, other, second in _pairs(seen, groups):
        if abs(first.inputs - second.inputs) > _SAME_INPUTS * abs(first.inputs):
            raise InputError(
                f"processes {one} and {other} called the model with different batches, expected "
                "the same in those that share layers by tensor parallelism: shard the data over "
                "groups of processes, not over single ones"
            )


def differing(
    seen: Sequence[SeenAlike | None], groups: Sequence[Sequence[int]]
) -> dict[str, Tensor]:
    """Return what the processes of a group do not have alike.

    Args:
        seen: `Alike.seen` of all processes; None where there is nothing to compare.
        groups: The ranks of each group.

    Returns:
        {kind: bool [layers]}, "activations", "gradients" and "gradients of weights".
    """
    found: dict[str, Tensor] = {}
    for _, first, _, second in _pairs(seen, groups):
        one, other = first.layers, second.layers
        apart = (one - other).abs() > _SAME * torch.maximum(one.abs(), other.abs())
        apart &= torch.tensor(_COMPARED)[:, None]
        for kind, rows in _KINDS.items():
            layers = apart[rows].any(0)
            found[kind] = found[kind] | layers if kind in found else layers
    return found


def _pairs(
    seen: Sequence[SeenAlike | None], groups: Sequence[Sequence[int]]
) -> Iterator[tuple[int, SeenAlike, int, SeenAlike]]:
    """Yield each process that shares batches with another, behind that one, with what they saw."""
    for ranks in groups:
        for rank in ranks[1:]:
            first, own = seen[ranks[0]], seen[rank]
            if first is not None and own is not None:
                yield ranks[0], first, rank, own


def forget(table: Tensor, kind: str, columns: slice) -> None:
    """Make a statistics table that of nothing seen, for one kind of what is seen of a layer."""
    for row in _KINDS[kind]:
        table[row, columns] = {MIN_ROW: torch.inf, MAX_ROW: -torch.inf}.get(row, 0.0)
