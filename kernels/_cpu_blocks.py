"""Numba: how blocks of memory become per-unit sums; what is summed up is said by `Sums`.

A tensor [A, C, B] is seen as rows of lanes: the C * B elements of one index of A, where lane j
belongs to unit (j // B) % C. Every lane sums up float32 values down the rows, several rows at a
time; after at most `_ROWS` rows the lanes are folded into float64. Where A is too small for that
and the B positions of a unit form a long run, the run itself is cut into rows of lanes.

Nothing looks for NaN on the way: where a sum of squares is not finite, that part of the block is
read again element by element.
"""

import math
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import carray
from torch import Tensor

from ._cpu_compile import c_function, deferred
from ._cpu_lock import LOCK
from ._cpu_memory import LANES, double_at, int_at
from ._cpu_tasks import run_tasks
from ._layout import unit_views, view_of

# Rows that are summed up in float32 at most.
_ROWS = 2048
# Found by timing shapes of ResNet-50 and ViT-B: what a long run is, and the most lanes of its rows;
# rows shorter than `_LONG_ROW` are joined until they have about as many lanes.
_LONG_RUN = 512
_RUN_LANES = 512
_LONG_ROW = 1024
# A task has at least so many rows, and there are at most so many chunks of them, since each writes
# partial results.
_TASK_ROWS = 256
_CHUNKS = 32
# Lanes that LLVM takes in one turn of a loop.
_VECTORS = 64
# Elements that are copied at a time.
_PIECE = 1 << 18
# Row of the minimum among the statistics, where there is one; the maximum is in the next.
_MIN = 3


class Sums(NamedTuple):
    """Inlined Numba functions that say what is summed up.

    Attributes:
        itemsize: Bytes of an element.
        unroll: Rows that are taken at a time.
        start: Value of each statistic where nothing was seen.
        lanes: () -> the lanes of each statistic that is summed up in lanes.
        clear: (lanes, width).
        step: (lanes, address, stride, rows, width, slope), adds rows to the lanes.
        fold: (lanes, begin, end, out, unit) -> whether all was finite and was added to the unit.
        fold_each: The same, but the lanes belong to as many units from that unit on.
        again: (address, rows, stride, begin, end, slope, out, unit), reads element by element what
            `fold` refused.
    """

    itemsize: int
    unroll: int
    start: tuple[float, ...]
    lanes: Any
    clear: Any
    step: Any
    fold: Any
    fold_each: Any
    again: Any


# What each kind of sums is made of, by its name. Kernels know the name alone, since only kernels
# without compiled functions in their closure are found again on disk.
_MAKERS: dict[str, Callable[..., Sums]] = {}


def register(maker: Callable[..., Sums]) -> Callable[..., Sums]:
    """Let "name:argument:..." stand for the sums that `maker`, a function `name`, makes."""
    _MAKERS[maker.__name__] = maker
    return maker


@cache
def sums_of(spec: str) -> Sums:
    """Return the sums with this name."""
    name, *arguments = spec.split(":")
    return _MAKERS[name](*arguments)


def _new_lanes(spec: Any) -> Any: ...
def _clear(spec: Any, lanes: Any, width: Any) -> Any: ...
def _step(
    spec: Any, lanes: Any, address: Any, stride: Any, rows: Any, width: Any, slope: Any
) -> Any: ...
def _fold(spec: Any, lanes: Any, begin: Any, end: Any, out: Any, unit: Any) -> Any: ...
def _fold_each(spec: Any, lanes: Any, begin: Any, end: Any, out: Any, unit: Any) -> Any: ...


def _again(
    spec: Any,
    address: Any,
    rows: Any,
    stride: Any,
    begin: Any,
    end: Any,
    slope: Any,
    out: Any,
    unit: Any,
) -> Any: ...


@deferred(_new_lanes)
def _(spec):  # type: ignore[no-untyped-def]
    lanes = sums_of(spec.literal_value).lanes
    return lambda spec: lanes()


