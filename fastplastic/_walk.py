"""The state that the rules of `graph` share, and the table they register in.

A rule gets the walk, the node and its arguments with every tensor replaced by a `Value`, and
returns the `Value` of the output (or a list of them). An operator without a rule marks every unit
that enters it: the unit is then not hidden, because nobody here knows where its value goes.
"""

import operator
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.fx import Node

from ._flow import Layer, UnitFlow, Value

Rule = Callable[["Walk", Node, list[Any]], Any]
RULES: dict[str, Rule] = {}
_SLICING = ("select", "slice", "narrow", "getitem")


def op_name(node: Node) -> str:
    """Return the operator's name without namespace and overload: "conv2d", "getitem"."""
    if node.target is operator.getitem:
        return "getitem"
    name = getattr(node.target, "_opname", None)
    return str(name) if name is not None else str(getattr(node.target, "__name__", node.target))


def base_name(name: str) -> str:
    """Return the name of the out-of-place operator for an in-place one."""
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name


def shape_of(node: Node) -> tuple[int, ...]:
    """Return the shape of the node's tensor, or () when it is no tensor."""
    value = node.meta.get("val")
    return tuple(int(size) for size in value.shape) if isinstance(value, Tensor) else ()


class Walk(UnitFlow):
    """A unit flow with what the rules need to know of the traced program."""

    def __init__(
        self,
        parameters: dict[Node, tuple[str, bool]],
        buffers: dict[Node, str],
        uses: dict[str, int],
        owners: dict[Node, str],
    ) -> None:
        super().__init__()
        self.parameters = parameters
        self.buffers = buffers
        self.uses = uses
        self.owners = owners
        self.made: dict[Node, Any] = {}
        # Nodes with a pristine value that several operators read.
        self.branched: set[Node] = set()

    def parameter(self, node: Any) -> tuple[str | None, bool]:
        """Return (name, transposed) of the parameter that `node` is, or (None, False)."""
        return self.parameters.get(node, (None, False)) if isinstance(node, Node) else (None, False)

    def layers_in(self, value: Value) -> list[Layer]:
        """Return the layers all of whose units stand in a pristine value."""
        if not value.pristine or value.ids is None:
            return []
        return self.layers_all_in(value.ids)


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for operators of these names."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def values_in(args: Any) -> list[Value]:
    """Return every `Value` in nested arguments."""
    if isinstance(args, Value):
        return [args]
    if isinstance(args, (list, tuple)):
        return [value for arg in args for value in values_in(arg)]
    return []


def unknown(walk: Walk, node: Node, args: list[Any]) -> Any:
    """Mark every unit that enters an operator without a rule."""
    values = values_in(args)
    for value in values:
        walk.leak(value.ids, f"passes through {op_name(node)}, which may mix units")
    return plain(node, all(value.const for value in values))


def plain(node: Node, const: bool = False) -> Any:
    """Return the output of `node` without units."""
    out = node.meta.get("val")
    if isinstance(out, (list, tuple)):
        return [Value(tuple(getattr(item, "shape", ())), None, const) for item in out]
    return Value(shape_of(node), None, const)


def branch_point(node: Node) -> bool:
    """Tell whether more than one operator reads the node's value as a whole."""
    users = [user for user in node.users if op_name(user) not in ("sym_size", "size")]
    return len(users) > 1 and not all(base_name(op_name(user)) in _SLICING for user in users)
