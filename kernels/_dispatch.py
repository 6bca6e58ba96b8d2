"""Which backend processes a tensor: chosen by its device, once.

The three functions below are those of the package without its guard against torch.compile, for
callers that have one themselves and come here many times in a step.
"""

from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, TypeVar

import torch
from torch import Tensor

_MODULES = {"triton": "gpu", "numba": "cpu", "pytorch": "reference"}
_Function = TypeVar("_Function", bound=Callable[..., Any])


def untraced(function: _Function) -> _Function:
    """Let torch.compile call a function as it is, outside of the compiled graph."""
    # The first, where there is one, loads the compiler at the first call only.
    disable: Any = getattr(torch, "_disable_dynamo", torch.compiler.disable)
    wrapped: _Function = disable(function)
    return wrapped


def backend(device: torch.device | str) -> str:
    """Return what tensors on this device are processed by: "triton", "numba" or "pytorch"."""
    return _backend(torch.device(device).type)


@cache
def _backend(kind: str) -> str:
    if kind == "cpu":
        return "numba"
    # ROCm devices are called cuda too. Triton is published for Linux only.
    return "triton" if kind == "cuda" and find_spec("triton") is not None else "pytorch"


@cache
def _function(kind: str, name: str) -> Any:
    """Return the function of this name for a kind of device, loaded when first needed."""
    return getattr(import_module(f".{_MODULES[_backend(kind)]}", __package__), name)


def twin(tensors: Tensor | Sequence[Tensor], name: str) -> Any:
    """Return the function of this name for the device of the tensors."""
    if isinstance(tensors, Tensor):
        return _function(tensors.device.type, name)
    return _function(tensors[0].device.type if len(tensors) else "cpu", name)


def activation_stats(
    x: Tensor, unit_axis: int = 1, activation: str = "identity", *, out: Tensor | None = None
) -> Tensor:
    """Sum up the activations of each unit; see `fastplastic.kernels.activation_stats`."""
    table: Tensor = twin(x, "activation_stats")(x, unit_axis, activation, out=out)
    return table


def gradient_stats(g: Tensor, unit_axis: int = 1, *, out: Tensor | None = None) -> Tensor:
    """Sum up the gradients of each unit; see `fastplastic.kernels.gradient_stats`."""
    table: Tensor = twin(g, "gradient_stats")(g, unit_axis, out=out)
    return table


def parameter_stats(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    groups: Sequence[int] | None = None,
    *,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum up weights and gradients; see `fastplastic.kernels.parameter_stats`."""
    tables: tuple[Tensor, Tensor] = twin(weights, "parameter_stats")(
        weights, gradients, groups, out=out
    )
    return tables
