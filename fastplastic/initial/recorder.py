"""Records how a model initialises its parameters, without memory for them.

The model is built on the meta device, where no number is ever made; the operations that would have
filled each parameter pass through a dispatch mode, which writes them down as a `Law`.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastplastic.initial.laws import Law, constant, normal, then, truncated_normal, uniform

# torch.nn.init returns at once on the meta device for these (orthogonal and Dirac have no law per
# element), so they have to be seen as calls.
_TRUNCATED = "_no_grad_trunc_normal_"
_WITHOUT_LAW = ("orthogonal_", "dirac_", "sparse_")


def record_laws(build: Callable[[], nn.Module]) -> dict[str, tuple[torch.Size, Law | None]]:
    """Return name -> (shape, law) of the parameters of the model that `build` makes.

    The law is None where the initial values have no law per element (orthogonal matrices, copied
    or computed values) or where none was seen. Random state is left as it was.

    Args:
        build: Makes the model; called once, under the meta device. What it raises goes through.
    """
    recorder = _Recorder()
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(torch.random.fork_rng(devices=()))
        stack.enter_context(_seen_by(recorder))
        stack.enter_context(torch.device("meta"))
        stack.enter_context(recorder)
        trusted = _sees_truncated_normal(recorder)
        model = build()
    return {
        name: (parameter.shape, recorder.law(parameter) if trusted else None)
        for name, parameter in model.named_parameters()
    }


# PyTorch leaves the methods of its modes untyped.
class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps the law of every storage that a factory or an in-place operation fills."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        # Parameters, their .data and detached views share one storage object.
        self._laws: dict[int, Law | None] = {}
        # A dead storage would give its id to another one.
        self._alive: list[Any] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        if func._schema.is_mutable:
            for target in _written(func._schema, args, kwargs):
                self.note(target, lambda old: _after(old, name, func._schema, args, kwargs))
        elif name in _FACTORIES and isinstance(result, Tensor):
            self.note(result, lambda _: _finite(lambda: _FACTORIES[name](args)))
        return result

    def law(self, tensor: Tensor) -> Law | None:
        """Return the law of a tensor, None where it has none."""
        return self._laws.get(id(tensor.untyped_storage()))

    def note(self, tensor: Tensor, change: Callable[[Law | None], Law | None]) -> None:
        """Change the law of the storage of a tensor; a part of it has no law of its own."""
        storage = tensor.untyped_storage()
        whole = storage.nbytes() == tensor.numel() * tensor.itemsize
        if id(storage) not in self._laws:
            self._alive.append(storage)
        old = self._laws.get(id(storage))
        self._laws[id(storage)] = change(old) if whole else None


def _written(schema: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    for position, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            yield from (v for v in (value if isinstance(value, list) else [value]) if v is not None)


def _after(
    old: Law | None, name: str, schema: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Law | None:
    """Return the law after one in-place operation."""
    numbers = _numbers(schema, args, kwargs)
    if numbers is None:
        return None
    if name in _SOURCES:
        return _finite(lambda: _SOURCES[name](numbers))
    if old is None or name not in _STEPS:
        return None
    return _STEPS[name](old, numbers)


def _numbers(schema: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, float] | None:
    """Return the arguments after the first by name; None when one is not a known number."""
    numbers = {}
    for position, argument in enumerate(schema.arguments[1:], start=1):
        default = argument.default_value if argument.has_default_value() else None
        value = args[position] if position < len(args) else kwargs.get(argument.name, default)
        if isinstance(value, Tensor) and value.numel() == 1 and not value.is_meta:
            value = value.item()
        if isinstance(value, Tensor | str):
            return None
        if isinstance(value, int | float):
            numbers[argument.name] = float(value)
    return numbers


_SOURCES: dict[str, Callable[[dict[str, float]], Law]] = {
    "zero_": lambda _: constant(0.0),
    "fill_": lambda n: constant(n["value"]),
    "uniform_": lambda n: uniform(n["from"], n["to"]),
    "normal_": lambda n: normal(n["mean"], n["std"]),
}

_STEPS: dict[str, Callable[[Law, dict[str, float]], Law | None]] = {
    "mul_": lambda law, n: then(law, "mul", n["other"]),
    "div_": lambda law, n: then(law, "div", n["other"]),
    "add_": lambda law, n: then(law, "add", n["other"] * n.get("alpha", 1.0)),
    "sub_": lambda law, n: then(law, "add", -n["other"] * n.get("alpha", 1.0)),
    "erfinv_": lambda law, _: then(law, "erfinv"),
    "clamp_": lambda law, n: then(law, "clamp", n.get("min", -torch.inf), n.get("max", torch.inf)),
}

_FACTORIES: dict[str, Callable[[tuple[Any, ...]], Law]] = {
    "zeros": lambda _: constant(0.0),
    "zeros_like": lambda _: constant(0.0),
    "ones": lambda _: constant(1.0),
    "ones_like": lambda _: constant(1.0),
    "full": lambda args: constant(float(args[1])),
}


def _finite(make: Callable[[], Law]) -> Law | None:
    """Return a new law; None where it would not be finite, as in a mask of -inf."""
    try:
        return make()
    except (ValueError, ZeroDivisionError):
        return None


@contextmanager
def _seen_by(recorder: _Recorder) -> Iterator[None]:
    """Let the recorder see the functions of torch.nn.init that skip meta tensors."""
    laws: dict[str, Callable[..., Law | None]] = dict.fromkeys(_WITHOUT_LAW, lambda *_, **__: None)
    # Of a version that has no such function the elementwise operations are seen.
    if hasattr(nn.init, _TRUNCATED):
        laws[_TRUNCATED] = lambda mean, std, a, b, **_: _finite(
            lambda: truncated_normal(mean, std, a, b)
        )
    with ExitStack() as stack:
        for name, law in laws.items():
            watched = _watched(getattr(nn.init, name), law, recorder)
            stack.enter_context(mock.patch.object(nn.init, name, watched))
        yield


def _watched(
    original: Callable[..., Tensor], law: Callable[..., Law | None], recorder: _Recorder
) -> Callable[..., Tensor]:
    def watched(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if tensor.is_meta:
            recorder.note(tensor, lambda _: law(*args, **kwargs))
            return tensor
        # Another thread may initialise a model of its own meanwhile.
        return original(tensor, *args, **kwargs)

    return watched


def _sees_truncated_normal(recorder: _Recorder) -> bool:
    """Tell whether `trunc_normal_` of this version of PyTorch leaves its law, by trying it."""
    probe = torch.zeros(2)
    nn.init.trunc_normal_(probe, std=0.5)
    # Seen through a second tensor: laws are found by the storage that both share.
    law = recorder.law(probe.detach())
    return law is not None and law.scale != 0
