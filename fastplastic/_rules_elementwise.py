"""Rules for elementwise operators: activation functions, sums and products."""

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ._flow import DATA, Layer, Value, collapse, distinct
from ._walk import Walk, base_name, op_name, plain, rule, shape_of, unknown, values_in

ACTIVATIONS = {
    "relu": "relu", "relu6": "relu6", "selu": "selu", "silu": "silu", "mish": "mish",
    "sigmoid": "sigmoid", "tanh": "tanh", "hardswish": "hardswish", "hardsigmoid": "hardsigmoid",
}  # fmt: skip
# Elementwise on one tensor: every element stays with its unit.
UNARY = (
    "neg abs sqrt rsqrt exp log log1p expm1 erf sin cos square reciprocal round floor ceil clamp "
    "clamp_min clamp_max sign nan_to_num prelu rrelu threshold softshrink hardshrink softsign "
    "log_sigmoid pow celu hardtanh elu leaky_relu gelu softplus"
).split()
IDENTITY = (
    "dropout feature_dropout alpha_dropout to _to_copy type_as float half bfloat16 double "
    "contiguous clone alias detach lift_fresh_copy lift_fresh"
).split()


@rule(*ACTIVATIONS, *UNARY)
def unary(walk: Walk, node: Node, args: list[Any]) -> Any:
    value, name = args[0], base_name(op_name(node))
    # A power may have a number below a tensor.
    if not isinstance(value, Value) or any(x.ids is not None for x in values_in(args[1:])):
        return unknown(walk, node, args)
    if value.ids is None:
        return plain(node, value.const)
    return activate(walk, node, value, activation_name(name, node, args))


def activate(walk: Walk, node: Node, value: Value, name: str) -> Value:
    """Note the activation function of units that meet their first one."""
    if value.pristine and value.ids is not None:
        for unit in distinct(value.ids):
            layer = walk.layer_at(unit)
            layer.activations.setdefault(unit - layer.start, name)
        for layer in walk.layers_in(value):
            layer.h_node = node
            layer.z_node = layer.pending or layer.z_node
    return Value(value.shape, value.ids)


def activation_name(name: str, node: Node, args: list[Any]) -> str:
    """Return the name in `kernels.ACTIVATIONS`, with ":slope" for leaky ReLUs, or "unknown"."""
    options: dict[Any, Any] = {**dict(enumerate(args)), **node.kwargs}
    if name == "gelu":
        return "gelu_tanh" if options.get("approximate", "none") == "tanh" else "gelu"
    if name in ("hardtanh", "clamp"):
        low, high = options.get(1, -1.0), options.get(2, 1.0)
        return {(0, 6): "relu6", (-1, 1): "hardtanh"}.get((low, high), "unknown")
    if name == "leaky_relu":
        slope = float(options.get(1, 0.01))
        return "leaky_relu" if slope == 0.01 else f"leaky_relu:{slope:g}"
    if name in ("elu", "celu"):
        return (
            name
            if all(float(v) == 1.0 for k, v in options.items() if k in (1, 2, 3))
            else "unknown"
        )
    if name == "softplus":
        return (
            name
            if float(options.get(1, 1.0)) == 1.0 and float(options.get(2, 20.0)) == 20.0
            else "unknown"
        )
    if name == "clamp_min" and options.get(1) == 0:
        return "relu"
    return ACTIVATIONS.get(name, "unknown")


@rule(*IDENTITY)
def identity(walk: Walk, node: Node, args: list[Any]) -> Any:
    return Value(shape_of(node), args[0].ids, args[0].const, args[0].pristine)


@rule("masked_fill", "where")
def select_positions(walk: Walk, node: Node, args: list[Any]) -> Any:
    """Choose between two values by a mask: like a sum, a unit survives a constant only."""
    mask, sides = (args[1], [args[0], args[2]]) if op_name(node) != "where" else (args[0], args[1:])
    walk.leak(mask.ids, "selects positions in a mask")
    return combine(walk, node, sides)


@rule("add", "sub", "rsub", "subtract", "maximum", "minimum", "__add__")
def combine(walk: Walk, node: Node, args: list[Any]) -> Any:
    """Sum two values: a unit survives a constant and itself, nothing else."""
    first, second = (_broadcast(arg, shape_of(node)) for arg in args[:2])
    if first.ids is None and second.ids is None:
        return plain(node, first.const and second.const)
    if first.const or second.const:
        value = second if first.const else first
        if not value.pristine:
            walk.leak(value.ids, "a constant is added behind its activation function")
        return _adjusted(walk, node, value)
    branches = _parallel(walk, first, second)
    if branches:
        return _sum_branches(walk, node, first, second, branches)
    same = first.filled() == second.filled()
    return _merge(walk, node, first, second, same, "summed into a residual stream")


