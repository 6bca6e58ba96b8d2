"""Where a module hook sees the tensor of a traced node."""

from collections import defaultdict
from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node

from fastplastic.graph.ledger import Layer, Ledger
from fastplastic.graph.nodes import innermost_module, module_calls
from fastplastic.graph.values import Value, along
from fastplastic.wiring import ARGUMENTS, Site

_ATTENTION = f"{nn.MultiheadAttention.__module__}.{nn.MultiheadAttention.__qualname__}"
_VIEWS = (torch.ops.aten.view.default, torch.ops.aten.reshape.default)


class Sites:
    """Finds hooks for the nodes of one traced graph."""

    def __init__(self, graph: Graph, ledger: Ledger) -> None:
        self._ledger = ledger
        self._calls_of: dict[str, set[str]] = defaultdict(set)
        self._exits: dict[str, set[Node]] = defaultdict(set)
        self._entries: dict[str, set[Node]] = defaultdict(set)
        for node in graph.nodes:
            calls = module_calls(node)
            for call, name in calls.items():
                self._calls_of[name].add(call)
            for source in ledger.sources.get(node, node.all_input_nodes):
                before = module_calls(source)
                for call in before.keys() - calls.keys():
                    self._exits[call].add(source)
                for call in calls.keys() - before.keys():
                    if isinstance(ledger.made.get(source), Value) and source.op != "placeholder":
                        self._entries[call].add(source)

    def find(self, node: Node, units: Tensor) -> Site | None:
        """Return where a hook sees the node's tensor, or None.

        Args:
            node: A traced node.
            units: int32 [units of a layer], the number under which each stands in the tensor, -1
                for those that are not wanted.
        """
        place = self._output_of(node) or self._input_of(node)
        while place is None and (view := _only_view(node)) is not None:
            # Hugging Face's Conv1D gives its output the shape of its input.
            node = view
            place = self._output_of(node) or self._input_of(node)
        value = self._ledger.made.get(node)
        if place is None or not isinstance(value, Value) or value.ids is None:
            return None
        found = _axis(value.ids, units[units >= 0])
        if found is None:
            return None
        axis, numbers = found
        return Site(*place, axis, _unit_of_channel(numbers, units))

    def first(self, nodes: Iterable[Node], units: Tensor) -> Site | None:
        """Return the site of the first of some nodes that has one."""
        return next((site for node in nodes if (site := self.find(node, units))), None)

    def _output_of(self, node: Node) -> tuple[str, Literal["input", "output"]] | None:
        """Return the innermost module whose only output is the node."""
        for call, name in reversed(module_calls(node).items()):
            if name and self._exits[call] == {node} and self._once(name, node):
                return name, "output"
        return None

    def _input_of(self, node: Node) -> tuple[str, Literal["input", "output"]] | None:
        """Return a module that is called once with the node as its only input."""
        own = module_calls(node)
        # Not the users in the graph: some may see the tensor after it was written in place.
        for user in self._ledger.reads[node]:
            calls = [(call, name) for call, name in module_calls(user).items() if call not in own]
            plain = bool(user.args) and isinstance(user.args[0], Node)
            first = plain and self._ledger.sources[user][:1] == [node]
            for call, name in reversed(calls):
                once = len(self._calls_of[name]) == 1
                if name and first and once and self._entries[call] == {node}:
                    return name, "input"
        return None

    def _once(self, name: str, node: Node) -> bool:
        """Tell whether every call of the module is this one, or runs the same weight layer."""
        target = node.args[1] if len(node.args) > 1 else None
        owned = isinstance(target, Node) and target.op == "placeholder" and len(target.users) > 1
        return len(self._calls_of[name]) == 1 or owned


def projection_sites(layer: Layer) -> list[Site]:
    """Return where rows of an input projection of `nn.MultiheadAttention` are seen; [] for others.

    No module of its own computes it: the rows are found by the argument that they multiply.
    """
    owner, kind = innermost_module(layer.node)
    weight = layer.weight.removeprefix(f"{owner}." if owner else "")
    rows = torch.arange(layer.n_units)
    if kind != _ATTENTION:
        return []
    if weight != "in_proj_weight":
        return [Site(owner, x, -1, rows) for x in ARGUMENTS if weight == f"{x[0]}_proj_weight"]
    return [Site(owner, x, -1, r) for x, r in zip(ARGUMENTS, rows.chunk(3), strict=True)]


def _only_view(node: Node) -> Node | None:
    """Return the node's only user if that has the same elements in another shape."""
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0].target in _VIEWS else None


def _axis(ids: Tensor, wanted: Tensor) -> tuple[int, Tensor] | None:
    """Return the dimension that runs over the wanted units, and the unit at each index.

    A single unit is at each index of every dimension: it is that of size 1 then, not of the batch.
    """
    found = [(axis, units) for axis in range(ids.dim()) if (units := along(ids, axis)) is not None]
    fitting = [own for own in found if bool(torch.isin(wanted, own[1]).all())]

    def fewest_repeats(own: tuple[int, Tensor]) -> tuple[int, int, int]:
        axis, units = own
        return len(set(units.tolist())) - len(units), len(units), axis

    return max(fitting, key=fewest_repeats, default=None)


def _unit_of_channel(numbers: Tensor, units: Tensor) -> Tensor:
    """Return the place in `units` of each number, -1 for those that are not there."""
    order = units.argsort()
    at = torch.searchsorted(units[order], numbers).clamp(max=len(units) - 1)
    place = order[at]
    return torch.where((units[place] == numbers) & (numbers >= 0), place, -1)
