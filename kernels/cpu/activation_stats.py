"""Numba: statistics of activations per unit, each element read once.

    [9, C]  n, sum h, sum |h|, sum h^2, min h, max h, #(h == 0), #flat, #nonfinite

h = f(z) and whether f is flat at z are made from z in registers (`functions.py`), in float32. Where
z is of half precision, min and max are rounded to it, and h counts as 0 where that makes it 0.
"""

from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastplastic.kernels.activations import ACTIVATIONS, INFINITE_FROM, parse_activation
from fastplastic.kernels.cpu import functions
from fastplastic.kernels.cpu.blocks import Sums, add_sums, register
from fastplastic.kernels.cpu.compiling import inline, inline_finite, inline_sums, outlined
from fastplastic.kernels.cpu.memory import (
    LOADERS,
    NAMES,
    add_each,
    count_lanes,
    float_lanes,
    total_of,
)
from fastplastic.kernels.reference import activation_stats as reference
from fastplastic.kernels.tables import MIN_ROW, activation_table, check_axis

_SHORT = ("identity", "relu", "relu6", "hardtanh", "leaky_relu", "hardswish", "hardsigmoid")
_NEVER_NEGATIVE = ("relu", "relu6", "softplus", "sigmoid", "hardsigmoid")
F = np.float32
_INFINITY = F(np.inf)
# All bits but the sign: the largest int32, and as a mask.
_REST = np.int32(0x7FFFFFFF)
_LEAST = np.int32(-0x80000000)
_LARGEST = np.finfo(np.float32).max
# Statistics as the kernels give them. Of a plain integer, what takes it is compiled for each value.
_SUM, _ABS, _SQUARE, _MIN, _MAX, _ZERO, _FLAT, _BAD = np.arange(8)
_ACTIVATION_START = (0.0, 0.0, 0.0, np.inf, -np.inf, 0.0, 0.0, 0.0)


def activation_stats(
    x: Tensor, unit_axis: int = 1, activation: str = "identity", *, out: Tensor | None = None
) -> Tensor:
    """Sum up the activations of each unit, as the reference, on the CPU."""
    name, slope = parse_activation(activation)
    axis = check_axis(x, unit_axis)
    if x.dtype not in NAMES:
        return reference.activation_stats(x, unit_axis, activation, out=out)
    table = activation_table(x, axis, out)
    spec = f"activation:{name}:{NAMES[x.dtype]}"
    add_sums(spec, x, axis, 0.01 if slope is None else slope, table)
    if x.dtype != torch.float32:
        # As the network rounds h. The order stays, so it does not matter that it is done at last.
        table[MIN_ROW : MIN_ROW + 2] = table[MIN_ROW : MIN_ROW + 2].to(x.dtype)
    return table


class _Function(NamedTuple):
    """An activation function for elements of one dtype.

    Attributes:
        load: (address, index) -> z.
        itemsize: Bytes of an element.
        value: (z, slope) -> h.
        flat: z -> whether f is flat there.
        limit: The largest abs(h) that the dtype rounds to 0.
        signed: Whether h can be negative.
        flat_is_zero: Whether f is flat exactly where h is 0.
        z_is_h: Whether h is finite only where z is.
    """

    load: Any
    itemsize: int
    value: Any
    flat: Any
    limit: Any
    signed: bool
    flat_is_zero: bool
    z_is_h: bool


def _value(name: str, kind: str) -> Any:
    """Return (z, slope) -> h, exactly 0 where torch's is, infinite where the dtype makes it so."""
    h_of = getattr(functions, name)
    if name == "selu" and kind != "float32":
        end = F(INFINITE_FROM[getattr(torch, kind)])

        @inline
        def ending(z: Any, slope: Any) -> Any:
            h = h_of(z, slope)
            return h if h < end else _INFINITY

        return ending
    if ACTIVATIONS[name].zero_below is None:
        return h_of
    cut = F(ACTIVATIONS[name].zero_below)

    @inline
    def value(z: Any, slope: Any) -> Any:
        return F(0) if z <= cut else h_of(z, slope)

    return value


def _flat(name: str) -> Any:
    """Return z -> whether abs(f'(z)) <= 0.01."""
    intervals = [_float32_inside(*ends) for ends in ACTIVATIONS[name].flat]
    low, high = intervals[0] if intervals else (F(0), F(0))
    (last_low, last_high) = intervals[-1] if intervals else (F(0), F(0))

    @inline
    def never(z: Any) -> Any:
        return False

    @inline
    def below(z: Any) -> Any:
        return z <= high

    @inline
    def outside(z: Any) -> Any:
        return (z <= high) | (z >= last_low)

    @inline
    def below_or_between(z: Any) -> Any:
        return (z <= high) | ((z >= last_low) & (z <= last_high))

    assert low == -np.inf or not intervals, name
    if len(intervals) < 2:
        return below if intervals else never
    return outside if last_high == np.inf else below_or_between


