"""Write to the tensors of a model: all of it, or nothing if anything fails."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from fastplastic.kernels import resample_
from fastplastic.model import local_of, part_of
from fastplastic.reinit.optimizer_state import StateTensor, set_step, step_of
from fastplastic.reinit.places import (
    Draw,
    Elements,
    FillWrite,
    Region,
    Where,
    columns_of,
    merged_fills,
    region_mask,
)
from fastplastic.reinit.regions import Tensors


@dataclass(frozen=True, eq=False)
class StateWrites:
    """What is reset of an optimizer: state by place, counters of steps."""

    states: Sequence[tuple[StateTensor, Where]] = ()
    steps: Sequence[tuple[dict[str, Any], str]] = ()


@dataclass(frozen=True, eq=False)
class Writes:
    """All that is written to a model, in this order.

    Attributes:
        fresh: Elements that are drawn from their laws, by one call for all tensors of a device.
        fills: Regions that become one value.
        columns: Outgoing columns that are drawn last, each scaled to its norm if it has one.
    """

    fresh: Sequence[Draw]
    fills: Sequence[FillWrite] = ()
    columns: Sequence[Draw] = ()

    @property
    def places(self) -> list[Where]:
        """Where anything is written."""
        return [
            *(draw.where for draw in self.fresh),
            *(fill.region for fill in self.fills),
            *(draw.where for draw in self.columns),
        ]


class Undo:
    """Writes the values back that were there when it was told of a place."""

    def __init__(self) -> None:
        self._steps: list[Callable[[], object]] = []

    def keep(self, restore: Callable[[], object]) -> None:
        """Remember what brings something back."""
        self._steps.append(restore)

    def keep_place(self, tensor: Tensor, where: Where) -> "Place":
        """Copy the values of a place, and return it."""
        place = place_of(tensor, where)
        self.keep(partial(place.write, place.read()))
        return place

    def __call__(self) -> None:
        """Bring everything back, the last first."""
        with torch.no_grad():
            for restore in reversed(self._steps):
                restore()


def apply(tensors: Tensors, writes: Writes, memory: StateWrites, seed: int, undo: Undo) -> None:
    """Write everything; before the first write, `undo` knows all that is overwritten."""
    fills = list(merged_fills(writes.fills))
    filled = [undo.keep_place(tensors[fill.region.name], fill.region) for fill in fills]
    for draw in writes.fresh:
        undo.keep_place(tensors[draw.where.name], draw.where)
    columns = [undo.keep_place(tensors[draw.where.name], draw.where) for draw in writes.columns]
    states = [undo.keep_place(state.tensor, where) for state, where in memory.states]
    for step in memory.steps:
        undo.keep(partial(set_step, *step, step_of(*step)))
    with torch.no_grad():
        _draw(tensors, writes.fresh, seed)
        for place, fill in zip(filled, fills, strict=True):
            _fill(place, fill.value)
        for place, draw in zip(columns, writes.columns, strict=True):
            _draw_columns(tensors, place, draw, seed)
        for place, (state, where) in zip(states, memory.states, strict=True):
            if state.start is None:
                values = place_of(tensors[state.name], where).read()
                place.write(values.to(state.tensor.dtype))
            else:
                _fill(place, state.start)
        for step in memory.steps:
            set_step(*step, 0)


def _draw(tensors: Tensors, draws: Sequence[Draw], seed: int) -> None:
    """Draw from the laws; what is on one device at once."""
    by_device: dict[torch.device, list[Draw]] = {}
    for draw in draws:
        by_device.setdefault(tensors[draw.where.name].device, []).append(draw)
    for together in by_device.values():
        names = [draw.where.name for draw in together]
        parts = [part_of(name, tensors[name]) for name in names]
        weights = [local_of(tensors[name]) for name in names]
        masks = [
            _mask(draw.where.within(part), weight)
            for draw, part, weight in zip(together, parts, weights, strict=True)
        ]
        shards = [part.shard for part in parts]
        laws = [draw.law for draw in together]
        resample_(weights, names, laws, seed=seed, masks=masks, shards=shards)


def _mask(where: Where, tensor: Tensor) -> Tensor:
    if isinstance(where, Region):
        return region_mask(where, tensor)
    return where.mask.to(tensor.device)


def _draw_columns(tensors: Tensors, place: "Place", draw: Draw, seed: int) -> None:
    """Draw outgoing columns, and give them a norm if they are to have one."""
    _draw(tensors, [draw], seed)
    if draw.norm is not None:
        assert isinstance(draw.where, Region)
        tensor = tensors[draw.where.name]
        columns = columns_of(draw.where, tensor)
        # A column that is 0 has norm 0, and is not among those drawn.
        factors = columns.spread(draw.norm / columns.sums(2).sqrt().float())
        values = place.read()
        factor = place_of(factors, draw.where.within(part_of(draw.where.name, tensor))).read()
        place.write((values.float() * factor).to(values.dtype))


def _fill(place: "Place", value: float) -> None:
    place.fill(value)


class Place(Protocol):
    """A part of a tensor: what can be read from it and written to it."""

    def read(self) -> Tensor:
        """Return a copy of the values."""

    def write(self, values: Tensor) -> None:
        """Write what `read` returned."""

    def fill(self, value: float) -> None:
        """Write one value."""


def place_of(tensor: Tensor, where: Where) -> Place:
    """Return a place in a tensor; of one that is spread, what is in the part of this process."""
    where = where.within(part_of(where.name, tensor))
    tensor = local_of(tensor.detach())
    return _Some(tensor, where) if isinstance(where, Elements) else _Regular(tensor, where)


class _Some:
    """Single elements."""

    def __init__(self, tensor: Tensor, where: Elements) -> None:
        mask = where.mask.to(tensor.device)
        # One index for each element instead of one for each dimension.
        flat = tensor.is_contiguous() and mask.is_contiguous()
        self._values = tensor.view(-1) if flat else tensor
        self._mask = mask.view(-1) if flat else mask

    def read(self) -> Tensor:
        return self._values[self._mask]

    def write(self, values: Tensor) -> None:
        self._values[self._mask] = values

    def fill(self, value: float) -> None:
        self._values.masked_fill_(self._mask, value)


class _Regular:
    """Rows or columns."""

    def __init__(self, tensor: Tensor, region: Region) -> None:
        self._view = region.view(tensor)
        self._index = tuple(
            part if isinstance(part, slice) else part.to(tensor.device) for part in region.index
        )
        lists = [dim for dim, part in enumerate(self._index) if isinstance(part, Tensor)]
        # Along one dimension there are operations that are ten times as fast as indexing.
        self._dim = lists[0] if len(lists) == 1 else None

    def read(self) -> Tensor:
        if self._dim is None:
            return self._view[self._index]
        return self._view.index_select(self._dim, self._rows)

    def write(self, values: Tensor) -> None:
        if self._dim is None:
            self._view[self._index] = values
        else:
            self._view.index_copy_(self._dim, self._rows, values)

    def fill(self, value: float) -> None:
        if self._dim is None:
            self._view[self._index] = value
        else:
            self._view.index_fill_(self._dim, self._rows, value)

    @property
    def _rows(self) -> Tensor:
        assert self._dim is not None
        rows = self._index[self._dim]
        assert isinstance(rows, Tensor)
        return rows
