"""The public functions of the package: each hands its tensors to the backend of their device.

CUDA and ROCm tensors go to Triton kernels (`gpu`), CPU tensors to Numba kernels (`cpu`), all others
to plain PyTorch (`reference`), which is also what the other two are tested against.
"""

from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastplastic.kernels.law import Law
from fastplastic.kernels.selection import Reduce, Selection
from fastplastic.kernels.shards import Shards
from fastplastic.kernels.tables import ACTIVATION_ROWS, GRADIENT_ROWS, check_columns, counted

_FOLDERS = {"triton": "gpu", "numba": "cpu", "pytorch": "reference"}
# The file of a function, where it has another name.
_STEMS = {
    "selection_masks": "select", "resample_": "resample",
    "foreach_activation_stats": "activation_stats", "foreach_gradient_stats": "gradient_stats",
}  # fmt: skip
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
def kernel_of(backend: str, name: str) -> Any:
    """Return the function of a backend, loaded when first needed.

    Args:
        backend: "triton", "numba" or "pytorch".
        name: Name of one of the public functions of this package that take tensors.
    """
    module = f"fastplastic.kernels.{_FOLDERS[backend]}.{_STEMS.get(name, name)}"
    return getattr(import_module(module), name)


def tell_of_compiling(tell: Callable[[], None]) -> None:
    """Have a function called, once, when kernels for the CPU are not on disk and are compiled.

    This takes seconds, once on a machine.
    """
    from fastplastic.kernels.cpu import compiling

    compiling.tell_of_compiling(tell)


def _twin(tensors: Tensor | Sequence[Tensor], name: str) -> Any:
    """Return the function of this name for the device of the tensors."""
    if isinstance(tensors, Tensor):
        return kernel_of(_backend(tensors.device.type), name)
    return kernel_of(_backend(tensors[0].device.type if len(tensors) else "cpu"), name)


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
    table: Tensor = _twin(x, "activation_stats")(x, unit_axis, activation, out=out)
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
    table: Tensor = _twin(g, "gradient_stats")(g, unit_axis, out=out)
    return table


@untraced
def foreach_activation_stats(
    xs: Sequence[Tensor],
    unit_axes: Sequence[int],
    activations: Sequence[str],
    columns: Sequence[int],
    *,
    out: Tensor,
    masks: Sequence[Tensor | None] | None = None,
) -> None:
    """Add the sums over the activations of many tensors to one table, on a GPU by few launches.

    Args:
        xs: Pre-activations z of each, as in `activation_stats`, on the device of `out`.
        unit_axes: Dimension of the units of each.
        activations: Name of f for each.
        columns: First column of `out` that the units of each are added to.
        out: float64 [9, columns], rows as in `ACTIVATION_ROWS`, added to in place (rows of minima
            and maxima begin with +inf and -inf, all others with 0); its columns are
            adjacent.
        masks: Of each, bool in the order of its positions (all dimensions but that of the units):
            those that count; None for all.

    Raises:
        ValueError: As `activation_stats`, or the numbers of arguments differ, or units are not
            within the columns of `out`.
    """
    if _backend(out.device.type) == "triton":
        kernel_of("triton", "foreach_activation_stats")(
            xs, unit_axes, activations, columns, out=out, masks=masks
        )
        return
    given = check_columns(xs, unit_axes, columns, masks, len(ACTIVATION_ROWS), out)
    for (x, axis, column, mask), activation in zip(given, activations, strict=True):
        z, along = (x, axis) if mask is None else (counted(x, axis, mask), 1)
        activation_stats(z, along, activation, out=out[:, column : column + x.shape[axis]])


