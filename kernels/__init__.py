"""Per-unit sums, selection and resampling over tensors, by the backend of the tensor's device.

    activation_stats    sums over the activations of each unit
    gradient_stats      sums over the gradients to the activations of each unit
    parameter_stats     sums over the rows and columns of many weights and their gradients
    select              the elements with the smallest scores over many weights
    selection_masks     a selection as masks
    resample_           elements of many weights drawn afresh, in place

CUDA and ROCm tensors go to Triton kernels (`gpu`), CPU tensors to Numba kernels (`cpu`), all others
to plain PyTorch (`reference`), which is also what the other two are tested against.

Rows of the tables: "n..." counts, "sum_..." adds up, "abs" and "sq" are of size and square.

    ACTIVATION_ROWS     n finite positions, sum_h, sum_abs_h, sum_sq_h, min_h, max_h, n_zero where h
                        is 0, n_flat where abs(f'(z)) <= 0.01, n_nonfinite_h where z or h is not
    GRADIENT_ROWS       n_g finite gradients, sum_abs_g, sum_sq_g, n_nonfinite_g
    PARAMETER_ROWS      n weights in the row, sum_abs_w, sum_sq_w, n_dw finite gradients,
                        sum_abs_dw, sum_sq_dw, sum_abs_w_dw of abs(w dw), n_nonfinite_dw
    PARAMETER_COLUMNS   the same of columns, but sum_w_dw with signs: over the columns that read a
                        unit that is its first-order saliency, the sum of h dL/dh
"""

from collections.abc import Sequence

from torch import Tensor

from ._definitions import (
    ACTIVATION_ROWS,
    ACTIVATIONS,
    GRADIENT_ROWS,
    PARAMETER_COLUMNS,
    PARAMETER_ROWS,
)
from ._dispatch import backend, twin, untraced
from ._law import Law
from ._select_host import Selection

__all__ = [
    "ACTIVATIONS",
    "ACTIVATION_ROWS",
    "GRADIENT_ROWS",
    "PARAMETER_COLUMNS",
    "PARAMETER_ROWS",
    "Law",
    "Selection",
    "activation_stats",
    "backend",
    "gradient_stats",
    "parameter_stats",
    "resample_",
    "select",
    "selection_masks",
]


@untraced
def activation_stats(
    x: Tensor, unit_axis: int = 1, activation: str = "identity", *, out: Tensor | None = None
) -> Tensor:
    """Sum up the activations of each unit.

    Args:
        x: Pre-activations z, floating point, any shape and strides.
        unit_axis: Dimension of `x` that runs over the C units.
        activation: Name of f in h = f(z), one of `ACTIVATIONS`, or "leaky_relu:0.2" for a leaky
            ReLU with another slope than 0.01. hardtanh is the one between -1 and 1.
        out: float64 [9, C] on the device of `x` to add to in place (minima and maxima are
            compared); its columns are adjacent. None for a fresh table.

    Returns:
        float64 [9, C] on the device of `x`, rows as in `ACTIVATION_ROWS`, in the unit of h. Where z
        or h is NaN or infinite, the position is counted in the last row and in no other. With
        n = 0, min is +inf and max is -inf. Where `x` is of half precision, minima, maxima and zeros
        are those of h in that precision; sums are of h in float32 (of float64 `x`, in float64).

    Raises:
        ValueError: The activation is unknown, `x` has no such axis or is not floating point, or
            `out` does not fit.
    """
    table: Tensor = twin(x, "activation_stats")(x, unit_axis, activation, out=out)
    return table


@untraced
def gradient_stats(g: Tensor, unit_axis: int = 1, *, out: Tensor | None = None) -> Tensor:
    """Sum up the gradients to the activations of each unit.

    Args:
        g: dL/dh, floating point, any shape and strides.
        unit_axis: Dimension of `g` that runs over the C units.
        out: float64 [4, C] on the device of `g` to add to in place. None for a fresh table.

    Returns:
        float64 [4, C] on the device of `g`, rows as in `GRADIENT_ROWS`, in the unit of loss per
        unit of h. NaN and infinite gradients are counted in the last row and in no other.

    Raises:
        ValueError: `g` has no such axis or is not floating point, or `out` does not fit.
    """
    table: Tensor = twin(g, "gradient_stats")(g, unit_axis, out=out)
    return table


