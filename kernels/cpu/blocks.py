"""Numba: how blocks of memory become per-unit sums; what is summed up is said by `Sums`.

A tensor [A, C, B] is read in one of two ways. Where the B positions of a unit form a long run, each
run is summed up in float32 in registers, and added to the unit in float64. Else it is seen as rows
of lanes: the C * B elements of one index of A, where lane j belongs to unit (j // B) % C. Every
lane sums up float32 values down the rows, several rows at a time; after at most `_ROWS` rows the
lanes are folded into float64.

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

from fastplastic.kernels.cpu.compiling import c_function, deferred
from fastplastic.kernels.cpu.cuts import cuts_of
from fastplastic.kernels.cpu.memory import LANES, double_at, int_at
from fastplastic.kernels.cpu.tasks import LOCK, Work, scratch
from fastplastic.kernels.strides import unit_views

# Rows that are summed up in float32 at most.
_ROWS = 2048
# Elements that are summed up in registers at most, eight at a time or more.
_RUN_PIECE = 1 << 14
# Elements that are copied at a time.
_PIECE = 1 << 18
# Arguments of all kernels here: tensor, partial results, the table and its stride vary; then the
# slope, chunks of the call, where tensor and results begin in bytes, what the merge needs (chunks,
# statistics, units, positions, whether there are extremes), and what the kernel alone needs.
_TENSOR, _PARTS, _TABLE, _STRIDE, _VARYING = range(5)
_SLOPE, _CHUNKS, _OFFSET, _PARTS_OFFSET, _MERGE = range(4, 9)
_OWN = 13
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
            `fold` or `keep` refused.
        run: (address, count, slope) -> sums over adjacent elements, made in registers.
        keep: (those sums, out, unit) -> whether all was finite and was added to the unit.
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
    run: Any
    keep: Any


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


def _run(spec: Any, address: Any, count: Any, slope: Any) -> Any: ...
def _keep(spec: Any, found: Any, out: Any, unit: Any) -> Any: ...


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
def _(spec):
    lanes = sums_of(spec.literal_value).lanes
    return lambda spec: lanes()


@deferred(_clear)
def _(spec, lanes, width):
    clear = sums_of(spec.literal_value).clear
    return lambda spec, lanes, width: clear(lanes, width)


@deferred(_step)
def _(spec, lanes, address, stride, rows, width, slope):
    step = sums_of(spec.literal_value).step
    return lambda spec, lanes, address, stride, rows, width, slope: step(
        lanes, address, stride, rows, width, slope
    )


@deferred(_fold)
def _(spec, lanes, begin, end, out, unit):
    fold = sums_of(spec.literal_value).fold
    return lambda spec, lanes, begin, end, out, unit: fold(lanes, begin, end, out, unit)


@deferred(_fold_each)
def _(spec, lanes, begin, end, out, unit):
    fold_each = sums_of(spec.literal_value).fold_each
    return lambda spec, lanes, begin, end, out, unit: fold_each(lanes, begin, end, out, unit)


@deferred(_run)
def _(spec, address, count, slope):
    run = sums_of(spec.literal_value).run
    return lambda spec, address, count, slope: run(address, count, slope)


@deferred(_keep)
def _(spec, found, out, unit):
    keep = sums_of(spec.literal_value).keep
    return lambda spec, found, out, unit: keep(found, out, unit)


@deferred(_again)
def _(spec, address, rows, stride, begin, end, slope, out, unit):
    again = sums_of(spec.literal_value).again
    return lambda spec, address, rows, stride, begin, end, slope, out, unit: again(
        address, rows, stride, begin, end, slope, out, unit
    )


@cache
def by_lanes(spec: str) -> Any:
    """Return the kernel for rows of lanes.

    A task owns a tile of lanes in one chunk of the rows; tasks go through the tiles of the first
    chunk, then through those of the next. Its arguments, int64 one after the other:

        tensor + offset: address of [rows, width], strides (stride, 1), in the dtype of the sums.
        parts + offset: address of float64 [chunks, statistics, units], contiguous; a task writes
            all statistics of the units of its tile in its chunk.
        the slope (the bits of a float64), the chunks, and the head of all kernels here.
        rows, stride, width: of the tensor, in elements.
        run, units: lane j belongs to unit (j // run) % units.
        tile: lanes of a task: whole units, or all units several times.
    """
    size, unroll, start = sums_of(spec).itemsize, sums_of(spec).unroll, sums_of(spec).start
    statistics = len(start)

    @c_function(f"lanes:{spec}")
    def kernel(arguments: Any, task: Any) -> Any:
        given = int_at(arguments)
        address, parts = given[_TENSOR] + given[_OFFSET], given[_PARTS] + given[_PARTS_OFFSET]
        chunks, rows, stride, width = given[_CHUNKS], given[_OWN], given[_OWN + 1], given[_OWN + 2]
        run, units, tile = given[_OWN + 3], given[_OWN + 4], given[_OWN + 5]
        slope = np.float32(double_at(arguments)[_SLOPE])
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
        # Not literals, or all that takes them is compiled for each literal.
        many, one = np.int64(unroll), np.int64(1)
        for begin in range(chunk * chunk_rows, end, _ROWS):
            there = min(_ROWS, end - begin)
            for at in range(left, left + count, LANES):
                first, lines = address + (begin * stride + at) * size, min(LANES, left + count - at)
                _clear(spec, lanes, lines)
                done = 0
                while done + unroll <= there:
                    _step(spec, lanes, first + done * stride * size, stride, many, lines, slope)
                    done += unroll
                while done < there:
                    _step(spec, lanes, first + done * stride * size, stride, one, lines, slope)
                    done += 1
                lane = np.int64(0)
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
    """Return the kernel for long runs.

    A task owns `group` units in one chunk of the indices of A; tasks go through the groups of the
    first chunk, then through those of the next. Its arguments, int64 one after the other:

        tensor: address of [ahead, units, length], strides (stride, unit_stride, 1).
        parts: address of float64 [chunks, statistics, units], contiguous; a task writes all
            statistics of its units in its chunk.
        the slope (the bits of a float64), the chunks, and the head of all kernels here.
        ahead, stride, units, unit_stride, length: of the tensor, in elements.
        group: units of a task.
    """
    size, start = sums_of(spec).itemsize, sums_of(spec).start
    statistics = len(start)

    @c_function(f"runs:{spec}")
    def kernel(arguments: Any, task: Any) -> Any:
        given = int_at(arguments)
        address, parts, chunks = given[_TENSOR], given[_PARTS], given[_CHUNKS]
        ahead, stride, units = given[_OWN], given[_OWN + 1], given[_OWN + 2]
        unit_stride, length, group = given[_OWN + 3], given[_OWN + 4], given[_OWN + 5]
        slope = np.float32(double_at(arguments)[_SLOPE])
        groups = (units + group - 1) // group
        chunk_size = (ahead + chunks - 1) // chunks
        chunk, first_unit = task // groups, task % groups * group
        last_unit = min(first_unit + group, units)
        out = carray(double_at(parts + chunk * statistics * units * 8), (statistics, units))
        for row in range(statistics):
            for unit in range(first_unit, last_unit):
                out[row, unit] = start[row]
        one, none = np.int64(1), np.int64(0)
        for index in range(chunk * chunk_size, min((chunk + 1) * chunk_size, ahead)):
            for unit in range(first_unit, last_unit):
                run = address + (index * stride + unit * unit_stride) * size
                for begin in range(0, length, _RUN_PIECE):
                    piece, count = run + begin * size, min(_RUN_PIECE, length - begin)
                    found = _run(spec, piece, count, slope)
                    if not _keep(spec, found, out, unit):
                        _again(spec, piece, one, none, none, count, slope, out, unit)

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
    reading = _reading(spec, x.shape, x.stride(), axis, slope)
    if reading is not None:
        _add(reading, x.data_ptr(), table)
        return
    for first, view in unit_views(x, axis):
        # Views that are not adjacent in memory are copied, in pieces.
        size = max(1, _PIECE // (view.shape[1] * view.shape[2]))
        for piece in torch.split(view, size):
            piece = piece.contiguous()
            reading = _reading(spec, piece.shape, piece.stride(), 1, slope)
            assert reading is not None
            _add(reading, piece.data_ptr(), table[:, first : first + piece.shape[1]])


class _Reading(NamedTuple):
    """What reads a tensor with a shape and strides: kernels in turn, and float64 of scratch."""

    works: tuple[Work, ...]
    scratch: int


@lru_cache(maxsize=4096)
def _reading(
    spec: str, shape: tuple[int, ...], strides: tuple[int, ...], axis: int, slope: float
) -> _Reading | None:
    """Prepare to read a tensor; None where pieces must be copied."""
    sums = sums_of(spec)
    cuts = cuts_of(shape, strides, axis, sums.unroll)
    if cuts is None:
        return None
    statistics, bits = len(sums.start), int(np.float64(slope).view(np.int64))
    size = statistics * cuts.units
    merge = (cuts.chunks, statistics, cuts.units, cuts.positions, int(math.inf in sums.start))
    calls = [(by_lanes, *call) for call in cuts.lanes]
    if cuts.runs is not None:
        tasks, own = cuts.runs
        calls = [(by_runs, tasks, 0, 0, cuts.chunks, own)]
    works = []
    for number, (kernel_of, tasks, element, first, chunks, own) in enumerate(calls, start=1):
        fixed = (bits, chunks, element * sums.itemsize, first * size * 8, *merge, *own)
        # The last one puts the partial results of all together.
        after = _merge_kernel() if number == len(calls) else None
        works.append(Work(kernel_of(spec), tasks, fixed, varying=_VARYING, after=after))
    return _Reading(tuple(works), cuts.chunks * size)


def _add(reading: _Reading, address: int, table: Tensor) -> None:
    target, stride = table.data_ptr(), table.stride(0)
    with LOCK:
        parts = scratch(reading.scratch)
        for work in reading.works:
            work.run(address, parts, target, stride)


@cache
def _merge_kernel() -> Any:
    """Return the kernel that adds partial results to a table.

    Its one task owns the whole table. Its arguments, int64 one after the other:

        parts: address of float64 [chunks, statistics, units], contiguous.
        table: address of float64 [1 + statistics, units], strides (stride, 1), added to.
        stride: from one row of the table to the next, in elements.
        chunks, statistics, units: sizes.
        positions: elements of a unit, which count in row 0 unless the last statistic has them.
        whether statistics 3 and 4 are a minimum and a maximum.
    """

    @c_function("merge")
    def kernel(arguments: Any, task: Any) -> Any:
        given = int_at(arguments)
        chunks, statistics, units = given[_MERGE], given[_MERGE + 1], given[_MERGE + 2]
        count, extremes = given[_MERGE + 3], given[_MERGE + 4]
        table, stride = double_at(given[_TABLE]), given[_STRIDE]
        for chunk in range(chunks):
            parts = double_at(given[_PARTS] + chunk * statistics * units * 8)
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
