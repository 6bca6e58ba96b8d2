"""Which channels of which tensors are read, and which slots of the tables their sums go to.

A kernel adds its sums to a range of slots of its own; only afterwards are slots mapped to units.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

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
    """

    axis: int
    channels: int
    layers: list[str]
    activations: list[Run]
    gradients: int | None = None
    measured: list[UnitLayer] = field(default_factory=list)

    def fits(self, tensor: Tensor) -> bool:
        """Tell whether a tensor has the channels that are to be read."""
        inside = -tensor.ndim <= self.axis < tensor.ndim and tensor.is_floating_point()
        return inside and tensor.shape[self.axis] == self.channels

    def misfit(self, tensor: Tensor | None) -> str:
        """Say what was found instead."""
        found = "no tensor" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"
        return f"its hook saw {found}, expected {self.channels} channels on axis {self.axis}"


class SlotMap:
    """Which column of the statistics table each slot adds to; a slot may serve several."""

    def __init__(self) -> None:
        self.size = 0
        self._slots: list[Tensor] = []
        self._columns: list[Tensor] = []

    def reserve(self, size: int) -> int:
        """Return the first of so many new slots."""
        self.size += size
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


class TensorReads:
    """All tensors to read of a graph.

    Args:
        graph: The wiring.
        columns: {layer name: its columns of the statistics table}.

    Attributes:
        sites: (module name, where) of a `Site` -> what is read there, each tensor once.
        activations: Slots of the activations.
        gradients: Slots of the gradients.
    """

    def __init__(self, graph: UnitGraph, columns: Mapping[str, slice]) -> None:
        self.sites: dict[tuple[str, Where], list[TensorRead]] = {}
        self.activations = SlotMap()
        self.gradients = SlotMap()
        for layer in graph.layers:
            for site in layer.z_sites:
                self._read_activations(layer, site, columns[layer.name].start)
            for site in layer.g_sites:
                self._read_gradients(layer, site, columns[layer.name].start)

    def _read_activations(self, layer: UnitLayer, site: Site, start: int) -> None:
        read = self._read_at(site, layer.name)
        if site is layer.row_site:
            read.measured.append(layer)
        for begin, end, activation in _runs(layer, site.unit_of_channel):
            same = (begin, end, activation)
            known = [r for r in read.activations if (r.start, r.stop, r.activation) == same]
            if not known:
                known = [Run(*same, self.activations.reserve(end - begin))]
                read.activations += known
            self.activations.add(known[0].slot, site.unit_of_channel[begin:end] + start)

    def _read_gradients(self, layer: UnitLayer, site: Site, start: int) -> None:
        read = self._read_at(site, layer.name)
        if read.gradients is None:
            read.gradients = self.gradients.reserve(read.channels)
        unit = site.unit_of_channel
        self.gradients.add(read.gradients, torch.where(unit >= 0, unit + start, -1))

    def _read_at(self, site: Site, layer: str) -> TensorRead:
        """Return the read of the tensor at a site, which now reads for the layer too."""
        here = self.sites.setdefault((site.module, site.where), [])
        channels = site.unit_of_channel.numel()
        for read in here:
            if (read.axis, read.channels) == (site.unit_axis, channels):
                break
        else:
            read = TensorRead(site.unit_axis, channels, [], [])
            here.append(read)
        read.layers.append(layer)
        return read


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