@untraced
def parameter_stats(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    groups: Sequence[int] | None = None,
    *,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum up every weight and its gradient, along rows (dimension 0) and columns (dimension 1).

    With more than one group (grouped convolution) the rows are cut into as many equal ranges, and
    index j of dimension 1 is another column in each: column k * D1 + j in group k.

    Args:
        weights: Weights w [D0, D1, ...], floating point, any strides, on one device. Where units
            are along dimension 1, pass the transposed view.
        gradients: dL/dw in the same shapes, or None.
        groups: Number of groups of each weight; None for 1.
        out: (rows, columns) to add to in place, shaped as returned. None for fresh tables.

    Returns:
        rows, float64 [8, sum of D0], as in `PARAMETER_ROWS`, and columns, float64
        [6, sum of groups * D1], as in `PARAMETER_COLUMNS`, the weights one after the other. NaN and
        infinite elements of a gradient are counted and left out of all other rows with dw.

    Raises:
        ValueError: The numbers of weights, gradients and groups differ, shapes do not fit, or a
            tensor is not floating point.
    """
    function = twin(weights, "parameter_stats")
    tables: tuple[Tensor, Tensor] = function(weights, gradients, groups, out=out)
    return tables


@untraced
def select(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor | None] | None,
    names: Sequence[str],
    count: int,
    *,
    criterion: str = "swr",
    caps: Sequence[int] | None = None,
    seed: int = 0,
) -> Selection:
    """Choose the elements with the smallest scores over all weights at once, exactly `count`.

    Elements with equal scores are ordered by Philox word 0 of (seed, "ties", name) at the element,
    those with equal words too by weight and element.

    Args:
        weights: Tensors on one device, float32, bfloat16, float16 or float64, of any strides.
        gradients: dL/dw in the shape of each weight; not read, and may be None, for "magnitude"
            and "random".
        names: Name of each weight, by which the tie words are keyed.
        count: Number of elements to select, at most as many as are eligible within the caps.
        criterion: Score of an element: "swr" |w| |dw| (Hernandez-Garcia, arXiv 2508.00212),
            "gradient" |dw|, "magnitude" |w|, or "random" for none; all in float32. An element
            whose score is NaN is not eligible; an infinite one comes last.
        caps: Most elements to select in each weight; None for no limit.
        seed: Any integer.

    Returns:
        The selection as thresholds (three numbers for each weight), with how many elements are
        taken of each; `selection_masks` makes masks of it.

    Raises:
        ValueError: The arguments do not fit together, or `count` is more than the caps and the
            eligible elements allow.
    """
    chosen: Selection = twin(weights, "select")(
        weights, gradients, names, count, criterion=criterion, caps=caps, seed=seed
    )
    return chosen


@untraced
def selection_masks(
    selection: Selection, weights: Sequence[Tensor], gradients: Sequence[Tensor | None] | None
) -> list[Tensor]:
    """Return which elements of each weight are selected, bool in the shape of the weight.

    Args:
        selection: What `select` returned.
        weights: The weights that it was given.
        gradients: The gradients that it was given.

    Raises:
        ValueError: The weights or gradients are not such as the selection can be of.
    """
    masks: list[Tensor] = twin(weights, "selection_masks")(selection, weights, gradients)
    return masks


@untraced
def resample_(
    weights: Sequence[Tensor],
    names: Sequence[str],
    laws: Sequence[Law],
    *,
    seed: int = 0,
    masks: Sequence[Tensor | None] | None = None,
    selection: Selection | None = None,
    gradients: Sequence[Tensor | None] | None = None,
) -> None:
    """Write fresh initial values into the selected elements of weights, in place.

    A value depends on the seed, the name of the weight, its law and the element alone: not on what
    else is selected, on strides or on the device.

    Args:
        weights: Tensors on one device, float32, bfloat16, float16 or float64, of any strides.
        names: Name of each weight, by which its values are keyed.
        laws: Law of each weight.
        seed: Any integer.
        masks: Which elements to write, bool in the shape of each weight (a row mask may be
            expanded), or None for all; all of every weight without masks and selection.
        selection: What `select` chose among these weights, instead of masks. Scores are computed
            again, from the weights as they are.
        gradients: The gradients that `select` was given, where its criterion reads them.

    Raises:
        ValueError: The arguments do not fit together, or a weight is expanded.
    """
    twin(weights, "resample_")(
        weights, names, laws, seed=seed, masks=masks, selection=selection, gradients=gradients
    )
