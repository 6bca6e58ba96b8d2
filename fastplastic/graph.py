"""The unit graph: which rows make a unit, what reads it, and whether it can be re-initialised.

The model is traced with `torch.export` and read operator by operator: `_rules_*` say what each
operator does to the units, `_flow` keeps the books, `_finish` writes the result down. What the
rules cannot decide is marked as not resettable with the reason.
"""

import contextlib
import inspect
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Node

from . import _rules_layers, _rules_layout  # noqa: F401  (importing registers their rules)
from ._finish import finish
from ._flow import UnitFlow, Value
from ._rules_elementwise import activate
from ._sites import Sites, module_calls
from ._walk import RULES, Walk, base_name, branch_point, op_name, plain, unknown
from .wiring import Site, UnitGraph, UnitLayer, is_conv1d

# Activation functions that libraries write as several operators in a module of their own.
_ACTIVATION_CLASSES = {
    "NewGELUActivation": "gelu_tanh", "FastGELUActivation": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh", "GELUTanh": "gelu_tanh", "QuickGELUActivation": "quick_gelu",
    "QuickGELU": "quick_gelu", "Swish": "silu", "SiLUActivation": "silu",
    "HardSwish": "hardswish", "HardSigmoid": "hardsigmoid",
}  # fmt: skip
_SHAPE_OPS = ("sym_size", "size", "sym_numel", "dim")
_VIEW_OPS = frozenset(
    "view reshape permute transpose t flatten unflatten squeeze unsqueeze expand select slice "
    "narrow split chunk split_with_sizes tensor_split unbind movedim swapaxes alias detach getitem "
    "contiguous".split()
)


def build_graph(
    model: nn.Module, example_inputs: Tensor | tuple[Any, ...] | Mapping[str, Any]
) -> UnitGraph:
    """Return the unit graph of a model.

    Args:
        model: Any module. It is traced in eval mode and left as it was.
        example_inputs: A tensor, a tuple of positional or a mapping of keyword arguments.

    Returns:
        Every weight layer in execution order. When the model cannot be traced, the layers are found
        by their modules, no unit is resettable, and `note` says why.
    """
    try:
        program = _export(model, example_inputs)
    except Exception as error:  # torch.export has no common base for what it raises
        return _module_graph(
            model, f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
        )
    names = {id(tensor): name for name, tensor in model.named_parameters()}
    walk = _walk(program, _canonical(model, program, names))
    walk.settle()
    layers = finish(walk, Sites(program.graph, walk.made))
    return UnitGraph(layers, _unreached(model, layers, names))


