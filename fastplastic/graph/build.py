"""Build the unit graph: read the traced programs of a model operator by operator.

`rules_*` say what each operator does to the units, `ledger` keeps the books, `unit_layers` writes
the result down. What the rules cannot decide is marked as not resettable with the reason.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Node

# Importing them registers their rules.
from fastplastic.graph import rules_layers, rules_layout  # noqa: F401
from fastplastic.graph.activations import activation_regions
from fastplastic.graph.ledger import Ledger
from fastplastic.graph.module_graph import module_graph
from fastplastic.graph.module_run import weight_modules
from fastplastic.graph.nodes import base_name, branch_point, op_name
from fastplastic.graph.rules import OPERANDS, RULES, SHAPES, data_sources, unknown
from fastplastic.graph.rules_elementwise import activate
from fastplastic.graph.trace import export_program, one_thread, program_of
from fastplastic.graph.unit_layers import layers_of
from fastplastic.graph.values import Value, distinct, plain, values_in
from fastplastic.wiring import UnitGraph, UnitLayer

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
    ledger = Ledger()
    failed: dict[str, str] = {}
    for mode in modes:
        try:
            program = export_program(model, example_inputs, mode)
        except Exception as error:  # torch.export has no common base for what it raises
            lines = str(error).strip().splitlines() or [""]
            failed[mode] = f"{type(error).__name__}: {lines[0][:200]}"
        else:
            with one_thread():
                _read(ledger, model, program, mode, names)
    if len(failed) == len(modes):
        return module_graph(model, example_inputs, failed[modes[0]], build_graph)
    note = None
    for mode, reason in failed.items():
        everything = torch.arange(len(ledger.parent), dtype=torch.int32)
        ledger.leak(everything, f"the model could not be traced in {mode} mode")
        note = (
            f"the model could not be traced in {mode} mode: which layers read its units there is "
            f"not known, and none can be re-initialised ({reason})"
        )
    with one_thread():
        ledger.settle()
        layers = layers_of(ledger)
    return UnitGraph(layers, _unreached(model, layers, names), note)


def _read(
    ledger: Ledger, model: nn.Module, program: ExportedProgram, mode: str, names: dict[int, str]
) -> None:
    """Read a traced program once, in execution order."""
    ledger.program = program_of(model, program, mode, names)
    regions = activation_regions(program, model)
    tensors = _Tensors()
    values = tensors.values
    inputs = set(program.graph_signature.user_inputs)
    for node in program.graph.nodes:
        ledger.order[node] = len(ledger.order)
        if node.op == "placeholder":
            tensor = node.meta.get("val")
            values[node] = (
                plain(node, node.name not in inputs) if isinstance(tensor, Tensor) else tensor
            )
            continue
        ledger.sources[node] = tensors.sources(node)
        if node.op == "call_function":
            _step(ledger, node, values, regions)
            if _writes(node):
                tensors.write(ledger, node)
        elif node.op == "output":
            ledger.read(node, ledger.sources[node])
            _leave(ledger, torch.fx.node.map_arg(node.args, values.__getitem__))


def _step(
    ledger: Ledger,
    node: Node,
    values: dict[Node, Any],
    regions: dict[Node, tuple[Node, str] | None],
) -> None:
    """Give the node's output its value."""
    if node in regions:
        ledger.made[node] = values[node] = _activation_module(ledger, node, values, regions[node])
        return
    ledger.read(node, data_sources(node, ledger.sources[node]))
    args = list(torch.fx.node.map_arg(node.args, lambda x: values.get(x)))
    kwargs = {
        key: torch.fx.node.map_arg(x, values.get)
        for key, x in node.kwargs.items()
        if isinstance(x, Node)
    }
    result = _apply(ledger, node, args, kwargs)
    if isinstance(result, Value) and result.pristine and branch_point(node):
        ledger.branched.add(node)
        result = Value(result.shape, result.ids, result.const)
    ledger.made[node] = values[node] = result


def _apply(ledger: Ledger, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """Apply the rule of the node's operator; mark units that enter where no rule expects them."""
    name = base_name(op_name(node))
    rule, read = RULES.get(name), OPERANDS.get(name)
    everything = [*args, *kwargs.values()]
    if rule is None:
        return unknown(ledger, node, everything)
    try:
        result = rule(ledger, node, everything if read is None else args)
    except Exception:  # operators have overloads that no rule foresees: then no unit is trusted
        return unknown(ledger, node, everything)
    if read is not None:
        left = [arg for at, arg in enumerate(args) if at not in read | SHAPES[name]]
        for value in values_in([*left, *kwargs.values()]):
            if value.ids is not None:
                ledger.leak(value.ids, f"enters {name} at a place that no rule names")
                ledger.opaque[node] = name
    return result


def _activation_module(
    ledger: Ledger, node: Node, values: dict[Node, Any], region: tuple[Node, str] | None
) -> Value | Any:
    """Return the value of a node in a module that is one activation function."""
    if region is None:
        return plain(node)
    entry, name = region
    ledger.sources[node] = [entry]
    ledger.read(node, [entry])
    value: Value = values[entry]
    return plain(node) if value.ids is None else activate(ledger, node, value, name)


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

    def write(self, ledger: Ledger, node: Node) -> None:
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
                ledger.leak(value.ids, "written in place through a view")
                ledger.overwritten.update([] if value.ids is None else distinct(value.ids))


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


def _leave(ledger: Ledger, value: Any, reason: str = "leaves the network") -> None:
    if isinstance(value, Value):
        ledger.leak(value.ids, reason)
    elif isinstance(value, Mapping):
        _leave(ledger, list(value.values()), reason)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _leave(ledger, item, reason)


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
