"""The Triton twins of all kernels, for tensors on a GPU."""

from .activation_stats import activation_stats
from .gradient_stats import gradient_stats
from .parameter_stats import parameter_stats
from .resample import resample_
from .select import select, selection_masks

__all__ = [
    "activation_stats",
    "gradient_stats",
    "parameter_stats",
    "resample_",
    "select",
    "selection_masks",
]