def _float32_inside(low: float, high: float) -> tuple[Any, Any]:
    """Return the float32 ends that hold the same float32 numbers as the float64 ones."""
    down, up = F(low), F(high)
    if float(down) < low:
        down = np.nextafter(down, _INFINITY)
    if float(up) > high:
        up = np.nextafter(up, -_INFINITY)
    return down, up


@register
def activation(name: str, kind: str) -> Sums:
    """Return the sums over h = f(z), f by name, for elements of a dtype."""
    function = _Function(
        load=LOADERS[kind][0],
        itemsize=LOADERS[kind][1],
        value=_value(name, kind),
        flat=_flat(name),
        limit=F(2.0**-25) if kind == "float16" else F(0),
        signed=name not in _NEVER_NEGATIVE,
        flat_is_zero=name == "relu" and kind != "float16",
        z_is_h=name in ("identity", "leaky_relu"),
    )
    # Eight rows of a longer function are too many for LLVM to unroll, and then it does not
    # vectorise them either.
    unroll = 8 if name in _SHORT else 4
    # Functions of the same kind share what is made of these: it takes longer to compile.
    kept = function.signed, function.flat_is_zero
    return Sums(
        function.itemsize, unroll, _ACTIVATION_START, _lanes, _clear, _activation_step(function),
        _activation_fold(*kept), _activation_fold_each(*kept), _activation_again(function),
        _activation_run(function), _activation_keep(*kept),
    )  # fmt: skip


@inline
def _lanes() -> Any:
    return (
        float_lanes(), float_lanes(), float_lanes(), float_lanes(), float_lanes(),
        count_lanes(), count_lanes(),
    )  # fmt: skip


@inline
def _clear(lanes: Any, width: Any) -> None:
    sums, sizes, squares, lows, highs, zeros, flats = lanes
    for j in range(width):
        sums[j], sizes[j], squares[j] = F(0), F(0), F(0)
        lows[j], highs[j] = _INFINITY, -_INFINITY
        zeros[j], flats[j] = np.int32(0), np.int32(0)


def _activation_step(function: _Function) -> Any:
    load, _, value, flat, limit, signed, flat_is_zero, _ = function

    @inline
    def step(lanes: Any, address: Any, stride: Any, rows: Any, width: Any, slope: Any) -> Any:
        sums, sizes, squares, lows, highs, zeros, flats = lanes
        for j in range(width):
            total, size, square = F(0), F(0), F(0)
            low, high = lows[j], highs[j]
            zero, flat_ = zeros[j], flats[j]
            for row in range(rows):
                z = load(address, row * stride + j)
                h = value(z, slope)
                total += h
                if signed:
                    size += abs(h)
                # An infinite z may have a finite h: 0 * z makes it show.
                square += h * h + F(0) * z
                low = h if h < low else low
                high = h if h > high else high
                zero = np.int32(zero + np.int32(1)) if abs(h) <= limit else zero
                if not flat_is_zero:
                    flat_ = np.int32(flat_ + np.int32(1)) if flat(z) else flat_
            sums[j] += total
            sizes[j] += size
            squares[j] += square
            lows[j], highs[j] = low, high
            zeros[j], flats[j] = zero, flat_

    return step


@cache
def _activation_fold(signed: bool, flat_is_zero: bool) -> Any:
    @inline_finite
    def reduce(lanes: Any, begin: Any, end: Any, square: Any, out: Any, unit: Any) -> Any:
        sums, sizes, _, lows, highs, zeros, flats = lanes
        total, size = np.float64(0), np.float64(0)
        low, high = lows[begin], highs[begin]
        zero, flat = np.int32(0), np.int32(0)
        for j in range(begin, end):
            total += np.float64(sums[j])
            size += np.float64(sizes[j])
            low, high = min(low, lows[j]), max(high, highs[j])
            zero = np.int32(zero + zeros[j])
            flat = np.int32(flat + flats[j])
        out[_SUM, unit] += total
        out[_ABS, unit] += size if signed else total
        out[_SQUARE, unit] += square
        out[_MIN, unit] = min(out[_MIN, unit], low)
        out[_MAX, unit] = max(out[_MAX, unit], high)
        out[_ZERO, unit] += zero
        out[_FLAT, unit] += zero if flat_is_zero else flat

    @inline
    def fold(lanes: Any, begin: Any, end: Any, out: Any, unit: Any) -> Any:
        square = total_of(lanes[2], begin, end)
        if not square <= _LARGEST:
            return False
        reduce(lanes, begin, end, square, out, unit)
        return True

    return fold


