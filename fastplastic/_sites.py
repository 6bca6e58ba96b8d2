"""Where a module hook sees the tensor of a traced node."""

from collections import defaultdict
from typing import Literal

import torch
from torch.fx import Graph, Node

from ._flow import Layer, Value, along
from .wiring import Site

_VIEWS = (torch.ops.aten.view.default, torch.ops.aten.reshape.default)


def module_calls(node: Node) -> dict[str, str]:
    """Return {call: module name} of the modules that were running, the outermost first."""
    stack = node.meta.get("nn_module_stack") or {}
    return {str(call): str(entry[0]) for call, entry in stack.items()}


class Sites:
    """Finds hooks for the nodes of one traced graph."""

    def __init__(self, graph: Graph, values: dict[Node, object]) -> None:
        self._values = values
        self._calls_of: dict[str, set[str]] = defaultdict(set)
        self._exits: dict[str, set[Node]] = defaultdict(set)
        self._entries: dict[str, set[Node]] = defaultdict(set)
        for node in graph.nodes:
            calls = module_calls(node)
            for call, name in calls.items():
                self._calls_of[name].add(call)
            for source in node.all_input_nodes:
                before = module_calls(source)
                for call in before.keys() - calls.keys():
                    self._exits[call].add(source)
                for call in calls.keys() - before.keys():
                    if isinstance(self._values.get(source), Value) and source.op != "placeholder":
                        self._entries[call].add(source)

    def find(self, node: Node, layers: list[Layer]) -> dict[str, Site]:
        """Return a site for each of `layers` (by name) whose units are all in the node's tensor."""
        place = self._output_of(node) or self._input_of(node)
        while place is None and (view := _only_view(node)) is not None:
            # Hugging Face's Conv1D gives its output the shape of its input.
            node = view
            place = self._output_of(node) or self._input_of(node)
        value = self._values.get(node)
        if place is None or not isinstance(value, Value) or value.ids is None:
            return {}
        found = _axis(value, layers)
        if found is None:
            return {}
        axis, units = found
        module, where = place
        return {
            layer.name: Site(module, where, axis, _local(units, layer.start, layer.stop))
            for layer in layers
        }

    def _output_of(self, node: Node) -> tuple[str, Literal["input", "output"]] | None:
        """Return the innermost module whose only output is the node."""
        for call, name in reversed(module_calls(node).items()):
            if name and self._exits[call] == {node} and self._once(call, name, node):
                return name, "output"
        return None

    def _input_of(self, node: Node) -> tuple[str, Literal["input", "output"]] | None:
        """Return a module that is called once with the node as its only input."""
        own = module_calls(node)
        for user in node.users:
            calls = [(call, name) for call, name in module_calls(user).items() if call not in own]
            for call, name in reversed(calls):
                first = bool(user.args) and user.args[0] is node
                if (
                    name
                    and first
                    and self._entries[call] == {node}
                    and len(self._calls_of[name]) == 1
                ):
                    return name, "input"
        return None

    def _once(self, call: str, name: str, node: Node) -> bool:
        """Tell whether every call of the module is this one, or runs the same weight layer."""
        target = node.args[1] if len(node.args) > 1 else None
        owned = isinstance(target, Node) and target.op == "placeholder" and len(target.users) > 1
        return len(self._calls_of[name]) == 1 or owned


def _only_view(node: Node) -> Node | None:
    """Return the node's only user if that has the same elements in another shape."""
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0].target in _VIEWS else None


def _axis(value: Value, layers: list[Layer]) -> tuple[int, torch.Tensor] | None:
    """Return the dimension that runs over the units, and the unit at each index."""
    assert value.ids is not None
    best = None
    for axis in range(value.ids.dim()):
        units = along(value.ids, axis)
        if units is None:
            continue
        inside = [int(((units >= x.start) & (units < x.stop)).sum()) for x in layers]
        complete = all(count >= x.n_units for count, x in zip(inside, layers, strict=True))
        if complete and (best is None or len(units) >= len(best[1])):
            best = axis, units
    return best


def _local(units: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    own = (units >= start) & (units < stop)
    return torch.where(own, units - start, -1).long()
