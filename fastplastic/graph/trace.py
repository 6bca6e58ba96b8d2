"""Programs of a model traced with `torch.export`, in eval and in train mode."""

import contextlib
import inspect
import io
import logging
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Node

from fastplastic.graph.module_run import ALWAYS_EVAL
from fastplastic.graph.nodes import module_calls, op_name
from fastplastic.graph.stand_ins import lend_stand_ins
from fastplastic.model import attributes_kept

_SHAPE_OPS = ("sym_size", "size", "sym_numel", "dim")
_SPLITS = ("split", "split_with_sizes", "chunk", "unsafe_split", "unsafe_chunk", "tensor_split")


@dataclass(eq=False)
class Program:
    """What the rules need to know of one traced program.

    Attributes:
        mode: "eval" or "train", that it was traced in.
        parameters: {node: (name, transposed)} of parameters and plain views of them.
        parts: {node: (parameter name, first row)} of ranges of rows that a parameter is split into.
        buffers: {node: name}.
        constants: {node: value} of tensors that the forward pass makes from numbers.
        sizes: {parameter name: its number of rows}, of those that are split.
        uses: {parameter name: number of operators that read it}.
        owners: {node: name of the module that was running}.
        tied: {parameter name: all its names}.
        calls: How often each layer was called so far.
    """

    mode: str = "eval"
    parameters: dict[Node, tuple[str, bool]] = field(default_factory=dict)
    parts: dict[Node, tuple[str, int]] = field(default_factory=dict)
    buffers: dict[Node, str] = field(default_factory=dict)
    constants: dict[Node, Tensor] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    uses: Counter[str] = field(default_factory=Counter)
    owners: dict[Node, str] = field(default_factory=dict)
    tied: dict[str, tuple[str, ...]] = field(default_factory=dict)
    calls: Counter[str] = field(default_factory=Counter)


def export_program(model: nn.Module, example_inputs: Any, mode: str) -> ExportedProgram:
    """Trace a model in a mode; raises whatever torch.export raises."""
    args = () if isinstance(example_inputs, Mapping) else example_inputs
    args = args if isinstance(args, tuple) else (args,)
    kwargs = dict(example_inputs) if isinstance(example_inputs, Mapping) else {}
    if "use_cache" in inspect.signature(model.forward).parameters:
        # Decoders of Hugging Face return a cache, which torch.export does not take.
        kwargs.setdefault("use_cache", False)
    with in_mode(model, mode), torch.no_grad(), _silent(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if "_original_forward" in vars(model):
            # Mixed precision of Accelerate, which would hide all operators in one. It is put back.
            model.forward = vars(model)["_original_forward"]
        args, kwargs = lend_stand_ins(model, (args, kwargs))
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
def one_thread() -> Iterator[None]:
    """Compute on one thread: on the small tensors of a graph, others only burn time waiting."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


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
        with torch.random.fork_rng(devices), attributes_kept(model, hooks=True):
            torch.backends.mha.set_fastpath_enabled(False)
            for module in modules:
                module.training = mode == "train" and not isinstance(module, ALWAYS_EVAL)
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def program_of(
    model: nn.Module, program: ExportedProgram, mode: str, names: dict[int, str]
) -> Program:
    """Return what the rules need to know of a traced program."""
    signature = program.graph_signature
    # The one name of the parameter behind each placeholder, whatever it is shared as.
    canonical = {
        node_name: names.get(id(model.get_parameter(target)), target)
        for node_name, target in signature.inputs_to_parameters.items()
    }
    # Each is made anew whenever it is asked for.
    buffers = signature.inputs_to_buffers
    constants = signature.inputs_to_lifted_tensor_constants
    found = Program(mode, tied=_tied(model, names))
    for node in program.graph.nodes:
        found.owners[node] = list(module_calls(node).values() or [""])[-1]
        if node.name in canonical:
            found.parameters[node] = canonical[node.name], False
            found.uses[canonical[node.name]] += sum(
                op_name(user) not in _SHAPE_OPS for user in node.users
            )
        elif node.name in buffers:
            found.buffers[node] = buffers[node.name]
        elif node.name in constants:
            found.constants[node] = program.constants[constants[node.name]]
        elif node.op == "call_function":
            _note_view_of_parameter(node, found.parameters)
            _note_part_of_parameter(node, found)
    return found


def _tied(model: nn.Module, names: dict[int, str]) -> dict[str, tuple[str, ...]]:
    """Return {first name: all names} of parameters that several modules hold."""
    holders: dict[str, dict[int, str]] = defaultdict(dict)
    for name, tensor in model.named_parameters(remove_duplicate=False):
        module = model.get_submodule(name.rpartition(".")[0])
        # One module under two names is no second holder.
        holders[names[id(tensor)]].setdefault(id(module), name)
    return {name: tuple(own.values()) for name, own in holders.items() if len(own) > 1}


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


def _note_part_of_parameter(node: Node, program: Program) -> None:
    """Note a range of rows, as cross-attention takes them of the weight of q, k and v."""
    split = node.args[0] if op_name(node) == "getitem" else None
    if not isinstance(split, Node) or op_name(split) not in _SPLITS:
        return
    weight, dim = split.args[0], split.kwargs.get("dim", (*split.args[1:], 0, 0)[1])
    if not isinstance(weight, Node) or weight not in program.parameters or dim != 0:
        return
    name, turned = program.parameters[weight]
    if turned:
        return
    number = node.args[1]
    assert isinstance(number, int)
    rows = [part.shape[0] for part in split.meta["val"]]
    program.parts[node] = name, sum(rows[:number])
    program.sizes[name] = sum(rows)
    # What reads one part twice reads the parameter twice.
    program.uses[name] += max(len(node.users) - 1, 0)