@untraced
def foreach_gradient_stats(
    gs: Sequence[Tensor],
    unit_axes: Sequence[int],
    columns: Sequence[int],
    *,
    out: Tensor,
    masks: Sequence[Tensor | None] | None = None,
) -> None:
    """Add the sums over the gradients of many tensors to one table, on a GPU by few launches.

    Args:
        gs: dL/dh of each, as in `gradient_stats`, on the device of `out`.
        unit_axes: Dimension of the units of each.
        columns: First column of `out` that the units of each are added to.
        out: float64 [4, columns], rows as in `GRADIENT_ROWS`, added to in place; its columns are
            adjacent.
        masks: Of each, bool in the order of its positions (all dimensions but that of the units):
            those that count; None for all.

    Raises:
        ValueError: As `gradient_stats`, or the numbers of arguments differ, or units are not within
            the columns of `out`.
    """
    if _backend(out.device.type) == "triton":
        kernel_of("triton", "foreach_gradient_stats")(gs, unit_axes, columns, out=out, masks=masks)
        return
    given = check_columns(gs, unit_axes, columns, masks, len(GRADIENT_ROWS), out)
    for g, axis, column, mask in given:
        part, along = (g, axis) if mask is None else (counted(g, axis, mask), 1)
        gradient_stats(part, along, out=out[:, column : column + g.shape[axis]])


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
    function = _twin(weights, "parameter_stats")
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
    shards: Shards = None,
    reduce: Reduce | None = None,
) -> Selection:
    """Choose the elements with the smallest scores over all weights at once, exactly `count`.

    Elements with equal scores are ordered by Philox word 0 of (seed, "ties", name) at the element,
    those with equal words too by weight and element.

    Where processes hold parts of the weights, each passes its own with `shards` and `reduce`, all
    other arguments alike: all get the selection of the whole weights. Each process calls `reduce`
    equally often with tables of equal size, int64 [n_weights, bins]. With Triton that is at most 4
    times with 256 bins, and 4 times again where equal scores are cut in two; with Numba and PyTorch
    3 times with 2048 bins, and 3 times again. Where equal words are cut in two, digits of the
    element follow, 8 or 11 bits each. The first table has one more column.

    Args:
        weights: Tensors on one device, float32, bfloat16, float16 or float64, of any strides.
        gradients: dL/dw in the shape of each weight; not read, and may be None, where the score
            has no dw: "magnitude" and "random".
        names: Name of each weight, by which the tie words are keyed.
        count: Number of elements to select, at most as many as are eligible within the caps.
        criterion: Name in `SCORES`: "swr" |w| |dw| (Hernandez-Garcia, arXiv 2508.00212),
            "gradient" |dw|, "magnitude" |w|, or "random" for none; all in float32. An element
            whose score is NaN is not eligible; an infinite one comes last.
        caps: Most elements to select in each whole weight; None for no limit.
        seed: Any integer.
        shards: Place of each tensor in its weight, where processes hold parts of weights; None for
            a whole weight, or for all.
        reduce: Adds up an int64 table over all processes, in place or returned, for instance
            `torch.distributed.all_reduce`. The table is on the device of the weights.

    Returns:
        The selection as thresholds (three numbers for each weight), with how many elements are
        taken of each; `selection_masks` makes masks of it.

    Raises:
        ValueError: The arguments do not fit together, `count` is more than the caps and the
            eligible elements allow, or the shards of all processes are not the whole weights, each
            element once.
    """
    chosen: Selection = _twin(weights, "select")(
        weights, gradients, names, count, criterion=criterion, caps=caps, seed=seed, shards=shards,
        reduce=reduce,
    )  # fmt: skip
    return chosen


@untraced
def selection_masks(
    selection: Selection,
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor | None] | None,
    *,
    shards: Shards = None,
) -> list[Tensor]:
    """Return which elements of each weight are selected, bool in the shape of the weight.

    Args:
        selection: What `select` returned.
        weights: The weights that it was given.
        gradients: The gradients that it was given.
        shards: The shards that it was given; those that are not counted get masks, too.

    Raises:
        ValueError: The weights or gradients are not such as the selection can be of.
    """
    masks: list[Tensor] = _twin(weights, "selection_masks")(
        selection, weights, gradients, shards=shards
    )
    return masks


@untraced
def resample_(
    weights: Sequence[Tensor],
    names: Sequence[str],
    laws: Sequence[Law],
    *,
    seed: int = 0,
    masks: Sequence[Tensor | None] | None = None,
    shards: Shards = None,
) -> None:
    """Write fresh initial values into the selected elements of weights, in place.

    A value depends on the seed, the name of the weight, its law and the element alone: not on what
    else is selected, on strides or on the device, nor on how a weight is cut into `shards`.

    Args:
        weights: Tensors on one device, float32, bfloat16, float16 or float64, of any strides.
        names: Name of each weight, by which its values are keyed.
        laws: Law of each weight.
        seed: Any integer.
        masks: Which elements to write, bool in the shape of each weight (a row mask may be
            expanded), or None for all; all of every weight without masks.
        shards: Place of each tensor in its weight, where processes hold parts of weights; None for
            a whole weight, or for all.

    Raises:
        ValueError: The arguments do not fit together, or a weight is expanded.
    """
    _twin(weights, "resample_")(weights, names, laws, seed=seed, masks=masks, shards=shards)
