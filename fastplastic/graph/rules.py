"""The table in which the rules of the unit graph register, one rule for each operator.

A rule gets the ledger, the node and its arguments with every tensor replaced by a `Value`, and
returns the `Value` of the output (or a list of them). It says which arguments it reads: units that
enter anywhere else are not hidden, and neither are those that enter an operator without a rule,
because nobody here knows where their values go.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from fastplastic.graph.ledger import Ledger
from fastplastic.graph.nodes import base_name, op_name
from fastplastic.graph.values import Value, plain, values_in

Rule = Callable[[Ledger, Node, list[Any]], Any]
RULES: dict[str, Rule] = {}
# {operator: positions of the arguments that its rule reads, or None for all}.
OPERANDS: dict[str, frozenset[int] | None] = {}
# {operator: positions of the arguments that give a shape or a dtype alone}.
SHAPES: dict[str, frozenset[int]] = {}


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


def unknown(ledger: Ledger, node: Node, args: list[Any]) -> Any:
    """Mark every unit that enters an operator without a rule."""
    values = values_in(args)
    ledger.opaque[node] = op_name(node)
    for value in values:
        ledger.leak(value.ids, f"passes through {op_name(node)}, which may mix units")
    return plain(node, all(value.const for value in values))


def live_first(ledger: Ledger, values: list[Value]) -> list[Value]:
    """Return the values, those without units that may be hidden as data beside one that has some.

    Behind a LayerNorm units are followed only to see which activation function they meet.
    """
    live = [value.ids is not None and ledger.any_open(value.ids) for value in values]
    if not any(live):
        return values
    return [
        value if alive or value.ids is None else Value(value.shape)
        for value, alive in zip(values, live, strict=True)
    ]
