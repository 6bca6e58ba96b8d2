"""Leave a model as it was found, whatever happens in between."""

import random
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from fastplastic.model.watchers import unwatched

# Where torch keeps hooks on a module.
_HOOKS = frozenset(name for name in vars(nn.Module()) if "hook" in name)
# Of these alone it is known that emptying and refilling them brings them back.
_MAPPINGS = (dict, OrderedDict, defaultdict, Counter)
_CONTAINERS = (*_MAPPINGS, list, deque, set)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Let a model run forward and backward, then put everything back, bit for bit.

    Put back, also after an exception or an interrupt: buffers, training flags, `requires_grad`,
    `.grad` (the same tensors; None in between), what a forward pass sets on modules (caches,
    counters), and the random number generators of torch, numpy and Python. Hooks that act when a
    gradient has been accumulated (an optimizer that steps during backward) are off in between.
    Hooks on modules belong to whoever adds or removes them; a `Monitor` counts nothing in between.
    Parameters are never written to.
    """
    buffers = _Buffers(model)
    modes = [(module, module.training) for module in model.modules()]
    gradients = _Gradients(model)
    python, numpys = random.getstate(), numpy.random.get_state()
    devices = sorted({p.get_device() for p in model.parameters() if p.is_cuda})
    try:
        kept = attributes_kept(model, hooks=False)
        with torch.random.fork_rng(devices), kept, unwatched(model):
            gradients.take_away()
            yield
    finally:
        gradients.put_back()
        buffers.put_back()
        for module, training in modes:
            module.training = training
        random.setstate(python)
        numpy.random.set_state(numpys)


@contextmanager
def attributes_kept(model: nn.Module, *, hooks: bool) -> Iterator[None]:
    """Put back what a forward pass sets on modules: counters, caches, flags.

    That is every attribute of every module, what is in lists, sets and dictionaries, one inside the
    other, and the values of tensors that are neither parameters nor buffers. A cache may hold
    tensors with a graph, and a model with such tensors cannot be copied.

    Args:
        model: The model; its parameters and buffers keep the values that they have.
        hooks: Whether hooks on modules are put back too, as after a run that is none of the user's.
    """
    left = frozenset[str]() if hooks else _HOOKS
    kept = [_Attributes(module, left) for module in model.modules()]
    held = _Held(model, left)
    try:
        yield
    finally:
        for attributes in kept:
            attributes.put_back()
        held.put_back()


class _Attributes:
    """Which attributes a module has, but for those that are left alone."""

    def __init__(self, module: nn.Module, left: frozenset[str]) -> None:
        self._own, self._left = vars(module), left
        self._saved = dict(self._own)

    def put_back(self) -> None:
        left = {name: x for name, x in self._own.items() if name in self._left}
        self._own.clear()
        # In the old order, which `|` keeps.
        self._own.update(self._saved | left)


class _Held:
    """What the attributes of modules hold: the items of containers, the values of tensors."""

    def __init__(self, model: nn.Module, left: frozenset[str]) -> None:
        members = [*model.parameters(), *model.buffers()]
        # Parameters and buffers are not copied here, however they are held.
        self._seen = {id(tensor) for tensor in members}
        self._containers: list[tuple[Any, Any]] = []
        self._tensors: list[tuple[Tensor, int, Tensor]] = []
        for module in model.modules():
            self._note(x for name, x in vars(module).items() if name not in left)

    def _note(self, values: Iterable[Any]) -> None:
        waiting = list(values)
        while waiting:
            value = waiting.pop()
            kind = type(value)
            if id(value) in self._seen or not (
                kind in _CONTAINERS or isinstance(value, (tuple, Tensor))
            ):
                continue
            self._seen.add(id(value))
            if isinstance(value, Tensor):
                self._note_tensor(value)
                continue
            if kind in _CONTAINERS:
                self._containers.append((value, value.copy()))
            waiting += value.values() if kind in _MAPPINGS else value

    def _note_tensor(self, tensor: Tensor) -> None:
        if tensor.is_inference() or tensor.is_meta or tensor.layout is not torch.strided:
            return
        # Several elements at one place in memory cannot be written to.
        if 0 not in tensor.stride():
            self._tensors.append((tensor, tensor._version, tensor.detach().clone()))

    def put_back(self) -> None:
        for container, items in self._containers:
            container.clear()
            if type(container) in (list, deque):
                container.extend(items)
            else:
                container.update(items)
        with torch.no_grad():
            for tensor, version, value in self._tensors:
                if tensor._version != version:
                    tensor.copy_(value)


class _Buffers:
    """The buffers of every module: which tensors they are, and their values."""

    def __init__(self, model: nn.Module) -> None:
        self._owned = [(module._buffers, dict(module._buffers)) for module in model.modules()]
        tensors = {id(t): t for _, saved in self._owned for t in saved.values() if t is not None}
        self._values = [(tensor, tensor.detach().clone()) for tensor in tensors.values()]

    def put_back(self) -> None:
        for buffers, saved in self._owned:
            # The forward pass may have put another tensor in its place.
            buffers.clear()
            buffers.update(saved)
        with torch.no_grad():
            for tensor, value in self._values:
                tensor.copy_(value)


class _Gradients:
    """What hangs on every parameter: its gradient, whether it gets one, and who is told."""

    def __init__(self, model: nn.Module) -> None:
        self._saved: list[tuple[Tensor, bool, Tensor | None, Any]] = [
            (p, p.requires_grad, p.grad, p._post_accumulate_grad_hooks) for p in model.parameters()
        ]

    def take_away(self) -> None:
        for parameter, _, _, hooks in self._saved:
            parameter.grad = None
            if hooks is not None:
                # None would leave the old ones in the autograd engine.
                _set_hooks(parameter, {})

    def put_back(self) -> None:
        for parameter, requires_grad, gradient, hooks in self._saved:
            parameter.requires_grad_(requires_grad)
            parameter.grad = gradient
            if hooks is not None:
                _set_hooks(parameter, hooks)


def _set_hooks(parameter: Tensor, hooks: Any) -> None:
    parameter._post_accumulate_grad_hooks = hooks
