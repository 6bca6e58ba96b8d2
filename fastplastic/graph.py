"""The unit graph: which rows make a unit, what reads it, and whether it can be re-initialised.

The model is traced with `torch.export` and read operator by operator: `_rules_*` say what each
operator does to the units, `_flow` keeps the books, `_finish` writes the result down. What the
rules cannot decide is marked as not resettable with the reason.
"""

import contextlib
import inspect
import io
import logging
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Node

from . import _rules_layers, _rules_layout  # noqa: F401  (importing registers their rules)
from ._finish import finish
from ._flow import UnitFlow, Value, distinct
from ._module_graph import module_graph
from ._module_run import ALWAYS_EVAL, weight_modules
from ._regions import activation_regions
from ._rules_elementwise import activate
from ._sites import module_calls
from ._walk import (
    OPERANDS,
    RULES,
    SHAPES,
    Program,
    Walk,
    base_name,
    branch_point,
    data_sources,
    op_name,
    plain,
    unknown,
    values_in,
)
from .wiring import UnitGraph, UnitLayer

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
        model: Any module. It is traced in eval and in train mode, as some layers read units in
            one of them only (auxiliary heads), and left as it was. Where units meet their
            activation functions is looked up in the mode that the model is in.
        example_inputs: A tensor, a tuple of positional or a mapping of keyword arguments.

    Returns:
        Every weight layer in execution order. When the model cannot be traced, the layers are found
        by their modules, no unit is resettable, and `note` says why.
    """
    names = {id(tensor): name for name, tensor in model.named_parameters()}
    modes = ("train", "eval") if model.training else ("eval", "train")
    walk = Walk()
    failed: dict[str, str] = {}
    for mode in modes:
        try:
            program = _export(model, example_inputs, mode)
        except Exception as error:  # torch.export has no common base for what it raises
            lines = str(error).strip().splitlines() or [""]
            failed[mode] = f"{type(error).__name__}: {lines[0][:200]}"
        else:
            _read(walk, model, program, mode, names)
    if len(failed) == len(modes):
        return module_graph(model, example_inputs, failed[modes[0]], build_graph)
    note = None
    for mode, reason in failed.items():
        everything = torch.arange(len(walk.parent), dtype=torch.int32)
        walk.leak(everything, f"the model could not be traced in {mode} mode")
        note = (
            f"the model could not be traced in {mode} mode: which layers read its units there is "
            f"not known, and none can be re-initialised ({reason})"
        )
    walk.settle()
    layers = finish(walk)
    return UnitGraph(layers, _unreached(model, layers, names), note)


def _export(model: nn.Module, example_inputs: Any, mode: str) -> ExportedProgram:
    args = () if isinstance(example_inputs, Mapping) else example_inputs
    args = args if isinstance(args, tuple) else (args,)
    kwargs = dict(example_inputs) if isinstance(example_inputs, Mapping) else {}
    if "use_cache" in inspect.signature(model.forward).parameters:
        # Decoders of Hugging Face return a cache, which torch.export does not take.
        kwargs.setdefault("use_cache", False)
    with in_mode(model, mode), torch.no_grad(), _silent(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.export.export(model, args, kwargs, strict=False)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Keep torch from printing the graph of what it cannot trace; the error says enough."""
    names = [name for name in logging.root.manager.loggerDict if name.startswith("torch.")]
    loggers = [(logger, logger.disabled) for logger in map(logging.getLogger, names)]
    try:
        for logger, _ in loggers:
            logger.disabled = True
        # Some of it is no log.
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        for logger, disabled in loggers:
            logger.disabled = disabled


@contextlib.contextmanager
def in_mode(model: nn.Module, mode: str) -> Iterator[None]:
    """Put the model into a mode without fused fast paths; leave it and the RNG as found.

    Norms and dropouts stay in eval mode: they wire nothing, and a BatchNorm refuses to train on a
    single sample.
    """
    modules = list(model.modules())
    fast = torch.backends.mha.get_fastpath_enabled()
    devices = list(range(torch.cuda.device_count()))
    try:
        with torch.random.fork_rng(devices), _attributes_kept(modules):
            torch.backends.mha.set_fastpath_enabled(False)
            for module in modules:
                module.training = mode == "train" and not isinstance(module, ALWAYS_EVAL)
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@contextlib.contextmanager
def _attributes_kept(modules: list[nn.Module]) -> Iterator[None]:
    """Put back what a forward pass sets on modules: counters, caches, flags."""
    kept = [(vars(module), dict(vars(module))) for module in modules]
    containers = [
        (value, value.copy())
        for _, attributes in kept
        for value in attributes.values()
        if type(value) in (dict, OrderedDict, list, set)
    ]
    try:
        yield
    finally:
        for attributes, before in kept:
            attributes.clear()
            attributes.update(before)
        for container, items in containers:
            container.clear()
            container.extend(items) if isinstance(container, list) else container.update(items)


def _program(
    model: nn.Module, program: ExportedProgram, mode: str, names: dict[int, str]
) -> Program:
    """Return what the rules need to know of a traced program."""
    signature = program.graph_signature
    # The one name of the parameter behind each placeholder, whatever it is shared as.
    canonical = {
        node_name: names.get(id(model.get_parameter(target)), target)
        for node_name, target in signature.inputs_to_parameters.items()
    }
    found = Program(mode, tied=_tied(model, names))
    for node in program.graph.nodes:
        found.owners[node] = list(module_calls(node).values() or [""])[-1]
        if node.name in canonical:
            found.parameters[node] = canonical[node.name], False
            found.uses[canonical[node.name]] += sum(
                op_name(user) not in _SHAPE_OPS for user in node.users
            )
        elif node.name in signature.inputs_to_buffers:
            found.buffers[node] = signature.inputs_to_buffers[node.name]
        elif node.name in signature.inputs_to_lifted_tensor_constants:
            name = signature.inputs_to_lifted_tensor_constants[node.name]
            found.constants[node] = program.constants[name]
        elif node.op == "call_function":
            _note_view_of_parameter(node, found.parameters)
    return found


