"""A bounded sample of the rows of every layer's activations, for `diagnostics`.

A row is one position (a sample of a linear layer, a token, a pixel) with h = f(z) of every unit.
Each position draws a key from a stream that belongs to its layer, and those with the smallest keys
stay: a uniform sample without replacement over all positions of all batches, of unknown number.
Positions draw in logical order, so that neither memory layout, device, batch size nor the number of
threads matters, and the global random state is neither read nor changed.
"""

import math
from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastplastic.diagnostics import Ranks, ranks_of
from fastplastic.kernels import activate
from fastplastic.randomness import stream
from fastplastic.wiring import UnitLayer

# Rows kept of a layer: 4 KiB per unit, in float32.
ROWS = 1024


class RowSamples:
    """Samples of the activations of many layers."""

    def __init__(self) -> None:
        self._layers: dict[str, _LayerSample] = {}

    def read(self, layers: Iterable[UnitLayer], z: Tensor, axis: int) -> None:
        """Let every position of a tensor compete for a row.

        Args:
            layers: Those whose activations are read from the tensor.
            z: Pre-activations, without padding.
            axis: Dimension of the channels.
        """
        for layer in layers:
            sample = self._layers.get(layer.name)
            if sample is None:
                sample = self._layers[layer.name] = _LayerSample(layer)
            sample.read(z, axis)

    def rows(self, name: str) -> Tensor | None:
        """Return the finite rows of a layer, float32 [rows, units], or None if there are none."""
        sample = self._layers.get(name)
        if sample is None:
            return None
        rows = sample.rows[sample.rows.isfinite().all(1)]
        return rows if rows.numel() else None

    def ranks(self, name: str) -> Ranks | None:
        """Return the ranks of a layer's rows, or None where no finite row was seen."""
        rows = self.rows(name)
        return None if rows is None else ranks_of(rows)


class Reservoir:
    """Which of a stream of positions are in a uniform sample of at most so many.

    Args:
        name: Dotted name of a layer: each has random numbers of its own.
        size: How many positions may stay.
    """

    def __init__(self, name: str, size: int) -> None:
        self._size = size
        self._draws = stream(0, "rows", name)
        self._keys = np.empty(0)

    def enter(self, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Let so many new positions compete.

        Returns:
            Which of them stay, ascending, and the place in the sample that each takes. Places are
            0 up to the size of the sample; who had one of these before has lost it.
        """
        fresh, held = self._draws.random(count), len(self._keys)
        keys = np.concatenate([self._keys, fresh])
        stay = np.arange(len(keys))
        if len(keys) > self._size:
            stay = np.sort(np.argpartition(keys, self._size)[: self._size])
        free = np.ones(len(stay), dtype=bool)
        free[stay[stay < held]] = False
        places = np.flatnonzero(free)
        chosen = stay[stay >= held] - held
        self._keys = np.concatenate([self._keys, np.empty(len(stay) - held)])
        self._keys[places] = fresh[chosen]
        return chosen, places


class _LayerSample:
    """The sample of one layer: `rows`, float32 [rows, units] on the CPU."""

    def __init__(self, layer: UnitLayer) -> None:
        assert layer.row_site is not None
        self._channels, self._functions = columns_of(layer)
        # Whether a row of the tensor is a row of the matrix, as it mostly is.
        self._plain = torch.equal(layer.row_site.unit_of_channel, torch.arange(layer.n_units))
        self._reservoir = Reservoir(layer.name, ROWS)
        self.rows = torch.empty(0, self._channels.shape[1], dtype=torch.float32, device="cpu")

    def read(self, z: Tensor, axis: int) -> None:
        # Of a single position there is no other dimension.
        view = z.movedim(axis, -1).unsqueeze(0)
        shape = (*view.shape[:-1], len(self._channels))
        chosen, places = self._reservoir.enter(math.prod(shape))
        if not len(chosen):
            return
        self._grow(int(places.max()) + 1)
        *position, turn = map(torch.from_numpy, np.unravel_index(chosen, shape))
        rows = view[tuple(index.to(z.device) for index in position)]
        if not self._plain:
            rows = rows.gather(1, self._channels[turn].to(z.device))
        self.rows[torch.from_numpy(places)] = self._activated(rows).to("cpu", torch.float32)

    def _grow(self, size: int) -> None:
        if size > len(self.rows):
            more = self.rows.new_empty(size - len(self.rows), self.rows.shape[1])
            self.rows = torch.cat([self.rows, more])

    def _activated(self, z: Tensor) -> Tensor:
        parts = [activate(z[:, start:stop], name) for start, stop, name in self._functions]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def columns_of(layer: UnitLayer) -> tuple[Tensor, tuple[tuple[int, int, str], ...]]:
    """Return what the columns of the layer's matrix are made of.

    Returns:
        The channel of each unit that has one, int64 [turns, units]: where units stand in several
        channels each, every turn of them is a position of its own. And the runs (start, stop,
        function) of columns.
    """
    assert layer.row_site is not None
    unit_of_channel = layer.row_site.unit_of_channel
    channels = unit_of_channel.argsort(stable=True)
    channels = channels[unit_of_channel[channels] >= 0]
    counts = unit_of_channel[channels].bincount(minlength=layer.n_units)
    seen = counts.nonzero().flatten()
    first = (counts.cumsum(0) - counts)[seen]
    turns = int(counts[seen].min()) if len(seen) else 0
    runs = (
        (int((seen < start).sum()), int((seen < stop).sum()), name)
        for start, stop, name in layer.activations
    )
    return channels[first + torch.arange(turns)[:, None]], tuple(r for r in runs if r[0] < r[1])
