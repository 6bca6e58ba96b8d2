"""The state that the rules of `graph` share, and the table they register in.

A rule gets the walk, the node and its arguments with every tensor replaced by a `Value`, and
returns the `Value` of the output (or a list of them). It says which arguments it reads: units that
enter anywhere else are not hidden, and neither are those that enter an operator without a rule,
because nobody here knows where their values go.
"""

import operator
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ._flow import Layer, UnitFlow, Value, distinct

Rule = Callable[["Walk", Node, list[Any]], Any]
RULES: dict[str, Rule] = {}
# {operator: positions of the arguments that its rule reads, or None for all}.
OPERANDS: dict[str, frozenset[int] | None] = {}
# {operator: positions of the arguments that give a shape or a dtype alone}.
SHAPES: dict[str, frozenset[int]] = {}
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


@dataclass(eq=False)
class Program:
    """What the rules need to know of one traced program.

    Attributes:
        mode: "eval" or "train", that it was traced in.
        parameters: {node: (name, transposed)} of parameters and plain views of them.
        buffers: {node: name}.
        constants: {node: value} of tensors that the forward pass makes from numbers.
        uses: {parameter name: number of operators that read it}.
        owners: {node: name of the module that was running}.
        tied: {parameter name: all its names}.
        calls: How often each layer was called so far.
    """

    mode: str = "eval"
    parameters: dict[Node, tuple[str, bool]] = field(default_factory=dict)
    buffers: dict[Node, str] = field(default_factory=dict)
    constants: dict[Node, Tensor] = field(default_factory=dict)
    uses: Counter[str] = field(default_factory=Counter)
    owners: dict[Node, str] = field(default_factory=dict)
    tied: dict[str, tuple[str, ...]] = field(default_factory=dict)
    calls: Counter[str] = field(default_factory=Counter)


class Walk(UnitFlow):
    """A unit flow through one or two traced programs of one model, and what happened where.

    Attributes:
        program: The one that is being read.
        calls: Every call of a weight layer; `layers` has those that own units.
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
        super().__init__()
        self.program = Program()
        self.calls: list[Layer] = []
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


def rule(
    *names: str, reads: tuple[int, ...] | None = (0,), shapes: tuple[int, ...] = ()
) -> Callable[[Rule], Rule]:
    """Register a rule for operators of these names.

    Args:
        names: Names without "_" at the end.
        reads: Positions of the arguments whose units the rule decides on; None for all of them.
        shapes: Positions of those that give a shape or a dtype alone.
    """

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        OPERANDS.update(dict.fromkeys(names, None if reads is None else frozenset(reads)))
        SHAPES.update(dict.fromkeys(names, frozenset(shapes)))
        return function

    return register


def data_sources(node: Node, resolved: list[Node]) -> list[Node]:
    """Return the nodes whose values the node reads, not those that give a shape alone.

    Args:
        node: The node.
        resolved: What stands for each of `node.all_input_nodes`.
    """
    shapes = SHAPES.get(base_name(op_name(node)), frozenset())
    needed: set[Node] = set()
    data = [arg for at, arg in enumerate(node.args) if at not in shapes]
    torch.fx.node.map_arg((data, dict(node.kwargs)), needed.add)
    pairs = zip(node.all_input_nodes, resolved, strict=True)
    return [source for raw, source in pairs if raw in needed]


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
    walk.opaque[node] = op_name(node)
    for value in values:
        walk.leak(value.ids, f"passes through {op_name(node)}, which may mix units")
    return plain(node, all(value.const for value in values))


def plain(node: Node, const: bool = False) -> Any:
    """Return the output of `node` without units."""
    out = node.meta.get("val")
    if isinstance(out, (list, tuple)):
        return [Value(tuple(getattr(item, "shape", ())), None, const) for item in out]
    return Value(shape_of(node), None, const)


def live_first(walk: Walk, values: list[Value]) -> list[Value]:
    """Return the values, those without units that may be hidden as data beside one that has some.

    Behind a LayerNorm units are followed only to see which activation function they meet.
    """
    live = [value.ids is not None and walk.any_open(value.ids) for value in values]
    if not any(live):
        return values
    return [
        value if alive or value.ids is None else Value(value.shape)
        for value, alive in zip(values, live, strict=True)
    ]


def branch_point(node: Node) -> bool:
    """Tell whether more than one operator reads the node's value as a whole."""
    users = [user for user in node.users if op_name(user) not in ("sym_size", "size")]
    return len(users) > 1 and not all(base_name(op_name(user)) in _SLICING for user in users)
