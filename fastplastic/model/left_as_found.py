"""Leave a model as it was found, whatever happens in between."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy
import torch
from torch import Tensor, nn


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Let a model run forward and backward, then put everything back, bit for bit.

    Put back, also after an exception or an interrupt: buffers, training flags, `requires_grad`,
    `.grad` (the same tensors; None in between) and the random number generators of torch, numpy and
    Python. Hooks that act when a gradient has been accumulated (an optimizer that steps during
    backward) are off in between. Parameters are never written to.
    """
    buffers = _Buffers(model)
    modes = [(module, module.training) for module in model.modules()]
    gradients = _Gradients(model)
    python, numpys = random.getstate(), numpy.random.get_state()
    devices = sorted({p.get_device() for p in model.parameters() if p.is_cuda})
    try:
        with torch.random.fork_rng(devices):
            gradients.take_away()
            yield
    finally:
        gradients.put_back()
        buffers.put_back()
        for module, training in modes:
            module.training = training
        random.setstate(python)
        numpy.random.set_state(numpys)


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
