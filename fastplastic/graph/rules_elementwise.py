"""Rules for elementwise operators: activation functions, sums and products."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fastplastic.graph.ledger import Layer, Ledger
from fastplastic.graph.nodes import base_name, op_name, shape_of
from fastplastic.graph.rules import live_first, rule, unknown
from fastplastic.graph.rules_layout import LAYOUT, LAYOUT_AS, reduction
from fastplastic.graph.values import (
    DATA,
    Value,
    collapse,
    plain,
    values_in,
    without_common_repeats,
)
from fastplastic.kernels import ACTIVATIONS

# Parameters, by their positions, with which these are the functions of their names.
_DEFAULTS = {
    "elu": {1: 1.0, 2: 1.0, 3: 1.0}, "celu": {1: 1.0}, "softplus": {1: 1.0, 2: 20.0},
}  # fmt: skip
# (lowest, highest) value.
_CLAMPS: dict[Any, str] = {
    (0, None): "relu", (0, 6): "relu6", (-1, 1): "hardtanh",
    (None, None): "identity", (-math.inf, math.inf): "identity",
}  # fmt: skip
_BY_OPERATOR = {
    operator: name for name, function in ACTIVATIONS.items() for operator in function.operators
}
# Elementwise on one tensor: every element stays with its unit.
UNARY = (
    "abs sqrt rsqrt exp log log1p expm1 erf sin cos square reciprocal round floor ceil clamp "
    "clamp_min clamp_max sign nan_to_num prelu rrelu threshold softshrink hardshrink softsign "
    "log_sigmoid pow celu hardtanh elu leaky_relu gelu softplus"
).split()
IDENTITY = (
    "dropout feature_dropout alpha_dropout to _to_copy type_as float half bfloat16 double "
    "contiguous clone alias detach lift_fresh_copy lift_fresh"
).split()


@rule(*_BY_OPERATOR, *UNARY, reads=None)
def unary(ledger: Ledger, node: Node, args: list[Any]) -> Any:
    value, name = args[0], base_name(op_name(node))
    # A power may have a number below a tensor.
    if not isinstance(value, Value) or any(x.ids is not None for x in values_in(args[1:])):
        return unknown(ledger, node, args)
    if value.ids is None:
        return plain(node, value.const)
    function = activation_name(name, node, args)
    return (
        identity(ledger, node, args)
        if function == "identity"
        else activate(ledger, node, value, function)
    )


def activate(ledger: Ledger, node: Node, value: Value, name: str) -> Value:
    """Note the activation function that units meet."""
    ledger.functions[node] = name
    return Value(value.shape, value.ids)


def activation_name(name: str, node: Node, args: list[Any]) -> str:
    """Return the name in `kernels.ACTIVATIONS`, with ":slope" for leaky ReLUs, or "unknown"."""
    options = _by_position(node, args)
    if name == "gelu":
        return "gelu_tanh" if options.get(1, "none") == "tanh" else "gelu"
    if name in ("hardtanh", "clamp", "clamp_min"):
        default = (-1.0, 1.0) if name == "hardtanh" else (None, None)
        ends = options.get(1, default[0]), options.get(2, default[1])
        return _CLAMPS.get(ends, "unknown")
    if name == "leaky_relu":
        slope = float(options.get(1, 0.01))
        return "leaky_relu" if slope == 0.01 else f"leaky_relu:{slope:g}"
    if name in _DEFAULTS:
        usual = all(float(options.get(at, v)) == v for at, v in _DEFAULTS[name].items())
        return name if usual else "unknown"
    if name == "threshold":
        return "relu" if (options.get(1), options.get(2)) == (0, 0) else "unknown"
    return _BY_OPERATOR.get(name, "unknown")


def _by_position(node: Node, args: list[Any]) -> dict[int, Any]:
    """Return the arguments of an operator, those with a keyword too, by their positions."""
    schema = getattr(node.target, "_schema", None)
    names = [argument.name for argument in schema.arguments] if schema is not None else []
    keywords = {names.index(key): value for key, value in node.kwargs.items() if key in names}
    return dict(enumerate(args)) | keywords


@rule("neg")
def negate(ledger: Ledger, node: Node, args: list[Any]) -> Any:
    return Value(shape_of(node), args[0].ids, args[0].const, args[0].pristine)


@rule(*IDENTITY, shapes=(1,))
def identity(ledger: Ledger, node: Node, args: list[Any]) -> Any:
    return Value(shape_of(node), args[0].ids, args[0].const, args[0].pristine)


@rule("masked_fill", "where", reads=None)
def select_positions(ledger: Ledger, node: Node, args: list[Any]) -> Any:
    """Choose between two values by a mask: like a sum, a unit survives a constant only."""
    mask, sides = (args[1], [args[0], args[2]]) if op_name(node) != "where" else (args[0], args[1:])
    if mask.ids is not None:
        # The value of a unit decides: this may be an activation function.
        ledger.opaque[node] = op_name(node)
    ledger.leak(mask.ids, "selects positions in a mask")
    return combine(ledger, node, sides)


@rule("max", "min", reads=(0, 1))
def compare_or_reduce(ledger: Ledger, node: Node, args: list[Any]) -> Any:
    two = len(args) > 1 and isinstance(args[1], Value)
    return compare(ledger, node, args) if two else reduction(ledger, node, args)


@rule("maximum", "minimum", reads=(0, 1))
def compare(ledger: Ledger, node: Node, args: list[Any]) -> Any:
    """Take the larger or smaller of two values: with 0, the larger is a ReLU."""
    first, second = (_broadcast(arg, shape_of(node)) for arg in args[:2])
    if first.ids is None and second.ids is None:
        return plain(node, first.const and second.const)
    if first.const or second.const:
        zero = _is_zero(ledger, node.args[0] if first.const else node.args[1])
        name = "relu" if zero and op_name(node) in ("max", "maximum") else "unknown"
        return activate(ledger, node, second if first.const else first, name)
    ledger.opaque[node] = op_name(node)
    for value in (first, second):
        ledger.leak(value.ids, "compared with other values")
    return plain(node)


def _is_zero(ledger: Ledger, arg: Any) -> bool:
    """Tell whether an argument is 0, or a tensor that the forward pass fills with 0."""
    while isinstance(arg, Node):
        if arg in ledger.program.constants:
            return not ledger.program.constants[arg].any()
        name = base_name(op_name(arg))
        if name in ("zeros", "zeros_like", "new_zeros"):
            return True
        filled = {"full": 1, "full_like": 1, "new_full": 2, "scalar_tensor": 0}
        if name not in filled and name not in (*IDENTITY, "expand", "view", "reshape"):
            return False
        arg = arg.args[filled.get(name, 0)]
    return bool(arg == 0)


@rule("add", "sub", "rsub", "subtract", "__add__", reads=(0, 1))
def combine(ledger: Ledger, node: Node, args: list[Any]) -> Any:
    """Sum two values: a unit survives a constant and itself, nothing else."""
    shape = shape_of(node)
    args = [*live_first(ledger, args[:2])] if len(values_in(args[:2])) == 2 else args
    first, second = (_broadcast(arg, shape) for arg in args[:2])
    if first.ids is None and second.ids is None:
        return plain(node, first.const and second.const)
    if first.const or second.const:
        # A constant behind the activation function goes with the column that reads it.
        value = second if first.const else first
        return Value(shape, value.ids, pristine=value.pristine)
    branches = _parallel(ledger, first, second)
    if branches:
        return _sum_branches(ledger, node, first, second, branches)
    ledger.sums.add(node)
    for value, other in ((first, args[1]), (second, args[0])):
        if value.ids is not None and _shared_by_all(value, other):
            ledger.leak(value.ids, "shifted by a value that depends on other units")
            return Value(shape, value.ids)
    return _merge(ledger, node, first, second, "summed into a residual stream")


def _shared_by_all(value: Value, other: Any) -> bool:
    """Tell whether a summand without units is the same for all units at a position, as a mean."""
    assert value.ids is not None
    if not isinstance(other, Value) or other.ids is not None:
        return False
    varying = _varying(value.ids)
    sizes = (1,) * (value.ids.dim() - len(other.shape)) + other.shape
    return bool(varying) and all(sizes[dim] == 1 for dim in varying)


def _merge(ledger: Ledger, node: Node, first: Value, second: Value, reason: str) -> Value:
    """Keep units where both values have the same, mark all the others."""
    left, right = without_common_repeats(first.filled(), second.filled())
    same, data = left == right, torch.tensor(DATA, dtype=torch.int32)
    for side in (left, right):
        ledger.leak(torch.where(same, data, side), reason)
    shape = shape_of(node)
    return Value(shape, collapse(torch.where(same, left, data).expand(shape)))


def _broadcast(arg: Any, shape: tuple[int, ...]) -> Value:
    if not isinstance(arg, Value):
        return Value(shape, None, const=True)
    ids = None if arg.ids is None else arg.ids.expand(shape)
    return Value(shape, ids, arg.const, arg.pristine)


def _parallel(ledger: Ledger, first: Value, second: Value) -> list[tuple[Layer, Layer]]:
    """Return pairs of layers that read the same input and are summed channel by channel."""
    ones, twos = ledger.layers_in(first), ledger.layers_in(second)
    pairs = [(a, b) for a in ones for b in twos if a.source is b.source and a.n_units == b.n_units]
    if not pairs or first.ids is None or second.ids is None:
        return []
    a, b = pairs[0]
    shifted = torch.equal(first.ids - a.start, second.ids - b.start)
    return pairs if shifted and bool((first.ids >= 0).all()) else []


def _sum_branches(
    ledger: Ledger, node: Node, first: Value, second: Value, pairs: list[tuple[Layer, Layer]]
) -> Value:
    """Make one unit of the rows of parallel branches (RepVGG, MobileOne)."""
    a, b = pairs[0]
    for row in range(a.n_units):
        ledger.couple(a.start + row, b.start + row)
    ledger.merges.add(node)
    ledger.renamed[node] = {b.start + row: a.start + row for row in range(a.n_units)}
    return Value(first.shape, first.ids, pristine=True)


@rule("mul", "multiply", "div", "true_divide", "__mul__", reads=(0, 1))
def scale(ledger: Ledger, node: Node, args: list[Any]) -> Any:
    """Multiply two values: a broadcast factor is a gate, factors of one shape are coupled."""
    shape = shape_of(node)
    args = [*live_first(ledger, args[:2])] if len(values_in(args[:2])) == 2 else args
    first, second = (_broadcast(arg, shape) for arg in args[:2])
    if first.ids is None and second.ids is None:
        return plain(node, first.const and second.const)
    divides = base_name(op_name(node)) in ("div", "true_divide")
    if first.const and divides:
        return activate(ledger, node, second, "unknown")
    if first.const or second.const:
        value = second if first.const else first
        return Value(shape, value.ids, pristine=value.pristine)
    if first.ids is not None and second.ids is not None and torch.equal(first.ids, second.ids):
        return _times_itself(ledger, node, first)
    wide = [True, False] if divides else [x.shape == shape for x in values_in(args[:2])]
    if all(wide) and first.ids is not None and second.ids is not None:
        return _gate_pairs(ledger, node, first, second)
    kept = next(
        (v for v, w in ((first, wide[0]), (second, wide[1])) if w and v.ids is not None), None
    )
    for value in (first, second):
        if value is not kept:
            ledger.leak(value.ids, "gates other units by multiplication")
    return plain(node) if kept is None else Value(shape, kept.ids)


def _times_itself(ledger: Ledger, node: Node, value: Value) -> Value:
    """Multiply units by a function of themselves: their mean or norm is a gate."""
    if [_is_summary(ledger, arg) for arg in node.args[:2]].count(True) != 1:
        ledger.functions[node] = "unknown"
    return Value(shape_of(node), value.ids)


def _is_summary(ledger: Ledger, arg: Any) -> bool:
    """Tell whether an argument is made of a mean, a norm or the like over positions."""
    while isinstance(arg, Node) and arg not in ledger.reductions:
        name = base_name(op_name(arg))
        if name not in (*LAYOUT, *LAYOUT_AS, *IDENTITY, *UNARY, *_BY_OPERATOR, "add", "neg"):
            return False
        arg = arg.args[0] if arg.args else None
    return isinstance(arg, Node)


def _gate_pairs(ledger: Ledger, node: Node, first: Value, second: Value) -> Value:
    """Couple the two factors of a gated MLP (SwiGLU), when their units pair off one to one."""
    assert first.ids is not None and second.ids is not None
    pairs = _pairs(first.ids, second.ids)
    if pairs is None and not _varying(first.ids) & _varying(second.ids):
        ledger.leak(second.ids, "gates other units by multiplication")
        return Value(shape_of(node), first.ids)
    if pairs is None:
        ledger.leak(first.ids, "multiplies other values")
        ledger.leak(second.ids, "multiplies other values")
        return Value(shape_of(node))
    for a, b in pairs:
        ledger.couple(a, b)
    ledger.renamed[node] = {b: a for a, b in pairs}
    return Value(shape_of(node), first.ids)


def _varying(ids: Tensor) -> set[int]:
    """Return the dimensions along which the units change."""
    return {dim for dim in range(ids.dim()) if ids.shape[dim] > 1 and ids.stride(dim) != 0}


def _pairs(first: Tensor, second: Tensor) -> list[tuple[int, int]] | None:
    """Return the pairs of units that meet in two tensors, or None when they do not pair off."""
    ones, twos = (ids.flatten().long() for ids in without_common_repeats(first, second))
    if not len(ones) or min(int(ones.min()), int(twos.min())) < 0:
        return None
    partner = torch.full((int(ones.max()) + 1,), -1)
    partner[ones] = twos
    units = (partner >= 0).nonzero().flatten()
    others = partner[units]
    # Each has one partner, and no two have the same one.
    if not torch.equal(partner[ones], twos) or len(torch.unique(others)) < len(others):
        return None
    return list(zip(units.tolist(), others.tolist(), strict=True))
