"""Numba: the kernels of `parameter_stats`.

A weight is seen as a matrix whose lines are contiguous in memory, either the rows (a line is D1 * K
elements) or, for transposed views, the columns (D0 * K). Along a line sums are reduced at once;
across lines they go into lanes, and from there into float64 (`memory.py`). Where a sum is not
finite, that line or lane is read again element by element.
"""

from functools import cache
from typing import Any

import numpy as np

from fastplastic.kernels.cpu.compiling import c_function, deferred, inline, inline_sums
from fastplastic.kernels.cpu.lines import FIELDS
from fastplastic.kernels.cpu.memory import (
    LANES,
    LOADERS,
    double_at,
    float_at,
    float_lanes,
    int_at,
    short_at,
    total_of,
)

F = np.float32
# Of plain integers, what takes them is compiled for each value.
_ZERO, _ONE = np.int64(0), np.int64(1)
_LARGEST = np.finfo(np.float32).max
# Sums that are made in both directions; each table takes its own.
_W, _W2, _DW, _DW2, _WDW_SIZE, _WDW, _BAD = range(7)
SUMS = 7
# Arguments of the kernels: partial results, the tables along and across lines with their strides,
# plan and tasks. Only the last two are always the same.
_PARTS, _ALONG, _ALONG_STRIDE, _ACROSS, _ACROSS_STRIDE, _PLAN, _OF_TASKS = range(7)
VARYING = 5


def _line_step(spec: Any, lanes: Any, weight: Any, gradient: Any, width: Any) -> Any:
    """Add a line to the lanes and return its sums."""


def _element(spec: Any, weight: Any, gradient: Any, index: Any) -> Any:
    """Return (w, dw, whether there is a dw, whether it is finite) in float64."""


@cache
def _step_of(spec: str) -> Any:
    weight_name, gradient_name, direction = spec.split(":")
    load = LOADERS[weight_name][0]
    has_gradient = gradient_name != "none"
    load_gradient = LOADERS[gradient_name if has_gradient else weight_name][0]
    by_columns = direction == "columns"

    @inline_sums
    def step(lanes: Any, weight: Any, gradient: Any, width: Any) -> Any:
        sizes, squares, products, steps, step_squares = lanes
        w1, w2, d1, d2, s1, s2 = F(0), F(0), F(0), F(0), F(0), F(0)
        for j in range(width):
            w = load(weight, j)
            sizes[j] += abs(w)
            squares[j] += w * w
            w1 += abs(w)
            w2 += w * w
            if has_gradient:
                d = load_gradient(gradient, j)
                product = w * d
                # Each direction has sums that the other has no use for.
                if by_columns:
                    steps[j] += abs(d)
                    step_squares[j] += d * d
                    products[j] += abs(product)
                    s2 += product
                else:
                    products[j] += product
                    d1 += abs(d)
                    d2 += d * d
                    s1 += abs(product)
        return w1, w2, d1, d2, s1, s2

    return step


@cache
def _element_of(spec: str) -> Any:
    weight_name, gradient_name, _ = spec.split(":")
    load = LOADERS[weight_name][0]
    has_gradient = gradient_name != "none"
    load_gradient = LOADERS[gradient_name if has_gradient else weight_name][0]

    @inline
    def element(weight: Any, gradient: Any, index: Any) -> Any:
        w = np.float64(load(weight, index))
        if not has_gradient:
            return w, 0.0, False
        d = np.float64(load_gradient(gradient, index))
        return w, d, not np.isfinite(d)

    return element


@deferred(_line_step)
def _(spec, lanes, weight, gradient, width):
    step = _step_of(spec.literal_value)
    return lambda spec, lanes, weight, gradient, width: step(lanes, weight, gradient, width)


@deferred(_element)
def _(spec, weight, gradient, index):
    element = _element_of(spec.literal_value)
    return lambda spec, weight, gradient, index: element(weight, gradient, index)


@inline
def _again(
    spec: Any, weight: Any, gradient: Any, first: Any, step: Any, count: Any, sums: Any
) -> Any:
    """Sum up `count` elements, `step` apart, one by one; a dw that is not finite is counted."""
    sums[:] = 0
    for i in range(count):
        w, d, bad = _element(spec, weight, gradient, first + i * step)
        sums[_W] += abs(w)
        sums[_W2] += w * w
        if bad:
            sums[_BAD] += 1
        else:
            sums[_DW] += abs(d)
            sums[_DW2] += d * d
            sums[_WDW_SIZE] += abs(w * d)
            sums[_WDW] += w * d