def _tied(model: nn.Module, names: dict[int, str]) -> dict[str, tuple[str, ...]]:
    """Return {first name: all names} of parameters that several modules hold."""
    holders: dict[str, dict[int, str]] = defaultdict(dict)
    for name, tensor in model.named_parameters(remove_duplicate=False):
        module = model.get_submodule(name.rpartition(".")[0])
        # One module under two names is no second holder.
        holders[names[id(tensor)]].setdefault(id(module), name)
    return {name: tuple(own.values()) for name, own in holders.items() if len(own) > 1}


def _read(
    walk: Walk, model: nn.Module, program: ExportedProgram, mode: str, names: dict[int, str]
) -> None:
    """Read a traced program once, in execution order."""
    walk.program = _program(model, program, mode, names)
    regions = activation_regions(program, model)
    tensors = _Tensors()
    values = tensors.values
    inputs = set(program.graph_signature.user_inputs)
    for node in program.graph.nodes:
        walk.order[node] = len(walk.order)
        if node.op == "placeholder":
            tensor = node.meta.get("val")
            values[node] = (
                plain(node, node.name not in inputs) if isinstance(tensor, Tensor) else tensor
            )
            continue
        walk.sources[node] = tensors.sources(node)
        if node.op == "call_function":
            _step(walk, node, values, regions)
            if _writes(node):
                tensors.write(walk, node)
        elif node.op == "output":
            walk.read(node, walk.sources[node])
            _leave(walk, torch.fx.node.map_arg(node.args, values.__getitem__))


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
    walk.read(node, data_sources(node, walk.sources[node]))
    args = list(torch.fx.node.map_arg(node.args, lambda x: values.get(x)))
    kwargs = {
        key: torch.fx.node.map_arg(x, values.get)
        for key, x in node.kwargs.items()
        if isinstance(x, Node)
    }
    result = _apply(walk, node, args, kwargs)
    if isinstance(result, Value) and result.pristine and branch_point(node):
        walk.branched.add(node)
        result = Value(result.shape, result.ids, result.const)
    walk.made[node] = values[node] = result


def _apply(walk: Walk, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """Apply the rule of the node's operator; mark units that enter where no rule expects them."""
    name = base_name(op_name(node))
    rule, read = RULES.get(name), OPERANDS.get(name)
    everything = [*args, *kwargs.values()]
    if rule is None:
        return unknown(walk, node, everything)
    try:
        result = rule(walk, node, everything if read is None else args)
    except Exception:  # operators have overloads that no rule foresees: then no unit is trusted
        return unknown(walk, node, everything)
    if read is not None:
        left = [arg for at, arg in enumerate(args) if at not in read | SHAPES[name]]
        for value in values_in([*left, *kwargs.values()]):
            if value.ids is not None:
                walk.leak(value.ids, f"enters {name} at a place that no rule names")
                walk.opaque[node] = name
    return result


def _activation_module(
    walk: Walk, node: Node, values: dict[Node, Any], region: tuple[Node, str] | None
) -> Value | Any:
    """Return the value of a node in a module that is one activation function."""
    if region is None:
        return plain(node)
    entry, name = region
    walk.sources[node] = [entry]
    walk.read(node, [entry])
    value: Value = values[entry]
    return plain(node) if value.ids is None else activate(walk, node, value, name)


def _writes(node: Node) -> bool:
    """Tell whether the operator writes to its first argument."""
    name = op_name(node)
    return name != base_name(name) and bool(node.args) and isinstance(node.args[0], Node)


class _Tensors:
    """Which nodes are one tensor in the running model, as far as operators write in place.

    Attributes:
        values: {node: its value}, after all that was written so far.
        writers: {node: the node that wrote last to its tensor}.
    """

    def __init__(self) -> None:
        self.values: dict[Node, Any] = {}
        self.writers: dict[Node, Node] = {}
        self._same: dict[Node, list[Node]] = {}

    def sources(self, node: Node) -> list[Node]:
        """Return what the node reads: the last writers to its inputs."""
        return [self.writers.get(source, source) for source in node.all_input_nodes]

    def write(self, walk: Walk, node: Node) -> None:
        """Let later readers of what the node overwrites see the new value; give up on views."""
        target = node.args[0]
        assert isinstance(target, Node)
        same = self._same.setdefault(target, [target])
        for alias in same:
            self.values[alias] = self.values[node]
            self.writers[alias] = node
        same.append(node)
        self._same[node] = same
        for alias in _views_read_later(node, target):
            for value in values_in([self.values.get(alias), self.values[node]]):
                walk.leak(value.ids, "written in place through a view")
                walk.overwritten.update([] if value.ids is None else distinct(value.ids))


def _views_read_later(node: Node, target: Node) -> list[Node]:
    """Return what shares memory with a tensor that the node writes to, and is read afterwards."""
    order = {item: index for index, item in enumerate(node.graph.nodes)}
    shared = [target]
    while target.op == "call_function" and base_name(op_name(target)) in _VIEW_OPS:
        if not isinstance(target.args[0], Node):
            break
        target = target.args[0]
        shared.append(target)
    for item in shared:
        views = (user for user in item.users if base_name(op_name(user)) in _VIEW_OPS)
        shared += [v for v in views if order[v] < order[node] and v not in shared]
    return [x for x in shared[1:] if any(order[user] > order[node] for user in x.users)]


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
        for name, module in weight_modules(model)
        if name not in found and names.get(id(getattr(module, "weight", None))) not in found
    )
