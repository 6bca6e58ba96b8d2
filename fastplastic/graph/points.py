"""Where the units of a layer meet their activation functions.

Every path from a layer is followed until the units meet their first activation function, or what
reads them. Usually there is one such point, and it is the same for all units. Where paths differ:

- A path through a mean or the like (squeeze-excite, a statistic of a norm) does not count beside
  one that keeps positions.
- What enters a residual stream, or leaves the network, as it is has no activation function.
- Several consumers behind norms and activation functions of their own (DenseNet) are several
  points. The functions must be the same.
- All else is unknown, with the reason.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from heapq import heappop, heappush

import torch
from torch import Tensor
from torch.fx import Node

from fastplastic.graph.ledger import Layer, Ledger
from fastplastic.graph.nodes import base_name, op_name
from fastplastic.graph.rules_elementwise import IDENTITY
from fastplastic.graph.rules_layout import LAYOUT, LAYOUT_AS

# These hand on some of the elements, as they are.
MOVING = frozenset((*LAYOUT, *LAYOUT_AS, *IDENTITY))
# Which elements these hand on, numbers say that are not known here: no rule, but no function.
PICKING = ("index", "index_select", "gather", "take_along_dim")


@dataclass(frozen=True)
class Point:
    """What some units of a layer meet at the end of a path.

    Attributes:
        function: Their activation function, or "identity" where something reads them without one.
        z: The node whose value is the pre-activation.
        h: The node of the activation function, or None.
        norm: Module name of the last BatchNorm before, or None.
        pooled: 0, or 1 where positions were pooled on the path, or 2 where the activation goes into
            a mean over units or the like only.
        own: Where rows of several layers are summed to one unit, the node that made those of this
            layer; else `z`.
        stream: The units are summed into a residual stream, or leave the network.
        reason: Why the function is "unknown".
    """

    function: str
    z: Node
    h: Node | None
    norm: str | None
    pooled: int
    own: Node
    stream: bool = False
    reason: str = ""


@dataclass(frozen=True)
class _Way:
    """How units came to a node: who made their values, alone and with others, norm and pooling."""

    made_by: Node
    own: Node
    norm: str | None
    pooled: bool


@dataclass(frozen=True, eq=False)
class _Here:
    """Numbers of the units of a layer, -1 for those that are not there, int32 [units].

    Attributes:
        ids: Those under which they stand in the value of a node.
        origin: Those in the value of the node that made them last.
    """

    ids: Tensor
    origin: Tensor

    def joined(self, other: "_Here | None") -> "_Here":
        """Return the units of both."""
        if other is None:
            return self
        return _Here(torch.maximum(self.ids, other.ids), torch.maximum(self.origin, other.origin))


@dataclass(frozen=True, eq=False)
class Meeting:
    """Units of a layer that have the same activation function.

    Attributes:
        units: bool [units of the layer].
        function: Its name, "identity" for none, or "unknown".
        reason: Why it is unknown.
        points: Where they meet it, each with the number under which every unit stands in the
            value of its node (-1 for none), int32 [units of the layer].
    """

    units: Tensor
    function: str
    reason: str
    points: tuple[tuple[Point, Tensor], ...]


class Points:
    """Finds the points of the layers of one ledger."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self._nodes = list(ledger.order)
        self._statistics: dict[Node, bool] = {}

    def meetings(self, layer: Layer) -> list[Meeting]:
        """Return which activation functions the units of a layer meet, every unit once."""
        found = self._search(layer)
        points, ids = list(found), torch.stack(list(found.values()))
        taken, groups = torch.unique((ids >= 0).T, dim=0, return_inverse=True)
        meetings = []
        for number, row in enumerate(taken.tolist()):
            units = groups == number
            mine = [point for point, present in zip(points, row, strict=True) if present]
            function, reason, chosen = _decide(mine)
            places = [(p, torch.where(units, found[p], -1)) for p in chosen]
            meetings.append(Meeting(units, function, reason, tuple(places)))
        return self._without_overwritten(layer, meetings)

    def _without_overwritten(self, layer: Layer, meetings: list[Meeting]) -> list[Meeting]:
        """Give up the units that were written to through a view: by what, nobody sees here."""
        units = torch.arange(layer.start, layer.stop)
        gone = torch.isin(units, torch.tensor(sorted(self.ledger.overwritten), dtype=torch.int64))
        if not gone.any():
            return meetings
        kept = [
            replace(m, units=m.units & ~gone,
                    points=tuple((p, torch.where(gone, -1, ids)) for p, ids in m.points))
            for m in meetings
        ]  # fmt: skip
        lost = Meeting(gone, "unknown", "written in place through a view", ())
        return [*(meeting for meeting in kept if meeting.units.any()), lost]

    def _search(self, layer: Layer) -> dict[Point, Tensor]:
        """Return every point of a layer and the numbers of the units there."""
        ledger = self.ledger
        start = torch.arange(layer.start, layer.stop, dtype=torch.int32)
        found: dict[Point, Tensor] = {}
        states = {layer.node: {_Way(layer.node, layer.node, None, False): _Here(start, start)}}
        todo = [ledger.order[layer.node]]
        while todo:
            node = self._nodes[heappop(todo)]
            for way, here in states.pop(node).items():
                for user in ledger.reads[node]:
                    goes_on = self._step(user, node, way, here, found)
                    if goes_on is None:
                        continue
                    if user not in states:
                        heappush(todo, ledger.order[user])
                    ways = states.setdefault(user, {})
                    ways[goes_on[0]] = goes_on[1].joined(ways.get(goes_on[0]))
        # Units that nothing reads.
        left = torch.stack([*found.values(), torch.full_like(start, -1)]).amax(0) < 0
        if left.any():
            alone = Point("identity", layer.node, None, None, 1, layer.node)
            _note(found, alone, torch.where(left, start, -1))
        return found

    def _step(
        self, user: Node, node: Node, way: _Way, here: _Here, found: dict[Point, Tensor]
    ) -> tuple[_Way, _Here] | None:
        """Take units from a node to one that reads it; return how they go on, if they do."""
        ledger = self.ledger
        if user in ledger.functions:
            name = ledger.functions[user]
            reason = f"{op_name(user)} is no activation function that is known"
            pooled = 2 if self._is_statistic(user) else int(way.pooled)
            reason = reason if name == "unknown" else ""
            point = Point(name, node, user, way.norm, pooled, node, reason=reason)
            _note(found, point, here.ids)
            return None
        moved = _renamed(here.ids, ledger.renamed.get(user))
        stay = torch.isin(moved, ledger.present(user)) & (moved >= 0)
        gone = (here.ids >= 0) & ~stay
        if bool(gone.any()) and base_name(op_name(user)) not in MOVING:
            _note(found, self._last(user, way), torch.where(gone, here.origin, -1))
        if not bool(stay.any()):
            return None
        pooled = way.pooled or user in ledger.reductions
        ids = torch.where(stay, moved, -1)
        if user in ledger.norms_at:
            return _Way(user, user, ledger.norms_at[user], pooled), _Here(ids, ids)
        if user in ledger.merges:
            return _Way(user, way.own, way.norm, pooled), _Here(ids, ids)
        origin = torch.where(stay, here.origin, -1)
        return _Way(way.made_by, way.own, way.norm, pooled), _Here(ids, origin)

    def _last(self, user: Node, way: _Way) -> Point:
        """Return the end of a path at a node that hands the units on to nobody."""
        ledger = self.ledger
        pooled = int(way.pooled or user in ledger.reductions)
        place = (way.made_by, None, way.norm, pooled, way.own)
        if user in ledger.opaque and ledger.opaque[user] not in PICKING:
            return Point("unknown", *place, reason=f"its value goes through {ledger.opaque[user]}")
        return Point("identity", *place, user.op == "output" or user in ledger.sums)

    def _is_statistic(self, node: Node) -> bool:
        """Tell whether a node's value is read by nothing but a mean over units or the like."""
        if node not in self._statistics:
            readers = self.ledger.reads[node]
            self._statistics[node] = bool(readers) and all(map(self._takes_statistic, readers))
        return self._statistics[node]

    def _takes_statistic(self, reader: Node) -> bool:
        if reader in self.ledger.reductions:
            return not len(self.ledger.present(reader))
        return base_name(op_name(reader)) in MOVING and self._is_statistic(reader)


