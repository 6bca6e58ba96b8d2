"""Rules for weight layers, norms, matrix products and attention."""

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from fastplastic.graph.ledger import ConsumerCall, Layer, Ledger, NormCall
from fastplastic.graph.nodes import op_name, shape_of
from fastplastic.graph.rules import live_first, rule, unknown
from fastplastic.graph.rules_layout import spatial
from fastplastic.graph.values import Value, along, collapse, on_axis, plain, reduce_dims, values_in

MIXING_NORMS = {
    "layer_norm": "LayerNorm", "native_layer_norm": "LayerNorm", "group_norm": "GroupNorm",
    "native_group_norm": "GroupNorm", "rms_norm": "RMSNorm", "_fused_rms_norm": "RMSNorm",
}  # fmt: skip


@rule(*MIXING_NORMS)
def mixing_norm(ledger: Ledger, node: Node, args: list[Any]) -> Any:
    """Give the units up, but follow them to their activation function."""
    value = args[0]
    ledger.leak(value.ids, f"mixed by {MIXING_NORMS[op_name(node)]}")
    ledger.norms_at[node] = None
    out = plain(node, value.const)
    made = Value(value.shape, value.ids, value.const)
    return [made, *out[1:]] if isinstance(out, list) else made


@rule("batch_norm", "instance_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm")
def batch_norm(ledger: Ledger, node: Node, args: list[Any]) -> Any:
    value = args[0]
    if value.ids is None:
        return plain(node, value.const)
    units = along(value.ids, 1)
    tensors = [arg for arg in node.args[1:5] if isinstance(arg, Node)]
    names = [ledger.parameter(arg)[0] or ledger.program.buffers.get(arg) for arg in tensors]
    owner = next((name.rpartition(".")[0] for name in names if name), None)
    if units is None:
        ledger.leak(value.ids, "its positions carry different units at a norm")
        return plain(node)
    if owner is not None:
        ledger.norms.append(NormCall(owner, units, ledger.program.mode))
    ledger.norms_at[node] = owner
    return Value(value.shape, value.ids, pristine=value.pristine)


@dataclass(frozen=True)
class Weight:
    """The weight argument of a node: `name` is None where it is no plain parameter.

    Where it is a range of its rows, `first_row` is where that begins.
    """

    node: Any
    name: str | None
    unit_dim: int
    kind: str
    groups: int = 1
    first_row: int | None = None


@rule("linear")
def linear(ledger: Ledger, node: Node, args: list[Any]) -> Any:
    source = node.args[1]
    if isinstance(source, Node) and source in ledger.program.parts:
        name, first = ledger.program.parts[source]
        weight = Weight(source, name, 0, "linear", first_row=first)
        return weight_layer(ledger, node, args, weight)
    plain_name, turned = ledger.parameter(source)
    return weight_layer(ledger, node, args, Weight(source, plain_name, int(turned), "linear"))


@rule("mm", "matmul", reads=(0, 1))
def matmul(ledger: Ledger, node: Node, args: list[Any]) -> Any:
    name, turned = ledger.parameter(node.args[1])
    if name is None or len(args[1].shape) != 2:
        return product(ledger, node, args)
    return weight_layer(ledger, node, args, _in_out(node.args[1], name, turned))


@rule("addmm", reads=(1,))
def addmm(ledger: Ledger, node: Node, args: list[Any]) -> Any:
    name, turned = ledger.parameter(node.args[2])
    weight = _in_out(node.args[2], name, turned)
    return weight_layer(ledger, node, args[1:3], weight, node.args[0])


def _in_out(node: Any, name: str | None, turned: bool) -> Weight:
    """Return the weight of a plain matrix product: (in, out), or (out, in) transposed."""
    return Weight(node, name, 0, "linear") if turned else Weight(node, name, 1, "conv1d")


