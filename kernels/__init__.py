"""Per-unit sums, selection and resampling over tensors, by the backend of the tensor's device.

    activation_stats    sums over the activations of each unit
    gradient_stats      sums over the gradients to the activations of each unit
    foreach_*           the same over many tensors, into one table
    parameter_stats     sums over the rows and columns of many weights and their gradients
    select              the elements with the smallest scores over many weights
    selection_masks     a selection as masks
    resample_           elements of many weights drawn afresh, in place
    WeightShard         which part of a weight a tensor is, for these three
    tell_of_compiling   calls back when kernels for the CPU are compiled first
    activate            an activation function by its name
    SCORES              what weights are selected by

`ACTIVATION_ROWS`, `GRADIENT_ROWS`, `PARAMETER_ROWS` and `PARAMETER_COLUMNS` name the rows of the
tables; `fastplastic.kernels.tables` says what they are.
"""

from fastplastic.kernels.activations import ACTIVATIONS, activate
from fastplastic.kernels.checks import DTYPES
from fastplastic.kernels.dispatch import (
    activation_stats,
    backend,
    foreach_activation_stats,
    foreach_gradient_stats,
    gradient_stats,
    parameter_stats,
    resample_,
    select,
    selection_masks,
    tell_of_compiling,
    untraced,
)
from fastplastic.kernels.law import Law
from fastplastic.kernels.scores import SCORES
from fastplastic.kernels.selection import Selection
from fastplastic.kernels.shards import WeightShard
from fastplastic.kernels.tables import (
    ACTIVATION_ROWS,
    GRADIENT_ROWS,
    PARAMETER_COLUMNS,
    PARAMETER_ROWS,
)

__all__ = [
    "ACTIVATIONS",
    "ACTIVATION_ROWS",
    "DTYPES",
    "GRADIENT_ROWS",
    "PARAMETER_COLUMNS",
    "PARAMETER_ROWS",
    "SCORES",
    "Law",
    "Selection",
    "WeightShard",
    "activate",
    "activation_stats",
    "backend",
    "foreach_activation_stats",
    "foreach_gradient_stats",
    "gradient_stats",
    "parameter_stats",
    "resample_",
    "select",
    "selection_masks",
    "tell_of_compiling",
    "untraced",
]