@cache
def read_kernel(spec: str) -> Any:
    """Return the kernel that reads weights and gradients.

    A task owns some segments (lines of one group) of one weight. Its arguments, int64 one after the
    other:

        parts: address of float64; segment s of a weight has [7, length] from element
            (slots + s * length) * 7 on, contiguous, and a task writes what the fold reads.
        along, along_stride: address of the table of the direction of the lines, float64
            [statistics, units] with strides (along_stride, 1); the sums of a line are added.
        across, across_stride: the other table, not touched here.
        plan: address of int64 [weights, FIELDS], contiguous, as in `lines.tasks_of`: addresses of
            the weight and its gradient, both [lines, length] with strides (stride, 1) in elements.
            Where elements lie apart, a line of the gradient is [apart, length / apart], that of the
            weight [length / apart, apart].
        tasks: address of int64 [tasks, 3], contiguous: weight, first segment, end.
    """
    weight_name, gradient_name, direction = spec.split(":")
    size = LOADERS[weight_name][1]
    step_size = LOADERS[gradient_name][1] if gradient_name != "none" else 0
    by_columns = direction == "columns"

    @c_function(f"read:{spec}")
    def kernel(arguments: Any, task: Any) -> Any:
        given = int_at(arguments)
        chosen = int_at(given[_OF_TASKS] + task * 24)
        plan = int_at(given[_PLAN] + chosen[0] * (FIELDS * 8))
        stride, length, apart = plan[5], plan[4], plan[13]
        sums, laid = np.empty(SUMS), np.empty(LANES, np.float32)
        lanes = (float_lanes(), float_lanes(), float_lanes(), float_lanes(), float_lanes())
        for segment in range(chosen[1], chosen[2]):
            first, lines = _lines_of(segment, plan[8], plan[9], plan[10])
            parts = given[_PARTS] + (plan[11] + segment * length) * (SUMS * 8)
            for left in range(0, length, LANES):
                width = min(LANES, length - left)
                w = plan[0] + (first * stride + left) * size
                d = plan[1] + (first * stride + left) * step_size
                for lane in lanes:
                    for j in range(width):
                        lane[j] = F(0)
                for line in range(lines):
                    w_line, d_line = w + line * stride * size, d + line * stride * step_size
                    if apart > 0:
                        begin, d_line = d_line - left * step_size, laid.ctypes.data
                        _lay_out(begin, left, width, apart, length // apart, step_size, d_line)
                    _sum_line(spec, lanes, w_line, d_line, width, sums)
                    target = double_at(given[_ALONG] + (plan[2] + first + line) * 8)
                    _store(target, given[_ALONG_STRIDE], sums, width, step_size > 0, not by_columns)
                if not _keep_lanes(lanes, width, parts + left * 8, length, by_columns):
                    for j in range(width):
                        target = double_at(parts + (left + j) * 8)
                        place, at = left + j, d
                        if apart > 0:
                            place = place % apart * (length // apart) + place // apart
                            at = d + (place - left - j) * step_size
                        _sum_lane(spec, lanes, j, w, at, stride, lines, sums)
                        for which in range(SUMS):
                            target[which * length] = sums[which]

    return kernel


@inline
def _lay_out(
    line: Any, left: Any, width: Any, apart: Any, units: Any, size: Any, target: Any
) -> None:
    """Copy `width` elements of a line [apart, units], from `left` on in the order [units, apart].

    Line and target are addresses, `size` the bytes of an element: 2 or 4.
    """
    for part in range(apart):
        first, end = (left - part + apart - 1) // apart, (left + width - part + apart - 1) // apart
        for unit in range(first, end):
            at, source = unit * apart + part - left, part * units + unit
            if size == 4:
                float_at(target)[at] = float_at(line)[source]
            else:
                short_at(target)[at] = short_at(line)[source]


@inline
def _lines_of(segment: Any, per_group: Any, cuts: Any, lines: Any) -> Any:
    """Return the first line of a segment and how many there are."""
    group, cut = segment // cuts, segment % cuts
    return group * per_group + cut * lines, min(lines, per_group - cut * lines)


@inline
def _sum_line(spec: Any, lanes: Any, weight: Any, gradient: Any, width: Any, sums: Any) -> Any:
    found = _line_step(spec, lanes, weight, gradient, width)
    fine = found[1] <= _LARGEST and found[3] <= _LARGEST and found[4] <= _LARGEST
    if fine and abs(found[5]) <= _LARGEST:
        for which in range(6):
            sums[which] = found[which]
        sums[_BAD] = 0
    else:
        _again(spec, weight, gradient, _ZERO, _ONE, width, sums)


@inline
def _keep_lanes(lanes: Any, width: Any, parts: Any, length: Any, by_columns: Any) -> Any:
    """Write the lanes to rows of `length` sums from the address `parts` on, if all are finite."""
    sizes, squares, products, steps, step_squares = lanes
    total = total_of(squares, 0, width) + total_of(step_squares, 0, width)
    # Products may cancel, so their sum tells of a single one that is not finite only as NaN.
    if not (total <= _LARGEST and abs(total_of(products, 0, width)) <= _LARGEST):
        return False
    _copy(sizes, width, parts + _W * length * 8)
    _copy(squares, width, parts + _W2 * length * 8)
    if by_columns:
        _copy(steps, width, parts + _DW * length * 8)
        _copy(step_squares, width, parts + _DW2 * length * 8)
        _copy(products, width, parts + _WDW_SIZE * length * 8)
    else:
        _copy(products, width, parts + _WDW * length * 8)
    bad = double_at(parts + _BAD * length * 8)
    for j in range(width):
        bad[j] = 0
    return True


@inline
def _copy(lane: Any, width: Any, address: Any) -> None:
    target = double_at(address)
    for j in range(width):
        target[j] = lane[j]


@inline
def _sum_lane(
    spec: Any, lanes: Any, j: Any, weight: Any, gradient: Any, stride: Any, lines: Any, sums: Any
) -> Any:
    sizes, squares, products, steps, step_squares = lanes
    fine = squares[j] <= _LARGEST and step_squares[j] <= _LARGEST and abs(products[j]) <= _LARGEST
    if fine:
        sums[_W], sums[_W2] = sizes[j], squares[j]
        sums[_DW], sums[_DW2] = steps[j], step_squares[j]
        sums[_WDW_SIZE] = sums[_WDW] = products[j]
        sums[_BAD] = 0
    else:
        _again(spec, weight, gradient, j, stride, lines, sums)


@inline
def _store(target: Any, stride: Any, sums: Any, count: Any, has_gradient: Any, to_rows: Any) -> Any:
    """Add the sums over `count` elements to one column of a table."""
    target[0] += count
    target[stride] += sums[_W]
    target[2 * stride] += sums[_W2]
    if has_gradient:
        target[3 * stride] += count - sums[_BAD]
        if to_rows:
            target[4 * stride] += sums[_DW]
            target[5 * stride] += sums[_DW2]
            target[6 * stride] += sums[_WDW_SIZE]
            target[7 * stride] += sums[_BAD]
        else:
            target[4 * stride] += sums[_WDW]
            target[5 * stride] += sums[_BAD]


@cache
def fold_kernel(spec: str) -> Any:
    """Return the kernel that adds up what lanes gave.

    A task owns one weight: it folds the [7, length] of its segments into those of the first one,
    group by group, and adds them to the table across the lines. Arguments as of `read_kernel`.
    """
    _, gradient, direction = spec.split(":")
    has_gradient, by_columns = gradient != "none", direction == "columns"
    # What lanes give; the other slots were not written.
    made = (_W, _W2, _DW, _DW2, _WDW_SIZE, _BAD) if by_columns else (_W, _W2, _WDW, _BAD)

    # The same for all dtypes.
    @c_function(f"fold:{'any' if has_gradient else 'none'}:{direction}")
    def kernel(arguments: Any, task: Any) -> Any:
        given = int_at(arguments)
        plan = int_at(given[_PLAN] + task * (FIELDS * 8))
        length, repeat, period, per_group, cuts = plan[4], plan[6], plan[7], plan[8], plan[9]
        sums = np.empty(SUMS)
        for group in range(plan[12]):
            first = double_at(given[_PARTS] + (plan[11] + group * cuts * length) * (SUMS * 8))
            for cut in range(1, cuts):
                for which in made:
                    for q in range(which * length, (which + 1) * length):
                        first[q] += first[cut * SUMS * length + q]
            for begin in range(0, length, repeat):
                for which in made:
                    sums[which] = 0
                    for q in range(which * length + begin, which * length + begin + repeat):
                        sums[which] += first[q]
                unit = group * period + begin // repeat % period
                target = double_at(given[_ACROSS] + (plan[3] + unit) * 8)
                count = per_group * repeat
                _store(target, given[_ACROSS_STRIDE], sums, count, has_gradient, by_columns)

    return kernel
