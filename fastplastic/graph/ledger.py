"""The book-keeping of the unit graph: units, why they are not hidden, and what happens to them.

Every unit of every weight layer has one number. A traced tensor is described by the numbers of the
units whose values it carries (`values`). Units that meet an operator that mixes them, or that leave
through a sum or the output, are marked with the reason.
"""

from bisect import bisect_left, bisect_right
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fastplastic.graph.trace import Program
from fastplastic.graph.values import Value, distinct, values_in, without_repeats


@dataclass(eq=False)
class Layer:
    """A call of a weight layer while the graph is being read; of some of its rows where `part`."""

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
    part: bool = False

    @property
    def stop(self) -> int:
        """One past the number of the last unit."""
        return self.start + self.n_units


@dataclass(frozen=True, eq=False)
class ConsumerCall:
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


class Ledger:
    """What is known of the units of one model, over one or two traced programs.

    Attributes:
        layers: The weight layers that own units, in the order of their units.
        calls: Every call of a weight layer.
        consumers: Every call of a weight layer that reads units through its columns.
        norms: Every call of a BatchNorm on channels with units.
        follows: (unit, unit of the depthwise filter that reads it).
        texts: Reasons why units are not hidden; the first is "".
        code: int32 [units], the reason of each unit by its place in `texts`, 0 where it is hidden.
        parent: A unit that each unit is one with, itself where there is none before it.
        program: The program that is being read.
        made: {node: its value}.
        sources: {node: the nodes it reads}, after every tensor was written in place.
        reads: {node: the nodes that read it}, the other way round; a module that is one activation
            function counts as one node.
        functions: {node: name} of activation functions, "unknown" for one that is not known.
        norms_at: {node: module name or None} of norms.
        sums: Nodes where units are summed with other values.
        merges: Nodes where the rows of several layers become one unit by a sum.
        renamed: {node: {unit: unit}} where a unit goes on under the number of another.
        reductions: Nodes that reduce units or positions.
        opaque: {node: operator} of those without a rule, or that units enter at an unknown place.
        overwritten: Units that were written to through a view.
        branched: Nodes with a pristine value that several operators read.
    """

    def __init__(self) -> None:
        self.layers: list[Layer] = []
        self.calls: list[Layer] = []
        self.consumers: list[ConsumerCall] = []
        self.norms: list[NormCall] = []
        self.follows: list[tuple[int, int]] = []
        self.texts: list[str] = [""]
        self.code = self._codes = torch.zeros(0, dtype=torch.int32)
        self.parent: list[int] = []
        self.program = Program()
        self.made: dict[Node, Any] = {}
        self.order: dict[Node, int] = {}
        self.sources: dict[Node, list[Node]] = {}
        self.reads: dict[Node, list[Node]] = defaultdict(list)
        self.functions: dict[Node, str] = {}
        self.norms_at: dict[Node, str | None] = {}
        self.sums: set[Node] = set()
        self.merges: set[Node] = set()
        self.renamed: dict[Node, dict[int, int]] = {}
        self.reductions: set[Node] = set()
        self.opaque: dict[Node, str] = {}
        self.overwritten: set[int] = set()
        self.branched: set[Node] = set()
        self._present: dict[Node, Tensor] = {}

    def parameter(self, node: Any) -> tuple[str | None, bool]:
        """Return (name, transposed) of the parameter that `node` is, or (None, False)."""
        none: tuple[str | None, bool] = (None, False)
        return self.program.parameters.get(node, none) if isinstance(node, Node) else none

    def layers_in(self, value: Value) -> list[Layer]:
        """Return the layers all of whose units stand in a pristine value."""
        if not value.pristine or value.ids is None:
            return []
        return self.layers_all_in(value.ids)

    def present(self, node: Node) -> Tensor:
        """Return the units in the values of a node, ascending."""
        if node not in self._present:
            units = {u for v in values_in(self.made.get(node)) if v.ids is not None
                     for u in distinct(v.ids)}  # fmt: skip
            self._present[node] = torch.tensor(sorted(units), dtype=torch.int32)
        return self._present[node]

    def read(self, node: Node, sources: list[Node]) -> None:
        """Note which nodes a node reads."""
        for source in dict.fromkeys(sources):
            self.reads[source].append(node)

    def new_units(self, count: int) -> int:
        """Add `count` units and return the number of the first."""
        start = len(self.parent)
        self.parent.extend(range(start, start + count))
        if len(self.parent) > len(self._codes):
            # Twice as many: one more of every size, for each layer, would leave gaps in memory.
            grown = torch.zeros(2 * len(self.parent), dtype=self.code.dtype)
            grown[:start] = self.code
            self._codes = grown
        self.code = self._codes[: len(self.parent)]
        return start

    def leak(self, ids: Tensor | None, reason: str) -> None:
        """Mark every unit in `ids` as not hidden, unless it already is."""
        if ids is None:
            return
        units = without_repeats(ids).reshape(-1)
        units = units[units >= 0].long()
        number = self._number(reason)
        if len(units):
            self.code[units] = torch.where(self.code[units] == 0, number, self.code[units])

    def _number(self, reason: str) -> int:
        """Return the place of a reason in `texts`."""
        if reason not in self.texts:
            self.texts.append(reason)
        return self.texts.index(reason)

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
        counts = self.counts(distinct(ids))
        return [layer for layer, count in counts if count == layer.n_units]

    def counts(self, units: list[int]) -> list[tuple[Layer, int]]:
        """Return the layers of some units, ascending, with the number of units of each."""
        found, at = [], 0
        while at < len(units):
            layer = self.layer_at(units[at])
            end = bisect_left(units, layer.stop, at)
            found.append((layer, end - at))
            at = end
        return found

    def settle(self) -> None:
        """Decide which units are hidden, once every operator has been read.

        A depthwise filter that follows a hidden unit belongs to it. What is one unit shares a fate.
        """
        code: list[int] = self.code.tolist()
        marked = -1
        while marked != len(code) - code.count(0):
            marked = len(code) - code.count(0)
            self._share_fate(code)
            for unit, follower in reversed(self.follows):
                if not code[unit] and code[follower]:
                    reason = self.texts[code[follower]]
                    code[unit] = self._number(f"its depthwise filter is not hidden: {reason}")
        self.code = torch.tensor(code, dtype=self.code.dtype)
        for unit, follower in self.follows:
            if not code[unit] and not code[follower]:
                self.couple(unit, follower)

    def _share_fate(self, code: list[int]) -> None:
        """Give every member of a group the reason of its first marked member, in `code`."""
        joined = [unit for unit, before in enumerate(self.parent) if before != unit]
        roots = [self.find(unit) for unit in joined]
        marked: dict[int, int] = {}
        for unit, root in zip(joined, roots, strict=True):
            # The root is the first of its group.
            fate = code[root] or code[unit]
            if fate:
                marked.setdefault(root, fate)
        for unit in (*joined, *marked):
            code[unit] = code[unit] or marked.get(self.find(unit), 0)