@rule("conv1d", "conv2d", "conv3d")
def conv(ledger: Ledger, node: Node, args: list[Any]) -> Any:
    name, _ = ledger.parameter(node.args[1])
    groups = _groups(node)
    inputs = args[0].shape[1] if len(args[0].shape) == len(args[1].shape) else -1
    depthwise = groups > 1 and groups == inputs == shape_of(node)[1]
    kind = "depthwise conv" if depthwise else "conv"
    return weight_layer(ledger, node, args, Weight(node.args[1], name, 0, kind, groups))


@rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def conv_transpose(ledger: Ledger, node: Node, args: list[Any]) -> Any:
    name, _ = ledger.parameter(node.args[1])
    # In a grouped one, neither dimension of the weight runs over all of its units.
    weight = Weight(node.args[1], name if _groups(node) == 1 else None, 1, "conv transpose")
    return weight_layer(ledger, node, args, weight)


def _groups(node: Node) -> int:
    groups = node.args[6] if len(node.args) > 6 else node.kwargs.get("groups", 1)
    assert isinstance(groups, int)
    return groups


def weight_layer(
    ledger: Ledger, node: Node, args: list[Any], weight: Weight, bias: Any = None
) -> Value | Any:
    """Read units through the columns of a weight and make new ones with its rows."""
    shape = shape_of(node)
    axis = len(shape) - 1 if weight.kind in ("linear", "conv1d") else 1
    if weight.name is None and not _from_parameters(ledger, weight.node):
        fixed = weight.kind == "depthwise conv"
        return spatial(ledger, node, args) if fixed else unknown(ledger, node, args)
    if bias is None and len(node.args) > 2 and weight.node is node.args[1]:
        bias = node.args[2]
    name = _bias_name(ledger, bias, weight)
    layer = _call(ledger, _new_layer(ledger, node, weight, name, shape[axis]))
    _read(ledger, layer, args[0], axis, weight.groups)
    first = layer.start + (weight.first_row or 0)
    ids = torch.arange(first, first + shape[axis], dtype=torch.int32)
    uses = ledger.program.uses.get(layer.weight, 0)
    if layer.transformed:
        ledger.leak(ids, "its weight is transformed before use")
    elif uses > 1 and layer.tied:
        ledger.leak(ids, f"its weight is that of {', '.join(layer.tied)}, too")
    elif uses > 1:
        ledger.leak(ids, f"its weight is used {uses} times")
    elif layer.bias is not None and ledger.program.uses.get(layer.bias, 0) > 1:
        ledger.leak(ids, "its bias is used more than once")
    return on_axis(ids, axis, shape, pristine=not layer.part)


def _bias_name(ledger: Ledger, bias: Any, weight: Weight) -> str | None:
    """Return the name of the parameter that the bias is, or the same rows of it."""
    name, first = ledger.program.parts.get(bias, (None, None))
    return name if name and first == weight.first_row else ledger.parameter(bias)[0]


def _new_layer(ledger: Ledger, node: Node, weight: Weight, bias: str | None, n_units: int) -> Layer:
    source = node.args[1] if op_name(node) == "addmm" else node.args[0]
    assert isinstance(source, Node)
    owner = ledger.program.owners.get(node, "")
    name, tied = (
        (_computed_name(ledger, weight, owner, n_units), ())
        if weight.name is None
        else _names_of(ledger, weight.name, owner)
    )
    part = weight.first_row is not None
    if part:
        n_units = ledger.program.sizes[weight.name or ""]
    return Layer(
        name=name, kind=weight.kind, weight=weight.name or f"{name}.weight", bias=bias,
        unit_dim=weight.unit_dim, start=-1, n_units=n_units, source=source, node=node,
        mode=ledger.program.mode, transformed=weight.name is None, tied=tied,
        part=part,
    )  # fmt: skip