@deferred(_clear)
def _(spec, lanes, width):  # type: ignore[no-untyped-def]
    clear = sums_of(spec.literal_value).clear
    return lambda spec, lanes, width: clear(lanes, width)


@deferred(_step)
def _(spec, lanes, address, stride, rows, width, slope):  # type: ignore[no-untyped-def]
    step = sums_of(spec.literal_value).step
    return lambda spec, lanes, address, stride, rows, width, slope: step(
        lanes, address, stride, rows, width, slope
    )


@deferred(_fold)
def _(spec, lanes, begin, end, out, unit):  # type: ignore[no-untyped-def]
    fold = sums_of(spec.literal_value).fold
    return lambda spec, lanes, begin, end, out, unit: fold(lanes, begin, end, out, unit)


@deferred(_fold_each)
def _(spec, lanes, begin, end, out, unit):  # type: ignore[no-untyped-def]
    fold_each = sums_of(spec.literal_value).fold_each
    return lambda spec, lanes, begin, end, out, unit: fold_each(lanes, begin, end, out, unit)


@deferred(_again)
def _(spec, address, rows, stride, begin, end, slope, out, unit):  # type: ignore[no-untyped-def]
    again = sums_of(spec.literal_value).again
    return lambda spec, address, rows, stride, begin, end, slope, out, unit: again(
        address, rows, stride, begin, end, slope, out, unit
    )


