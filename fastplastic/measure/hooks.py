"""Hooks on the modules whose tensors are read."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fastplastic.measure.slots import TensorRead
from fastplastic.wiring import Where


class SiteCalls(NamedTuple):
    """What hooks call: with what is read there, then as torch calls hooks.

    Attributes:
        output, input: What a module returns, is given.
        attention: An `nn.MultiheadAttention`, and first which argument is read.
        run: A module runs whose name is given.
    """

    output: Callable[..., None]
    input: Callable[..., None]
    attention: Callable[..., None]
    run: Callable[..., None]


class SiteHooks:
    """Hooks that can be put on a model and taken off it.

    Args:
        model: The model.
        sites: (module name, where) -> what is read there.
        noted: Names of modules of which is noted that they run.
        calls: What is called.
        early: Whether inputs are seen before other hooks change them, as tensor parallelism does.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Mapping[tuple[str, Where], list[TensorRead]],
        noted: Iterable[str],
        calls: SiteCalls,
        early: bool = False,
    ) -> None:
        self._early = early
        self._model, self._sites, self._noted, self._calls = model, sites, set(noted), calls
        self._handles: list[RemovableHandle] = []

    def put_on(self) -> None:
        """Put the hooks on the model; does nothing when they are."""
        if self._handles:
            return
        add = self._handles.append
        for (name, where), reads in self._sites.items():
            module = self._model.get_submodule(name)
            if where == "output":
                add(module.register_forward_hook(partial(self._calls.output, reads)))
            elif where != "input":
                hook = partial(self._calls.attention, where, reads)
                add(module.register_forward_hook(hook, with_kwargs=True))
            else:
                pre_hook = partial(self._calls.input, reads)
                add(
                    module.register_forward_pre_hook(
                        pre_hook, with_kwargs=True, prepend=self._early
                    )
                )
        for name, module in self._model.named_modules():
            if name in self._noted:
                note: Callable[..., Any] = partial(self._calls.run, name)
                add(module.register_forward_pre_hook(note))

    def take_off(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def hook_gradient(tensor: Tensor, hook: Callable[[Tensor], None]) -> RemovableHandle:
    """Call a hook with every gradient of a tensor."""
    register: Callable[..., RemovableHandle] = tensor.register_hook
    return register(hook)


def in_backward() -> bool:
    """Tell whether this thread is inside a backward pass, as in a recomputation of activations."""
    return bool(torch._C._current_graph_task_id() != -1)