def _computed_name(ledger: Ledger, weight: Weight, owner: str, n_units: int) -> str:
    """Return the name of a layer with a computed weight: the module, if it runs no other layer."""
    own = [call for call in ledger.calls if call.name == owner]
    if all(call.n_units == n_units for call in own):
        return owner
    return _layer_name(_from_parameters(ledger, weight.node) or owner)


def _call(ledger: Ledger, layer: Layer) -> Layer:
    """Note a call of a layer; give it units, or those that another mode gave to the same call."""
    if layer.part:
        return _call_of_part(ledger, layer)
    number = ledger.program.calls[layer.name]
    ledger.program.calls[layer.name] += 1
    ledger.calls.append(layer)
    known = [call for call in ledger.layers if call.name == layer.name and call.mode != layer.mode]
    if number < len(known) and known[number].n_units == layer.n_units:
        layer.start = known[number].start
    else:
        layer.start = ledger.new_units(layer.n_units)
        ledger.layers.append(layer)
    return layer


def _call_of_part(ledger: Ledger, layer: Layer) -> Layer:
    """Note a call of some rows of a layer: its other calls have the units of the other rows."""
    ledger.calls.append(layer)
    known = [x for x in ledger.layers if x.name == layer.name and x.n_units == layer.n_units]
    if known:
        layer.start = known[0].start
    else:
        layer.start = ledger.new_units(layer.n_units)
        ledger.layers.append(layer)
    return layer


def _names_of(ledger: Ledger, weight: str, owner: str) -> tuple[str, tuple[str, ...]]:
    """Return the layer's name and those of other modules with the same weight.

    The module that runs gives the name where it holds the weight: a tied head, say.
    """
    names = [_layer_name(name) for name in ledger.program.tied.get(weight, (weight,))]
    name = owner if owner in names else _layer_name(weight)
    return name, tuple(other for other in names if other != name)


def _from_parameters(ledger: Ledger, weight: Any) -> str | None:
    """Return a parameter that a weight is computed from; None for a fixed filter."""
    todo, seen = [weight] if isinstance(weight, Node) else [], set[Node]()
    while todo:
        item = todo.pop()
        if item in ledger.program.parameters:
            return ledger.program.parameters[item][0]
        seen.add(item)
        todo.extend(x for x in item.all_input_nodes if x not in seen)
    return None


def _layer_name(weight: str) -> str:
    """Return the layer's name for its weight: the module, or module.part for in_proj_weight."""
    return weight.removesuffix(".weight").removesuffix("_weight")


def _read(ledger: Ledger, layer: Layer, source: Value, axis: int, groups: int) -> None:
    """Note which units the layer's columns read, or mark them."""
    if source.ids is None:
        return
    columns = along(source.ids, axis if axis < len(source.shape) else -1)
    if columns is None:
        ledger.leak(source.ids, f"read by {layer.name} with different units at different positions")
    elif layer.part:
        ledger.leak(columns, f"read by {layer.name}, whose columns read other units, too")
    elif layer.transformed:
        ledger.leak(columns, f"read by {layer.name}, whose weight is transformed before use")
    elif ledger.program.uses.get(layer.weight, 0) > 1:
        ledger.leak(columns, f"read by {layer.name}, whose weight is used more than once")
    elif layer.kind == "depthwise conv":
        pairs = zip(columns.tolist(), range(layer.start, layer.stop), strict=True)
        ledger.follows.extend((unit, own) for unit, own in pairs if unit >= 0)
    else:
        form = (1 - layer.unit_dim, groups, columns, ledger.program.mode)
        ledger.consumers.append(ConsumerCall(layer.name, layer.weight, *form))


