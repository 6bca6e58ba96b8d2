"""Which channels of which tensors are read, and which slots of the tables their sums go to.

A kernel adds its sums to a range of slots of its own; only afterwards are slots mapped to units.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fastplastic.measure.alike import Alike
from fastplastic.wiring import Site, UnitGraph, UnitLayer, Where


@dataclass(frozen=True)
class Run:
    """Channels start..stop of a tensor with one activation function, and their first slot."""

    start: int
    stop: int
    activation: str
    slot: int


@dataclass(eq=False)
class TensorRead:
    """One tensor to read while the model runs.

    Attributes:
        axis: Dimension of the channels.
        channels: Size of that dimension.
        layers: Names of the layers that are read here.
        activations: The runs of channels whose activations are read.
        gradients: First slot of the gradients, which are read of all channels; None for no.
        measured: The layers whose rows of activations can be seen here, all units of a row.
        part: The channels of a whole tensor that these are, which no other process of a group has;
            None for a whole one.
        cut: What to read instead where this process has a slice of the channels.
    """

    axis: int
    channels: int
    layers: list[str]
    activations: list[Run]
    gradients: int | None = None
    measured: list[UnitLayer] = field(default_factory=list)
    part: range | None = None
    cut: "TensorRead | None" = None

    def fits(self, tensor: Tensor) -> bool:
        """Tell whether a tensor has the channels that are to be read."""
        inside = -tensor.ndim <= self.axis < tensor.ndim and tensor.is_floating_point()
        return inside and tensor.shape[self.axis] == self.channels

    def misfit(self, tensor: Tensor | None) -> str:
        """Say what was found instead."""
        found = "no tensor" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"
        return f"its hook saw {found}, expected {self.channels} channels on axis {self.axis}"


class SlotMap:
    """Which column of the statistics table each slot adds to; a slot may serve several.

    Args:
        alike: Counts what all processes of a group have alike; None for no group.
    """

    def __init__(self, alike: Alike | None = None) -> None:
        self.size, self._alike = 0, alike
        self._slots: list[Tensor] = []
        self._columns: list[Tensor] = []
        self._same: list[range] = []

    def reserve(self, size: int, *, same: bool = False) -> int:
        """Return the first of so many new slots.

        Args:
            size: How many.
            same: Whether all processes of the group have their sums alike.
        """
        self.size += size
        if same:
            self._same.append(range(self.size - size, self.size))
        return self.size - size

    def add(self, slot: int, columns: Tensor) -> None:
        """Let slots from `slot` on add to these columns; -1 for none."""
        known = (columns >= 0).nonzero().flatten()
        self._slots.append(known + slot)
        self._columns.append(columns[known])

    def pairs(self) -> tuple[Tensor, Tensor]:
        """Return (slots, columns), int64, one entry for each that belong together."""
        if not self._slots:
            none = torch.zeros(0, dtype=torch.int64)
            return none, none
        return torch.cat(self._slots), torch.cat(self._columns)

    def counted(self, first: int, sums: Tensor) -> tuple[Tensor, Tensor]:
        """Return (columns, values) of sums that count in this process.

        Args:
            first: The first row of the statistics table that they are added to.
            sums: float64 [rows, slots], on the CPU.
        """
        slots, columns = self.pairs()
        values = sums[:, slots]
        if self._alike is None:
            return columns, values
        same = torch.zeros(self.size, dtype=torch.bool)
        for slots_alike in self._same:
            same[slots_alike.start : slots_alike.stop] = True
        mine = self._alike.count(first, columns, values, same[slots])
        return columns[mine], values[:, mine]


class TensorReads:
    """All tensors to read of a graph.

    Args:
        graph: The wiring.
        columns: {layer name: its columns of the statistics table}.
        alike: Counts what all processes of a group have alike; None for no group.
        slice_of: Returns which channels at a site of a layer this process may have, None for all.

    Attributes:
        sites: (module name, where) of a `Site` -> what is read there, each tensor once.
        activations: Slots of the activations.
        gradients: Slots of the gradients.
    """

    def __init__(
        self,
        graph: UnitGraph,
        columns: Mapping[str, slice],
        alike: Alike | None = None,
        slice_of: Callable[[UnitLayer, Site], range | None] = lambda *_: None,
    ) -> None:
        self.sites: dict[tuple[str, Where], list[TensorRead]] = {}
        self.activations, self.gradients = SlotMap(alike), SlotMap(alike)
        for layer in graph.layers:
            start = columns[layer.name].start
            for site in layer.z_sites:
                for read, own in self._reads_at(site, layer, slice_of(layer, site)):
                    if site is layer.row_site:
                        read.measured.append(layer)
                    self._read_activations(read, layer, own, start)
            for site in layer.g_sites:
                for read, own in self._reads_at(site, layer, slice_of(layer, site)):
                    self._read_gradients(read, own, start)

    def _read_activations(self, read: TensorRead, layer: UnitLayer, site: Site, start: int) -> None:
        for begin, end, activation in _runs(layer, site.unit_of_channel):
            same = (begin, end, activation)
            known = [r for r in read.activations if (r.start, r.stop, r.activation) == same]
            if not known:
                slots = self.activations.reserve(end - begin, same=read.part is None)
                known = [Run(*same, slots)]
                read.activations += known
            self.activations.add(known[0].slot, site.unit_of_channel[begin:end] + start)

    def _read_gradients(self, read: TensorRead, site: Site, start: int) -> None:
        if read.gradients is None:
            read.gradients = self.gradients.reserve(read.channels, same=read.part is None)
        unit = site.unit_of_channel
        self.gradients.add(read.gradients, torch.where(unit >= 0, unit + start, -1))

    def _reads_at(
        self, site: Site, layer: UnitLayer, own: range | None
    ) -> Iterator[tuple[TensorRead, Site]]:
        """Yield the read of the tensor at a site, and that of a slice of it, with what they see."""
        here = self.sites.setdefault((site.module, site.where), [])
        channels = site.unit_of_channel.numel()
        for read in here:
            if (read.axis, read.channels) == (site.unit_axis, channels):
                break
        else:
            read = TensorRead(site.unit_axis, channels, [], [])
            here.append(read)
        read.layers.append(layer.name)
        yield read, site
        if own is not None and read.cut is None:
            read.cut = TensorRead(site.unit_axis, len(own), [], [], part=own)
        if own is None or read.cut is None or read.cut.part != own:
            return
        read.cut.layers.append(layer.name)
        yield read.cut, replace(site, unit_of_channel=site.unit_of_channel[own.start : own.stop])


def _runs(layer: UnitLayer, unit_of_channel: Tensor) -> Iterator[tuple[int, int, str]]:
    """Yield the longest ranges of channels with a unit and one activation function."""
    names: dict[int, str] = {}
    for first, stop, name in layer.activations:
        names.update(dict.fromkeys(range(first, stop), name))
    kinds = [names.get(unit) for unit in unit_of_channel.tolist()]
    begin = 0
    for end in range(1, len(kinds) + 1):
        if end < len(kinds) and kinds[end] == kinds[begin]:
            continue
        kind = kinds[begin]
        if kind is not None:
            yield begin, end, kind
        begin = end