def _export(model: nn.Module, example_inputs: Any) -> ExportedProgram:
    args = () if isinstance(example_inputs, Mapping) else example_inputs
    args = args if isinstance(args, tuple) else (args,)
    kwargs = dict(example_inputs) if isinstance(example_inputs, Mapping) else {}
    if "use_cache" in inspect.signature(model.forward).parameters:
        # Decoders of Hugging Face return a cache, which torch.export does not take.
        kwargs.setdefault("use_cache", False)
    with _evaluating(model), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.export.export(model, args, kwargs, strict=False)


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model into eval mode without fused fast paths; leave it and the RNG as found."""
    modes = [(module, module.training) for module in model.modules()]
    fast = torch.backends.mha.get_fastpath_enabled()
    devices = list(range(torch.cuda.device_count()))
    try:
        with torch.random.fork_rng(devices):
            torch.backends.mha.set_fastpath_enabled(False)
            model.eval()
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, training in modes:
            module.training = training


def _canonical(model: nn.Module, program: ExportedProgram, names: dict[int, str]) -> dict[str, str]:
    """Return the one name of the parameter behind each placeholder, whatever it is shared as."""
    signature = program.graph_signature
    return {
        node_name: names.get(id(model.get_parameter(target)), target)
        for node_name, target in signature.inputs_to_parameters.items()
    }


def _walk(program: ExportedProgram, canonical: dict[str, str]) -> Walk:
    """Read the graph once, in execution order."""
    graph, signature = program.graph, program.graph_signature
    parameters: dict[Node, tuple[str, bool]] = {}
    uses: Counter[str] = Counter()
    owners = {node: list(module_calls(node).values() or [""])[-1] for node in graph.nodes}
    buffers: dict[Node, str] = {}
    for node in graph.nodes:
        if node.name in canonical:
            parameters[node] = canonical[node.name], False
            uses[canonical[node.name]] += sum(
                op_name(user) not in _SHAPE_OPS for user in node.users
            )
        elif node.name in signature.inputs_to_buffers:
            buffers[node] = signature.inputs_to_buffers[node.name]
        elif node.op == "call_function":
            _note_view_of_parameter(node, parameters)
    walk = Walk(parameters, buffers, uses, owners)
    regions = _activation_regions(program)
    values: dict[Node, Any] = {}
    inputs = set(signature.user_inputs)
    for node in graph.nodes:
        if node.op == "placeholder":
            tensor = node.meta.get("val")
            values[node] = (
                plain(node, node.name not in inputs) if isinstance(tensor, Tensor) else tensor
            )
        elif node.op == "call_function":
            _step(walk, node, values, regions)
        elif node.op == "output":
            _leave(walk, torch.fx.node.map_arg(node.args, values.__getitem__))
    return walk


def _note_view_of_parameter(node: Node, parameters: dict[Node, tuple[str, bool]]) -> None:
    """Follow a parameter through a transposition or a change of dtype."""
    source = node.args[0] if node.args else None
    if not isinstance(source, Node) or source not in parameters:
        return
    name, turned = parameters[source]
    if op_name(node) in ("t", "transpose", "permute", "numpy_T") and source.meta["val"].dim() == 2:
        parameters[node] = name, not turned
    elif op_name(node) in ("to", "_to_copy", "alias", "detach"):
        parameters[node] = name, turned


def _activation_regions(program: ExportedProgram) -> dict[Node, tuple[Node, str] | None]:
    """Return {last node: (input node, activation)} of modules that are one activation function.

    The other nodes of such a module are there with None.
    """
    inside: dict[str, list[Node]] = defaultdict(list)
    kinds: dict[str, str] = {}
    for node in program.graph.nodes:
        for call, entry in (node.meta.get("nn_module_stack") or {}).items():
            kind = str(entry[1]).rpartition(".")[2]
            if kind in _ACTIVATION_CLASSES:
                inside[str(call)].append(node)
                kinds[str(call)] = _ACTIVATION_CLASSES[kind]
    regions: dict[Node, tuple[Node, str] | None] = {}
    for call, nodes in inside.items():
        own = set(nodes)
        entries = {
            x
            for node in nodes
            for x in node.all_input_nodes
            if x not in own and x.op == "call_function"
        }
        exits = [node for node in nodes if any(user not in own for user in node.users)]
        if len(nodes) > 1 and len(entries) == 1 and len(exits) == 1:
            regions.update(dict.fromkeys(nodes))
            regions[exits[0]] = entries.pop(), kinds[call]
    return regions


def _step(
    walk: Walk,
    node: Node,
    values: dict[Node, Any],
    regions: dict[Node, tuple[Node, str] | None],
) -> None:
    """Give the node's output its value."""
    if node in regions:
        walk.made[node] = values[node] = _activation_module(walk, node, values, regions[node])
        return
    args = list(torch.fx.node.map_arg(node.args, lambda x: values.get(x)))
    args += [
        torch.fx.node.map_arg(x, values.get) for x in node.kwargs.values() if isinstance(x, Node)
    ]
    name = op_name(node)
    rule = RULES.get(base_name(name))
    try:
        result = unknown(walk, node, args) if rule is None else rule(walk, node, args)
    except Exception:  # operators have overloads that no rule foresees: then no unit is trusted
        result = unknown(walk, node, args)
    if isinstance(result, Value) and result.pristine and branch_point(node):
        walk.branched.add(node)
        result = Value(result.shape, result.ids, result.const)
    walk.made[node] = values[node] = result
    if name != base_name(name) and node.args and isinstance(node.args[0], Node):
        _write_in_place(walk, node, node.args[0], values)