@rule("bmm", reads=(0, 1))
def product(ledger: Ledger, node: Node, args: list[Any]) -> Any:
    """Multiply two activations: the one whose units do not take part in the sum keeps them."""
    first, second = live_first(ledger, args[:2])
    if first.ids is None and second.ids is None:
        return plain(node, first.const and second.const)
    shape = shape_of(node)
    kept = None
    for value, axis in ((second, -2), (first, -1)):
        if value.ids is not None and kept is None and len(value.shape) > 1:
            cut = reduce_dims(value.ids, [axis % len(value.shape)])
            kept = None if cut is None else (value, cut)
    for value in (first, second):
        if kept is None or value is not kept[0]:
            ledger.leak(value.ids, "mixed by a matrix product with other values")
    if kept is None:
        return plain(node)
    return Value(shape, kept[1].expand(shape))


@rule("baddbmm", reads=(0, 1, 2))
def biased_product(ledger: Ledger, node: Node, args: list[Any]) -> Any:
    """Multiply two activations and add a third value."""
    value = product(ledger, node, args[1:])
    if args[0].const:
        return value
    for summand in (args[0], value):
        ledger.leak(summand.ids, "summed into a residual stream")
    ledger.sums.add(node)
    return plain(node)


@rule("einsum", reads=(1,))
def einsum(ledger: Ledger, node: Node, args: list[Any]) -> Any:
    equation = str(args[0]).replace(" ", "")
    operands = live_first(ledger, values_in(args[1]))
    if all(value.ids is None for value in operands):
        return plain(node, all(value.const for value in operands))
    terms, _, out = equation.partition("->")
    kept = None
    if "." not in equation:
        for value, term in reversed(list(zip(operands, terms.split(","), strict=True))):
            if value.ids is not None and kept is None:
                lost = [i for i, letter in enumerate(term) if letter not in out]
                cut = reduce_dims(value.ids, lost) if len(set(term)) == len(term) else None
                kept = None if cut is None else (value, cut, term)
    for value in operands:
        if kept is None or value is not kept[0]:
            ledger.leak(value.ids, "mixed by a matrix product with other values")
    if kept is None:
        return plain(node)
    _, cut, term = kept
    letters = [letter for letter in out if letter in term]
    small = cut.permute(
        *[term.index(x) for x in letters], *[i for i, x in enumerate(term) if x not in out]
    )
    small = small.reshape([cut.shape[term.index(x)] if x in term else 1 for x in out])
    return Value(shape_of(node), collapse(small.expand(shape_of(node))))


@rule("scaled_dot_product_attention", reads=None)
def attention(ledger: Ledger, node: Node, args: list[Any]) -> Any:
    """Attention mixes positions of the value, never its channels; query and key are only scores."""
    ledger.leak(args[0].ids, "query of an attention")
    ledger.leak(args[1].ids, "key of an attention")
    for value in values_in([*args[3:], *node.kwargs.values()]):
        ledger.leak(value.ids, "mask of an attention")
    value, shape = args[2], shape_of(node)
    if value.ids is None:
        return plain(node, value.const)
    cut = reduce_dims(value.ids, [len(value.shape) - 2])
    if cut is None:
        ledger.leak(value.ids, "its positions carry different units in an attention")
        return plain(node)
    if cut.shape[-3] not in (1, shape[-3]):
        cut = cut.repeat_interleave(shape[-3] // cut.shape[-3], dim=-3)
    return Value(shape, cut.expand(shape))


@rule("_assert_tensor_metadata", "_assert_scalar", "_assert_async", reads=None, shapes=(0,))
def check(ledger: Ledger, node: Node, args: list[Any]) -> Any:
    """Pass over run-time checks."""
    return None


@rule(
    "arange", "full", "zeros", "ones", "empty", "zeros_like", "ones_like", "new_zeros", "new_ones",
    "new_full", "full_like", "scalar_tensor", "eye", "linspace", "sym_size", "empty_like",
    "new_empty", "rand", "randn", "rand_like", "randn_like", "randperm", "randint",
    shapes=(0,),
)  # fmt: skip
def constant(ledger: Ledger, node: Node, args: list[Any]) -> Any:
    """Make a tensor that depends on no value of its inputs."""
    return plain(node, const=True)