@cache
def by_lanes(spec: str) -> Any:
    """Return the kernel whose task is some rows of a tile of lanes."""
    size, unroll, start = sums_of(spec).itemsize, sums_of(spec).unroll, sums_of(spec).start
    statistics = len(start)

    @c_function
    def kernel(arguments: Any, task: Any) -> Any:
        given = int_at(arguments)
        address, parts, chunks, rows = given[0], given[2], given[3], given[4]
        stride, width, run, units, tile = given[5], given[6], given[7], given[8], given[9]
        slope = np.float32(double_at(arguments)[1])
        tiles = (width + tile - 1) // tile
        chunk_rows = (rows + chunks - 1) // chunks
        chunk, left = task // tiles, task % tiles * tile
        count = min(tile, width - left)
        out = carray(double_at(parts + chunk * statistics * units * 8), (statistics, units))
        end = min((chunk + 1) * chunk_rows, rows)
        # A tile that holds all units, again and again, or some of its own.
        first_unit = left // run if tiles > 1 else 0
        last_unit = min(first_unit + count // run, units)
        for row in range(statistics):
            for unit in range(first_unit, last_unit):
                out[row, unit] = start[row]
        lanes = _new_lanes(spec)
        for begin in range(chunk * chunk_rows, end, _ROWS):
            there = min(_ROWS, end - begin)
            for at in range(left, left + count, LANES):
                first, lines = address + (begin * stride + at) * size, min(LANES, left + count - at)
                _clear(spec, lanes, lines)
                done = 0
                while done + unroll <= there:
                    _step(spec, lanes, first + done * stride * size, stride, unroll, lines, slope)
                    done += unroll
                while done < there:
                    _step(spec, lanes, first + done * stride * size, stride, 1, lines, slope)
                    done += 1
                lane = 0
                while lane < lines:
                    unit = (at + lane) // run % units
                    stop = min(
                        lines, lane + (units - unit if run == 1 else run - (at + lane) % run)
                    )
                    if run == 1 and _fold_each(spec, lanes, lane, stop, out, unit):
                        lane = stop
                        continue
                    if run == 1:
                        stop = lane + 1
                    if not _fold(spec, lanes, lane, stop, out, unit):
                        _again(spec, first, there, stride, lane, stop, slope, out, unit)
                    lane = stop

    return kernel


@cache
def by_runs(spec: str) -> Any:
    """Return the kernel whose task is one unit, with long runs, in some indices of A."""
    size, unroll, start = sums_of(spec).itemsize, sums_of(spec).unroll, sums_of(spec).start
    statistics = len(start)

    @c_function
    def kernel(arguments: Any, task: Any) -> Any:
        given = int_at(arguments)
        address, parts, chunks, ahead = given[0], given[2], given[3], given[4]
        stride, units, unit_stride, length, width = given[5], given[6], given[7], given[8], given[9]
        slope = np.float32(double_at(arguments)[1])
        chunk_size = (ahead + chunks - 1) // chunks
        chunk, unit = task // units, task % units
        rows = length // width
        tail = length - rows * width
        out = carray(double_at(parts + chunk * statistics * units * 8), (statistics, units))
        for row in range(statistics):
            out[row, unit] = start[row]
        at_a_time = max(1, _ROWS * width // length)
        end = min((chunk + 1) * chunk_size, ahead)
        lanes = _new_lanes(spec)
        for begin in range(chunk * chunk_size, end, at_a_time):
            stop = min(begin + at_a_time, end)
            first = address + (begin * stride + unit * unit_stride) * size
            _clear(spec, lanes, width)
            for index in range(stop - begin):
                run = first + index * stride * size
                done = 0
                while done + unroll <= rows:
                    _step(spec, lanes, run + done * width * size, width, unroll, width, slope)
                    done += unroll
                while done < rows:
                    _step(spec, lanes, run + done * width * size, width, 1, width, slope)
                    done += 1
                if tail > 0:
                    _step(spec, lanes, run + rows * width * size, width, 1, tail, slope)
            if not _fold(spec, lanes, 0, width, out, unit):
                _again(spec, first, stop - begin, stride, 0, length, slope, out, unit)

    return kernel


def add_sums(spec: str, x: Tensor, axis: int, slope: float, table: Tensor) -> None:
    """Add the sums over the elements of a tensor to a table.

    Args:
        spec: Name of the sums.
        x: float32, bfloat16 or float16, any strides.
        axis: Dimension of the units.
        slope: Passed to the step.
        table: float64 [1 + statistics, units] with adjacent columns: the number of elements, then
            the statistics, of which the last is the number of those left out.
    """
    plan = _plan(x.shape, x.stride(), axis, sums_of(spec).unroll)
    if plan is not None:
        _add(spec, x.data_ptr(), plan, slope, table)
        return
    for first, view in unit_views(x, axis):
        # Views that are not adjacent in memory are copied, in pieces.
        size = max(1, _PIECE // (view.shape[1] * view.shape[2]))
        for piece in torch.split(view, size):
            piece = piece.contiguous()
            plan = _plan(piece.shape, piece.stride(), 1, sums_of(spec).unroll)
            assert plan is not None
            part = table[:, first : first + piece.shape[1]]
            _add(spec, piece.data_ptr(), plan, slope, part)


class _Plan(NamedTuple):
    """How a tensor [A, C, B] is read.

    Attributes:
        units: C.
        positions: A * B.
        chunks: Number of partial results.
        runs: Tasks and arguments of the kernel for runs, or None.
        lanes: For each call of the kernel for lanes: tasks, first element, first partial result,
            how many of them, and its arguments.
    """

    units: int
    positions: int
    chunks: int
    runs: tuple[int, tuple[int, ...]] | None
    lanes: tuple[tuple[int, int, int, int, tuple[int, ...]], ...]


@lru_cache(maxsize=4096)
def _plan(shape: tuple[int, ...], strides: tuple[int, ...], axis: int, unroll: int) -> _Plan | None:
    """Return how to read a tensor with these strides; None where pieces must be copied."""
    view = view_of(shape, strides, axis)
    if math.prod(shape) == 0:
        return _Plan(shape[axis], 0, 0, None, ())
    if view is None:
        return None
    (ahead, units, behind), (stride, unit_stride, inner) = view
    if behind >= _LONG_RUN and ahead < unroll and inner == 1:
        # As many rows as are taken at a time, or a multiple.
        rounds = -(-behind // (unroll * _RUN_LANES))
        width = max(_VECTORS, behind // (unroll * rounds) // _VECTORS * _VECTORS)
        chunks = _chunks(ahead * behind // width, ahead)
        arguments = (ahead, stride, units, unit_stride, behind, width)
        return _Plan(units, ahead * behind, chunks, (chunks * units, arguments), ())
    if behind > 1 and (inner != 1 or (units > 1 and unit_stride != behind)):
        return None
    if behind == 1 and units > 1 and unit_stride != 1:
        return None
    row = units * behind
    joined = max(1, min(_LONG_ROW // row, ahead // unroll)) if stride == row else 1
    rows, rest = divmod(ahead, joined)
    # Whole units and, if possible, whole vectors: what is left over goes lane by lane.
    tile = behind * _VECTORS // math.gcd(behind, _VECTORS)
    tile = behind if tile > 8 * LANES else -(-LANES // tile) * tile
    tile = tile if joined == 1 else joined * row
    chunks = _chunks(rows, rows)
    wide = (rows, joined * stride, joined * row, behind, units, tile)
    calls = [(chunks * -(-joined * row // tile), 0, 0, chunks, wide)]
    if rest:
        narrow = (rest, row, row, behind, units, tile)
        calls.append((-(-row // tile), rows * joined * row, chunks, 1, narrow))
    return _Plan(units, ahead * behind, chunks + (rest > 0), None, tuple(calls))


def _add(spec: str, address: int, plan: _Plan, slope: float, table: Tensor) -> None:
    sums = sums_of(spec)
    statistics = len(sums.start)
    bits = int(np.float64(slope).view(np.int64))
    size = statistics * plan.units
    with LOCK:
        parts = _scratch(plan.chunks * size)
        if plan.runs is not None:
            tasks, arguments = plan.runs
            run_tasks(by_runs(spec), tasks, address, bits, parts, plan.chunks, *arguments)
        for tasks, element, first, chunks, arguments in plan.lanes:
            start, out = address + element * sums.itemsize, parts + first * size * 8
            run_tasks(by_lanes(spec), tasks, start, bits, out, chunks, *arguments)
        target = (table.data_ptr(), table.stride(0), plan.positions, int(math.inf in sums.start))
        run_tasks(_merge_kernel(), 1, parts, plan.chunks, statistics, plan.units, *target)


_buffer = np.empty(0)


def _scratch(size: int) -> int:
    """Return the address of so many float64, in the same place while that is big enough."""
    global _buffer
    if _buffer.size < size:
        _buffer = np.empty(size)
    return int(_buffer.ctypes.data)


@cache
def _merge_kernel() -> Any:
    """Return the kernel that adds partial results [chunks, statistics, units] to a table."""

    @c_function
    def kernel(arguments: Any, task: Any) -> Any:
        given = int_at(arguments)
        chunks, statistics, units, stride = given[1], given[2], given[3], given[5]
        count, extremes = given[6], given[7]
        table = double_at(given[4])
        for chunk in range(chunks):
            parts = double_at(given[0] + chunk * statistics * units * 8)
            for row in range(statistics):
                for unit in range(units):
                    value, at = parts[row * units + unit], (row + 1) * stride + unit
                    if extremes and row == _MIN:
                        table[at] = min(table[at], value)
                    elif extremes and row == _MIN + 1:
                        table[at] = max(table[at], value)
                    else:
                        table[at] += value
            for unit in range(units):
                table[unit] -= parts[(statistics - 1) * units + unit]
        for unit in range(units):
            table[unit] += count

    return kernel


def _chunks(rows: int, most: int) -> int:
    return max(1, min(rows // _TASK_ROWS, most, _CHUNKS))
