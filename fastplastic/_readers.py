"""Which channels of which tensors are read, and where in the table their sums go."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fastplastic.wiring import Site, UnitGraph, UnitLayer


@dataclass(frozen=True, eq=False)
class Target:
    """Channels start..stop of a tensor with one activation function, and where their sums go."""

    start: int
    stop: int
    activation: str
    columns: Tensor


@dataclass(frozen=True, eq=False)
class Reader:
    """Everything to be read from one tensor, seen at one side of one module.

    Attributes:
        axis: Dimension of the channels.
        channels: Size of that dimension.
        layers: Names of the layers that are read here.
        activations: Pre-activations to read.
        gradients: Gradients to read; each covers all channels.
    """

    axis: int
    channels: int
    layers: list[str]
    activations: list[Target]
    gradients: list[Target]


def readers_of(graph: UnitGraph, starts: Mapping[str, int]) -> dict[tuple[str, str], list[Reader]]:
    """Return what is read at each side of each module, each tensor once."""
    readers: dict[tuple[str, str], list[Reader]] = {}
    for layer in graph.layers:
        start = starts[layer.name]
        if layer.z_site is not None:
            reader = _reader_at(readers, layer.z_site, layer.name)
            reader.activations.extend(_runs(layer, layer.z_site.unit_of_channel, start))
        if layer.g_site is not None:
            unit = layer.g_site.unit_of_channel
            columns = torch.where(unit >= 0, unit + start, -1)
            reader = _reader_at(readers, layer.g_site, layer.name)
            reader.gradients.append(Target(0, unit.numel(), "", columns))
    return readers


def _reader_at(readers: dict[tuple[str, str], list[Reader]], site: Site, layer: str) -> Reader:
    """Return the reader of the tensor at a site, which now reads for the layer too."""
    here = readers.setdefault((site.module, site.where), [])
    channels = site.unit_of_channel.numel()
    for reader in here:
        if (reader.axis, reader.channels) == (site.unit_axis, channels):
            break
    else:
        reader = Reader(site.unit_axis, channels, [], [], [])
        here.append(reader)
    reader.layers.append(layer)
    return reader


def _runs(layer: UnitLayer, unit_of_channel: Tensor, start: int) -> Iterator[Target]:
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
            yield Target(begin, end, kind, unit_of_channel[begin:end] + start)
        begin = end
