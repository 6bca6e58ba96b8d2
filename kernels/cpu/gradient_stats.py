"""Numba: statistics of gradients per unit, each element read once.

[4, C]  n, sum |g|, sum g^2, #nonfinite
"""

from typing import Any

import numpy as np
from torch import Tensor

from fastplastic.kernels.cpu.blocks import Sums, add_sums, register
from fastplastic.kernels.cpu.compiling import inline, inline_sums, outlined
from fastplastic.kernels.cpu.memory import LOADERS, NAMES, add_each, float_lanes, total_of
from fastplastic.kernels.reference import gradient_stats as reference
from fastplastic.kernels.tables import check_axis, gradient_table

F = np.float32
_LARGEST = np.finfo(np.float32).max
# Statistics as the kernels give them.
_G_ABS, _G_SQUARE, _G_BAD = np.arange(3)


def gradient_stats(g: Tensor, unit_axis: int = 1, *, out: Tensor | None = None) -> Tensor:
    """Sum up the gradients of each unit, as the reference, on the CPU."""
    axis = check_axis(g, unit_axis)
    if g.dtype not in NAMES:
        return reference.gradient_stats(g, unit_axis, out=out)
    table = gradient_table(g, axis, out)
    add_sums(f"gradient:{NAMES[g.dtype]}", g, axis, 0.0, table)
    return table


@register
def gradient(kind: str) -> Sums:
    """Return the sums over gradients of a dtype."""
    load, itemsize = LOADERS[kind]

    @inline
    def step(lanes: Any, address: Any, stride: Any, rows: Any, width: Any, slope: Any) -> Any:
        sizes, squares = lanes
        for j in range(width):
            size, square = F(0), F(0)
            for row in range(rows):
                g = load(address, row * stride + j)
                size += abs(g)
                square += g * g
            sizes[j] += size
            squares[j] += square

    @inline_sums
    def run(address: Any, count: Any, slope: Any) -> Any:
        size, square = F(0), F(0)
        for i in range(count):
            g = load(address, i)
            size += abs(g)
            square += g * g
        return size, square

    return Sums(
        itemsize,
        8,
        (0.0, 0.0, 0.0),
        _lanes,
        _clear,
        step,
        _gradient_fold,
        _gradient_fold_each,
        _gradient_again(load, itemsize),
        run,
        _gradient_keep,
    )


@inline
def _gradient_keep(found: Any, out: Any, unit: Any) -> Any:
    if not found[1] <= _LARGEST:
        return False
    out[_G_ABS, unit] += found[0]
    out[_G_SQUARE, unit] += found[1]
    return True


@inline
def _lanes() -> Any:
    return float_lanes(), float_lanes()


@inline
def _clear(lanes: Any, width: Any) -> None:
    for j in range(width):
        lanes[0][j], lanes[1][j] = F(0), F(0)


@inline
def _gradient_fold_each(lanes: Any, begin: Any, end: Any, out: Any, unit: Any) -> Any:
    if not total_of(lanes[1], begin, end) <= _LARGEST:
        return False
    add_each(lanes[0], begin, end, out, _G_ABS, unit)
    add_each(lanes[1], begin, end, out, _G_SQUARE, unit)
    return True


@inline
def _gradient_fold(lanes: Any, begin: Any, end: Any, out: Any, unit: Any) -> Any:
    square = total_of(lanes[1], begin, end)
    if not square <= _LARGEST:
        return False
    out[_G_ABS, unit] += total_of(lanes[0], begin, end)
    out[_G_SQUARE, unit] += square
    return True


def _gradient_again(load: Any, itemsize: int) -> Any:
    @outlined
    def again(
        address: Any, rows: Any, stride: Any, begin: Any, end: Any, slope: Any, out: Any, unit: Any
    ) -> Any:
        for row in range(rows):
            for j in range(begin, end):
                g = np.float64(load(address + row * stride * itemsize, j))
                if np.isfinite(g):
                    out[_G_ABS, unit] += abs(g)
                    out[_G_SQUARE, unit] += g * g
                else:
                    out[_G_BAD, unit] += 1

    return again
