"""Per-unit sums over tensors; each launcher picks the implementation for the tensor's device."""

import torch

from .reference import (
    ACTIVATION_ROWS,
    ACTIVATIONS,
    GRADIENT_ROWS,
    PARAMETER_ROWS,
    activation_stats,
    gradient_stats,
    parameter_stats,
)

__all__ = [
    "ACTIVATIONS",
    "ACTIVATION_ROWS",
    "GRADIENT_ROWS",
    "PARAMETER_ROWS",
    "activation_stats",
    "backend",
    "gradient_stats",
    "parameter_stats",
]


def backend(device: torch.device | str) -> str:
    """Return the name of the implementation that tensors on this device go to."""
    torch.device(device)
    return "pytorch"
