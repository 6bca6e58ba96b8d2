"""The book-keeping of `graph`: which unit stands at each element of a traced tensor.

Every unit of every weight layer has one number. A traced tensor is described by an integer tensor
of the same shape that holds, for each element, the number of the unit whose value it carries,
DATA where it depends on the input in some other way, or CONST where it does not depend on the
input. Operators that only move elements are executed on these integers, so that reshape, permute,
concat, split and window partitioning need no rules of their own. Units that meet an operator that
mixes them, or that leave through a sum or the output, are marked with the reason.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

DATA = -1
CONST = -2


@dataclass(frozen=True, eq=False)
class Value:
    """What is known of one traced tensor.

    Attributes:
        shape: Its shape.
        ids: int32 tensor of that shape (mostly expanded), or None when no unit is in it.
        const: Without ids: it does not depend on the input.
        pristine: Its units have met no activation function and no second reader on the way.
    """

    shape: tuple[int, ...]
    ids: Tensor | None = None
    const: bool = False
    pristine: bool = False

    def filled(self) -> Tensor:
        """Return the ids, with DATA or CONST everywhere where there are none."""
        if self.ids is not None:
            return self.ids
        fill = torch.tensor(CONST if self.const else DATA, dtype=torch.int32)
        return fill.expand(self.shape)


@dataclass(eq=False)
class Layer:
    """A weight layer while the graph is being read."""

    name: str
    kind: str
    weight: str
    bias: str | None
    unit_dim: int
    start: int
    n_units: int
    source: Node
    node: Node
    mode: str
    transformed: bool = False
    tied: tuple[str, ...] = ()

    @property
    def stop(self) -> int:
        """One past the number of the last unit."""
        return self.start + self.n_units


@dataclass(frozen=True, eq=False)
class Reader:
    """A weight layer that reads `ids` through its columns."""

    name: str
    weight: str
    column_dim: int
    groups: int
    ids: Tensor
    mode: str


@dataclass(frozen=True, eq=False)
class NormCall:
    """A BatchNorm that is called on channels with these units."""

    name: str
    ids: Tensor
    mode: str


def collapse(ids: Tensor) -> Tensor:
    """Return the same integers with every dimension along which they are constant expanded."""
    small = ids
    for dim in range(ids.dim()):
        if small.shape[dim] > 1:
            first = small.narrow(dim, 0, 1)
            if small.stride(dim) == 0 or bool((small == first).all()):
                small = first
    return small.expand(ids.shape)


def along(ids: Tensor, axis: int) -> Tensor | None:
    """Return the unit at each index of `axis`, or None when it changes along another dimension.

    Constants do not count: a zero-padded border leaves the unit as it is.
    """
    axis %= max(ids.dim(), 1)
    for dim in range(ids.dim()):
        if dim != axis and ids.shape[dim] > 1 and ids.stride(dim) == 0:
            ids = ids.narrow(dim, 0, 1)
    rows = ids.movedim(axis, 0).reshape(ids.shape[axis], -1)
    if rows.numel() == 0:
        return None
    high = rows.amax(1)
    low = torch.where(rows == CONST, high[:, None], rows).amin(1)
    return high if torch.equal(high, low) else None


def distinct(ids: Tensor) -> list[int]:
    """Return the units that stand in `ids`, ascending."""
    units: list[int] = torch.unique(_once(ids)).tolist()
    return [unit for unit in units if unit >= 0]


def _once(ids: Tensor) -> Tensor:
    """Return the same integers without the repeats of expanded dimensions."""
    for dim in range(ids.dim()):
        if ids.shape[dim] > 1 and ids.stride(dim) == 0:
            ids = ids.narrow(dim, 0, 1)
    return ids


def reduce_dims(ids: Tensor, dims: Iterable[int]) -> Tensor | None:
    """Return ids with `dims` cut to size 1, or None when units change along them."""
    for dim in dims:
        high = ids.amax(dim, keepdim=True)
        if not bool(((ids == high) | (ids == CONST)).all()):
            return None
        ids = high
    return ids


def on_axis(units: Tensor, axis: int, shape: tuple[int, ...], pristine: bool = False) -> Value:
    """Return a value that has `units` along `axis` and is constant along every other dimension."""
    view = [1] * len(shape)
    view[axis] = len(units)
    return Value(shape, units.reshape(view).expand(shape), pristine=pristine)


class UnitFlow:
    """Units, the reasons why they are not hidden, what reads them, and which of them are one."""

    def __init__(self) -> None:
        self.layers: list[Layer] = []
        self.readers: list[Reader] = []
        self.norms: list[NormCall] = []
        self.follows: list[tuple[int, int]] = []
        self.texts: list[str] = [""]
        self.code = torch.zeros(0, dtype=torch.int32)
        self.parent: list[int] = []

    def new_units(self, count: int) -> int:
        """Add `count` units and return the number of the first."""
        start = len(self.parent)
        self.parent.extend(range(start, start + count))
        self.code = torch.cat([self.code, torch.zeros(count, dtype=torch.int32)])
        return start

    def leak(self, ids: Tensor | None, reason: str) -> None:
        """Mark every unit in `ids` as not hidden, unless it already is."""
        if ids is None:
            return
        hit = torch.zeros(len(self.code) + 1, dtype=torch.bool)
        hit[_once(ids).reshape(-1).long().clamp(min=-1)] = True
        if reason not in self.texts:
            self.texts.append(reason)
        self.code[hit[:-1] & (self.code == 0)] = self.texts.index(reason)

    def any_open(self, ids: Tensor) -> bool:
        """Tell whether any unit in `ids` may still be hidden."""
        units = distinct(ids)
        return bool(units) and not bool(self.code[units].all())

    def find(self, unit: int) -> int:
        """Return the lowest number among the units that are one with `unit`."""
        while self.parent[unit] != unit:
            self.parent[unit] = self.parent[self.parent[unit]]
            unit = self.parent[unit]
        return unit

    def couple(self, first: int, second: int) -> None:
        """Make two units one."""
        low, high = sorted((self.find(first), self.find(second)))
        self.parent[high] = low

    def layer_at(self, unit: int) -> Layer:
        """Return the layer that makes the unit."""
        return self.layers[bisect_right(self.layers, unit, key=lambda layer: layer.start) - 1]

    def layers_all_in(self, ids: Tensor) -> list[Layer]:
        """Return the layers all of whose units stand in `ids`."""
        counts = Counter(self.layer_at(unit).start for unit in distinct(ids))
        layers = [self.layer_at(start) for start in counts]
        return [layer for layer in layers if counts[layer.start] == layer.n_units]

    def settle(self) -> None:
        """Decide which units are hidden, once every operator has been read.

        A depthwise filter that follows a hidden unit belongs to it. What is one unit shares a fate.
        """
        marked = -1
        while marked != int(self.code.count_nonzero()):
            marked = int(self.code.count_nonzero())
            self._share_fate()
            for unit, follower in reversed(self.follows):
                if not self.code[unit] and self.code[follower]:
                    reason = self.texts[int(self.code[follower])]
                    one = torch.tensor([unit], dtype=torch.int32)
                    self.leak(one, f"its depthwise filter is not hidden: {reason}")
        for unit, follower in self.follows:
            if not self.code[unit] and not self.code[follower]:
                self.couple(unit, follower)

    def _share_fate(self) -> None:
        """Give every member of a group the reason of its first marked member."""
        marked: dict[int, int] = {}
        for unit in torch.nonzero(self.code).flatten().tolist():
            marked.setdefault(self.find(unit), int(self.code[unit]))
        roots = torch.tensor([marked.get(self.find(unit), 0) for unit in range(len(self.parent))])
        self.code = torch.where(self.code == 0, roots.to(self.code.dtype), self.code)