def _note(found: dict[Point, Tensor], point: Point, ids: Tensor) -> None:
    """Add units to those at a point."""
    found[point] = torch.maximum(found[point], ids) if point in found else ids


def _renamed(ids: Tensor, names: dict[int, int] | None) -> Tensor:
    if not names:
        return ids
    return torch.tensor([names.get(unit, unit) for unit in ids.tolist()], dtype=ids.dtype)


def _decide(points: list[Point]) -> tuple[str, str, list[Point]]:
    """Return the activation function of units, why it is unknown, and the points that count."""
    least = min(point.pooled for point in points)
    main = [point for point in points if point.pooled == least]
    streams = [point for point in main if point.stream]
    if streams:
        return "identity", "", streams
    unknown = [point for point in main if point.function == "unknown"]
    if unknown:
        return "unknown", unknown[0].reason, unknown
    functions = sorted({point.function for point in main})
    if len(functions) > 1:
        return "unknown", f"read behind several functions: {', '.join(functions)}", main
    return functions[0], "", main


def upstream(ledger: Ledger, node: Node, ids: Tensor, also: str = "") -> Iterator[Node]:
    """Yield the node, and those before it with the same values of these units elsewhere.

    Args:
        ledger: The ledger.
        node: Where to start.
        ids: Numbers of units, -1 for none.
        also: Operators with names that begin so are passed, too.
    """
    wanted = ids[ids >= 0]
    found: Node | None = node
    while found is not None:
        yield found
        name = base_name(op_name(found))
        joins = name in ("cat", "concat", "concatenate", "stack")
        passed = joins or name in MOVING or (also and name.startswith(also))
        sources = ledger.sources.get(found, []) if passed else []
        found = next((s for s in sources if torch.isin(wanted, ledger.present(s)).all()), None)


def downstream(ledger: Ledger, node: Node, ids: Tensor, sole: bool) -> Iterator[Node]:
    """Yield the node, and those behind it with the same values of these units elsewhere.

    Args:
        ledger: The ledger.
        node: Where to start.
        ids: Numbers of units, -1 for none.
        sole: Only as long as nothing else reads them.
    """
    wanted = ids[ids >= 0]
    todo = [node]
    while todo:
        found = todo.pop(0)
        yield found
        readers = ledger.reads[found]
        if not sole or len(readers) == 1:
            todo += [
                reader
                for reader in readers
                if base_name(op_name(reader)) in MOVING
                and torch.isin(wanted, ledger.present(reader)).all()
            ]
