"""The Numba twins of all kernels, for tensors on the CPU."""

from ._cpu_activations import activation_stats
from ._cpu_gradients import gradient_stats
from ._cpu_parameters import parameter_stats
from ._cpu_resample import resample_
from ._cpu_select import select, selection_masks

__all__ = [
    "activation_stats",
    "gradient_stats",
    "parameter_stats",
    "resample_",
    "select",
    "selection_masks",
]