@inline
def _ordered(h: Any, signed: Any) -> Any:
    """Return a float32 as an int32 of the same order: of those, LLVM finds extremes by vectors."""
    bits = F(h).view(np.int32)
    return np.int32(bits ^ np.int32((bits >> np.int32(31)) & _REST)) if signed else bits


def _activation_run(function: _Function) -> Any:
    load, _, value, flat, limit, signed, flat_is_zero, z_is_h = function

    @inline_sums
    def run(address: Any, count: Any, slope: Any) -> Any:
        total, size, square, poison = F(0), F(0), F(0), F(0)
        low, high = _REST, _LEAST
        zero, flat_ = np.int32(0), np.int32(0)
        for i in range(count):
            z = load(address, i)
            h = value(z, slope)
            total += h
            if signed:
                size += abs(h)
            square += h * h
            if not z_is_h:
                # An infinite z may have a finite h. By itself, or two sums would wait in turn.
                poison += F(0) * z
            key = _ordered(h, signed)
            low = key if key < low else low
            high = key if key > high else high
            zero = np.int32(zero + np.int32(abs(h) <= limit))
            if not flat_is_zero:
                flat_ = np.int32(flat_ + np.int32(flat(z)))
        return total, size, square + poison, low, high, zero, flat_

    return run


@cache
def _activation_keep(signed: bool, flat_is_zero: bool) -> Any:
    @inline
    def keep(found: Any, out: Any, unit: Any) -> Any:
        total, size, square, low, high, zero, flat = found
        if not square <= _LARGEST:
            return False
        out[_SUM, unit] += total
        out[_ABS, unit] += size if signed else total
        out[_SQUARE, unit] += square
        out[_MIN, unit] = min(out[_MIN, unit], _of_order(low, signed))
        out[_MAX, unit] = max(out[_MAX, unit], _of_order(high, signed))
        out[_ZERO, unit] += zero
        out[_FLAT, unit] += zero if flat_is_zero else flat
        return True

    return keep


@inline
def _of_order(key: Any, signed: Any) -> Any:
    flipped = np.int32(key ^ np.int32((key >> np.int32(31)) & _REST))
    return np.int32(flipped if signed else key).view(np.float32)


@cache
def _activation_fold_each(signed: bool, flat_is_zero: bool) -> Any:
    @inline
    def fold_each(lanes: Any, begin: Any, end: Any, out: Any, unit: Any) -> Any:
        sums, sizes, squares, lows, highs, zeros, flats = lanes
        if not total_of(squares, begin, end) <= _LARGEST:
            return False
        add_each(sums, begin, end, out, _SUM, unit)
        add_each(sizes if signed else sums, begin, end, out, _ABS, unit)
        add_each(squares, begin, end, out, _SQUARE, unit)
        add_each(zeros, begin, end, out, _ZERO, unit)
        add_each(zeros if flat_is_zero else flats, begin, end, out, _FLAT, unit)
        least, most = out[_MIN, unit : unit + end - begin], out[_MAX, unit : unit + end - begin]
        for j in range(end - begin):
            least[j] = min(least[j], lows[begin + j])
        for j in range(end - begin):
            most[j] = max(most[j], highs[begin + j])
        return True

    return fold_each


def _activation_again(function: _Function) -> Any:
    load, itemsize, value, flat, limit = function[:5]

    @outlined
    def again(
        address: Any, rows: Any, stride: Any, begin: Any, end: Any, slope: Any, out: Any, unit: Any
    ) -> Any:
        for row in range(rows):
            for j in range(begin, end):
                z = load(address + row * stride * itemsize, j)
                h = np.float64(value(z, slope))
                if not (np.isfinite(z) and np.isfinite(h)):
                    out[_BAD, unit] += 1
                    continue
                out[_SUM, unit] += h
                out[_ABS, unit] += abs(h)
                out[_SQUARE, unit] += h * h
                out[_MIN, unit] = min(out[_MIN, unit], h)
                out[_MAX, unit] = max(out[_MAX, unit], h)
                out[_ZERO, unit] += abs(h) <= limit
                out[_FLAT, unit] += flat(z)

    return again