def _merge(walk: Walk, node: Node, first: Value, second: Value, keep: Tensor, reason: str) -> Value:
    """Keep the units of `first` where `keep`, mark all the others."""
    for value in (first, second):
        walk.leak(torch.where(keep, torch.tensor(DATA, dtype=torch.int32), value.filled()), reason)
    left, right = first.filled(), second.filled()
    data = torch.tensor(DATA, dtype=torch.int32)
    return Value(shape_of(node), collapse(torch.where(keep, left.expand_as(right), data)))


def _adjusted(walk: Walk, node: Node, value: Value) -> Value:
    """Carry units through an operation with a constant; it belongs to the pre-activation."""
    for layer in walk.layers_in(value):
        layer.pending = node
    return Value(shape_of(node), value.ids, pristine=value.pristine)


def _broadcast(arg: Any, shape: tuple[int, ...]) -> Value:
    if not isinstance(arg, Value):
        return Value(shape, None, const=True)
    ids = None if arg.ids is None else arg.ids.expand(shape)
    return Value(shape, ids, arg.const, arg.pristine)


def _parallel(walk: Walk, first: Value, second: Value) -> list[tuple[Layer, Layer]]:
    """Return pairs of layers that read the same input and are summed channel by channel."""
    ones, twos = walk.layers_in(first), walk.layers_in(second)
    pairs = [(a, b) for a in ones for b in twos if a.source is b.source and a.n_units == b.n_units]
    if not pairs or first.ids is None or second.ids is None:
        return []
    a, b = pairs[0]
    shifted = torch.equal(first.ids - a.start, second.ids - b.start)
    return pairs if shifted and bool((first.ids >= 0).all()) else []


def _sum_branches(
    walk: Walk, node: Node, first: Value, second: Value, pairs: list[tuple[Layer, Layer]]
) -> Value:
    """Make one unit of the rows of parallel branches (RepVGG, MobileOne)."""
    a, b = pairs[0]
    for row in range(a.n_units):
        walk.couple(a.start + row, b.start + row)
    group = {walk.find(a.start)}
    for layer in walk.layers:
        if walk.find(layer.start) in group:
            layer.z_node = node
            layer.branch_of = layer.branch_of or a
    return Value(first.shape, first.ids, pristine=True)


@rule("mul", "multiply", "div", "true_divide", "__mul__")
def scale(walk: Walk, node: Node, args: list[Any]) -> Any:
    """Multiply two values: a broadcast factor is a gate, factors of one shape are coupled."""
    shape = shape_of(node)
    first, second = (_broadcast(arg, shape) for arg in args[:2])
    if first.ids is None and second.ids is None:
        return plain(node, first.const and second.const)
    divides = base_name(op_name(node)) in ("div", "true_divide")
    if first.const and divides:
        return activate(walk, node, second, "unknown")
    if first.const or second.const:
        return _adjusted(walk, node, second if first.const else first)
    if first.ids is not None and second.ids is not None and torch.equal(first.ids, second.ids):
        for unit in distinct(first.ids):
            layer = walk.layer_at(unit)
            layer.activations.setdefault(unit - layer.start, "unknown")
        return Value(shape, first.ids)
    wide = [True, False] if divides else [x.shape == shape for x in values_in(args[:2])]
    if all(wide) and first.ids is not None and second.ids is not None:
        return _gate_pairs(walk, node, first, second)
    kept = next(
        (v for v, w in ((first, wide[0]), (second, wide[1])) if w and v.ids is not None), None
    )
    for value in (first, second):
        if value is not kept:
            walk.leak(value.ids, "gates other units by multiplication")
    return plain(node) if kept is None else Value(shape, kept.ids)


def _gate_pairs(walk: Walk, node: Node, first: Value, second: Value) -> Value:
    """Couple the two factors of a gated MLP (SwiGLU), when their units pair off one to one."""
    assert first.ids is not None and second.ids is not None
    pairs = _pairs(first.ids, second.ids)
    if pairs is None and not _varying(first.ids) & _varying(second.ids):
        walk.leak(second.ids, "gates other units by multiplication")
        return Value(shape_of(node), first.ids)
    if pairs is None:
        walk.leak(first.ids, "multiplies other values")
        walk.leak(second.ids, "multiplies other values")
        return Value(shape_of(node))
    for a, b in pairs:
        walk.couple(a, b)
    return Value(shape_of(node), first.ids)


def _varying(ids: Tensor) -> set[int]:
    """Return the dimensions along which the units change."""
    return {dim for dim in range(ids.dim()) if ids.shape[dim] > 1 and ids.stride(dim) != 0}


def _pairs(first: Tensor, second: Tensor) -> list[tuple[int, int]] | None:
    """Return the pairs of units that meet in two tensors, or None when they do not pair off."""
    both = torch.stack([first, second])
    for dim in range(1, both.dim()):
        if both.shape[dim] > 1 and bool((both == both.narrow(dim, 0, 1)).all()):
            both = both.narrow(dim, 0, 1)
    pairs = torch.unique(both.reshape(2, -1), dim=1)
    if bool((pairs < 0).any()) or any(len(torch.unique(side)) != len(side) for side in pairs):
        return None
    return [(int(a), int(b)) for a, b in pairs.T.tolist()]
