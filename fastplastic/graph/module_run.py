"""One run of a model, watched module by module: what reads the outputs of its weight layers."""

import threading
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastplastic.model import undisturbed
from fastplastic.wiring import is_conv1d

Place = tuple[str, Literal["input", "output"]]

# They wire nothing, and a BatchNorm refuses to train on a single sample.
ALWAYS_EVAL = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)
# Operators that keep all elements: in another shape, or as a copy.
_TURNING = ("t", "transpose", "permute")
_SAME_ELEMENTS = (
    "view", "_unsafe_view", "_reshape_alias", "alias", "detach", "clone", "squeeze", "unsqueeze",
    *_TURNING,
)  # fmt: skip
# What a weight layer ends with: a product, and perhaps the bias.
_PRODUCTS = ("addmm", "mm", "addmv", "mv", "bmm", "convolution", "add")


def weight_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield (name, module) of every linear and convolution layer."""
    for name, module in model.named_modules():
        if _is_layer(module):
            yield name, module


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)) or is_conv1d(module)


@dataclass(eq=False)
class Seen:
    """A tensor that has the units of a layer, from when it was made to when it is overwritten.

    Attributes:
        tensor: The tensor; as long as it is held, no other one has its id.
        axis: Its dimension of units, counted from the end; None where a view hides it.
        places: Where hooks see it.
        calls: The calls of modules that read it.
        views: The same elements in other tensors.
        lost: Whether an operator outside of these modules reads it.
        returned: Whether the model returns it.
    """

    tensor: Tensor
    axis: int | None
    places: list[Place] = field(default_factory=list)
    calls: list["Call"] = field(default_factory=list)
    views: list["Seen"] = field(default_factory=list)
    lost: bool = False
    returned: bool = False


@dataclass(eq=False)
class Call:
    """A call of a module.

    Attributes:
        name: Name of the module.
        module: The module.
        kind: "layer", "norm", "function" for what may be an activation function, or "".
        own: What it is called with, and views of that.
        result: What it makes of that.
        made: {id: (tensor, operator that made it)} while a layer runs.
    """

    name: str
    module: nn.Module
    kind: str
    own: list[Seen]
    result: Seen | None = None
    made: dict[int, tuple[Tensor, str]] = field(default_factory=dict)


# PyTorch leaves the methods of its modes untyped.
class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees which modules and operators read the outputs of weight layers.

    Attributes:
        calls: How often each module was called.
        outputs: {layer name: what each of its calls made, None where that is no pre-activation}.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: Counter[str] = Counter()
        self.outputs: dict[str, list[Seen | None]] = defaultdict(list)
        self._seen: dict[int, Seen] = {}
        self._stack: list[Call] = []
        self._thread = threading.get_ident()

    def run(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Run the model on an example, with hooks that are gone afterwards."""
        with ExitStack() as hooks:
            for name, module in model.named_modules():
                enter, leave = partial(self._enter, name), partial(self._leave, name)
                before = module.register_forward_pre_hook(enter, with_kwargs=True)
                hooks.callback(before.remove)
                # Called after an exception too, which the model may catch.
                hooks.callback(module.register_forward_hook(leave, always_call=True).remove)
            with self:
                output = model(*args, **kwargs)
        for seen in self._found(output):
            seen.returned = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator, and note what it reads."""
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.partition("::")[2].removesuffix("_")
        call = next((call for call in reversed(self._stack) if call.kind), None)
        if call is not None and call.kind == "layer":
            _note_made(call, name, args, out)
        for seen in self._found((args, kwargs)):
            owner = call if call is not None and seen in call.own else None
            if name in _SAME_ELEMENTS and isinstance(out, Tensor):
                self._follow(seen, name, out, owner)
            elif owner is not None:
                self._read(seen, name, out, owner)
            else:
                seen.lost = True
        return out

    def _follow(self, seen: Seen, name: str, out: Tensor, call: Call | None) -> None:
        same = out.shape == seen.tensor.shape and name not in _TURNING
        view = self._track(out, seen.axis if same else None)
        seen.views.append(view)
        if call is not None:
            call.own.append(view)

    def _read(self, seen: Seen, name: str, out: Any, call: Call) -> None:
        """Note that a module reads what it was called with."""
        if call.kind == "norm":
            normed = out[0] if isinstance(out, tuple) else out
            channels = None if seen.axis is None else seen.tensor.ndim + seen.axis
            if "batch_norm" not in name or channels != 1 or call.result is not None:
                seen.lost = True
                return
            call.result = self._track(normed, seen.axis)
        if call not in seen.calls:
            seen.calls.append(call)

    def _enter(
        self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        # Other threads (of DataParallel) run copies of modules, whose operators are not seen.
        if threading.get_ident() != self._thread:
            return
        values = (*args, *kwargs.values())
        seen = self._of(values)
        kind = _kind(module)
        # A function of several values is none of the pre-activation alone.
        own = [seen] if seen is not None and (kind != "function" or len(values) == 1) else []
        self.calls[name] += 1
        self._stack.append(Call(name, module, kind, own))
        if seen is not None:
            seen.places.append((name, "input"))

    def _leave(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if threading.get_ident() != self._thread or all(
            x.module is not module for x in self._stack
        ):
            return
        call = self._stack.pop()
        while call.module is not module:
            call = self._stack.pop()
        if call.kind == "layer":
            self.outputs[name].append(self._units(call, output))
            call.made.clear()
        elif call.kind == "function" and any(call in seen.calls for seen in call.own):
            call.result = self._result(call.own[0], output)
        seen = self._of(output if isinstance(output, (tuple, list)) else (output,))
        if seen is not None:
            seen.places.append((name, "output"))

    def _units(self, call: Call, output: Any) -> Seen | None:
        """Return the output of a weight layer if that is what its weight makes, and no more."""
        _, operator = call.made.get(id(output), (None, ""))
        if operator not in _PRODUCTS:
            return None
        return self._track(output, -1 - len(getattr(call.module, "kernel_size", ())))

    def _result(self, seen: Seen, output: Any) -> Seen | None:
        if not isinstance(output, Tensor):
            return None
        return self._track(output, seen.axis if output.shape == seen.tensor.shape else None)

    def _track(self, tensor: Tensor, axis: int | None) -> Seen:
        # What is written in place is one tensor with two meanings: from here on the new one.
        self._seen[id(tensor)] = seen = Seen(tensor, axis)
        return seen

    def _of(self, values: Sequence[Any]) -> Seen | None:
        """Return the first of some values, which is the one that a hook will see."""
        return self._seen.get(id(values[0])) if values else None

    def _found(self, values: Any) -> Iterator[Seen]:
        """Yield what is tracked in nested values."""
        if isinstance(values, Tensor):
            if id(values) in self._seen:
                yield self._seen[id(values)]
        elif isinstance(values, Mapping):
            yield from self._found(list(values.values()))
        elif isinstance(values, (tuple, list)):
            for value in values:
                yield from self._found(value)


def _note_made(call: Call, name: str, args: Any, out: Any) -> None:
    """Note which operator made a tensor in a weight layer, whatever its shape afterwards."""
    if isinstance(out, Tensor):
        if name in _SAME_ELEMENTS:
            name = call.made.get(id(args[0]), (None, name))[1]
        call.made[id(out)] = out, name


def _kind(module: nn.Module) -> str:
    if _is_layer(module):
        return "layer"
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return "norm"
    alone = next(module.children(), None) is None and next(module.parameters(), None) is None
    return "function" if alone else ""


def run_once(model: nn.Module, example_inputs: Any) -> Watch:
    """Run a model on an example and return what was seen; the model is left as found.

    It runs in the mode it is in, but with norms and dropouts in eval mode.

    Args:
        model: Any module.
        example_inputs: A tensor, a tuple of positional or a mapping of keyword arguments.
    """
    kwargs = dict(example_inputs) if isinstance(example_inputs, Mapping) else {}
    args = () if isinstance(example_inputs, Mapping) else example_inputs
    args = args if isinstance(args, tuple) else (args,)
    watch = Watch()
    with undisturbed(model), torch.inference_mode(False), torch.no_grad(), _quiet(model):
        watch.run(model, args, kwargs)
    return watch


@contextmanager
def _quiet(model: nn.Module) -> Iterator[None]:
    """Let a model run without chance and warnings; who enters puts training flags back."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module in model.modules():
            if isinstance(module, ALWAYS_EVAL):
                module.training = False
        yield