def _activation_module(
    walk: Walk, node: Node, values: dict[Node, Any], region: tuple[Node, str] | None
) -> Value | Any:
    """Return the value of a node in a module that is one activation function."""
    if region is None:
        return plain(node)
    entry, name = region
    value: Value = values[entry]
    if value.ids is None:
        return plain(node)
    # The several operators of the module are one reader.
    pristine = value.pristine or (entry in walk.branched and not _read_outside(entry, node))
    return activate(walk, node, Value(value.shape, value.ids, pristine=pristine), name)


def _read_outside(entry: Node, exit_node: Node) -> bool:
    """Tell whether anything but the activation module of `exit_node` reads the entry."""
    call = list(module_calls(exit_node))[-1]
    return any(call not in module_calls(user) for user in entry.users)


def _write_in_place(walk: Walk, node: Node, target: Node, values: dict[Node, Any]) -> None:
    """Let later readers of an overwritten tensor see the new value; give up on views."""
    values[target] = values[node]
    order = {item: index for index, item in enumerate(node.graph.nodes)}
    while target.op == "call_function" and base_name(op_name(target)) in _VIEW_OPS:
        if not isinstance(target.args[0], Node):
            return
        target = target.args[0]
        if any(order[user] > order[node] for user in target.users):
            _leave(walk, values[target], "written in place through a view")
            _leave(walk, values[node], "written in place through a view")


def _leave(walk: UnitFlow, value: Any, reason: str = "leaves the network") -> None:
    if isinstance(value, Value):
        walk.leak(value.ids, reason)
    elif isinstance(value, Mapping):
        _leave(walk, list(value.values()), reason)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _leave(walk, item, reason)


def _unreached(
    model: nn.Module, layers: tuple[UnitLayer, ...], names: dict[int, str]
) -> tuple[tuple[str, str], ...]:
    """Return the weight layers of the model that the traced forward pass did not run."""
    found = {layer.name for layer in layers} | {layer.weight for layer in layers}
    return tuple(
        (name, "not reached in the traced forward pass")
        for name, module in _weight_modules(model)
        if name not in found and names.get(id(getattr(module, "weight", None))) not in found
    )


def _weight_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)) or is_conv1d(module):
            yield name, module


def _module_graph(model: nn.Module, reason: str) -> UnitGraph:
    """Return the layers by module alone: profiled, never re-initialised."""
    layers = []
    modules = list(_weight_modules(model))
    for name, module in modules:
        weight = module.weight
        assert isinstance(weight, Tensor)
        conv1d = is_conv1d(module)
        turned = conv1d or bool(getattr(module, "transposed", False))
        units = int(getattr(module, "out_channels", weight.shape[1 if turned else 0]))
        axis = 1 if isinstance(module, nn.modules.conv._ConvNd) else -1
        site = Site(name, "output", axis, torch.arange(units))
        bias = f"{name}.bias" if isinstance(getattr(module, "bias", None), Tensor) else None
        kind = "conv1d" if conv1d else "conv" if axis == 1 else "linear"
        layers.append(
            UnitLayer(
                name=name,
                kind=kind,
                weight=f"{name}.weight",
                bias=bias,
                unit_dim=int(turned),
                n_units=units,
                norm=None,
                activations=((0, units, "identity"),),
                hidden=torch.zeros(units, dtype=torch.bool),
                reasons={"the model could not be traced": units},
                z_site=site,
                g_site=site,
                head=name == modules[-1][0],
            )
        )
    return UnitGraph(tuple(layers), (), f"the model could not be traced ({reason})")
