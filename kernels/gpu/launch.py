"""Launch parameters of the Triton kernels: plain functions of shapes, the same on every card.

There was no card to tune them on. They follow from arithmetic: 16 bytes per thread and load is
what a GPU reads best, 4 warps leave room for many programs per multiprocessor, and the accumulators
of a tile (up to 8 for each element) must stay in registers. The compiled kernels are checked for
spills and for vector loads; see tests/test_triton_compile.py.
"""

import math
from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

from triton import cdiv, next_power_of_2

WARPS = 4
# Options of a launch. Newer Tritons want to be told whether products and sums may be fused.
OPTIONS = {"num_warps": WARPS, "enable_fp_fusion": True}
_THREADS = 32 * WARPS
_VECTOR_BYTES = 16
# Bytes of a row of a tile: whole cache lines.
_ROW_BYTES = 128
# Programs of a large launch: several for each of the 100 to 150 multiprocessors of a big card.
_PROGRAMS = 1024
# Tiles of one program: a few at least, since each writes partial sums; values that one accumulator
# sums up in float32 at most, and less than 1024, where the counters of activation_stats end.
_LEAST_TILES, _DEPTH = 4, 512
# The folds read float64 tiles of units times partial sums; twice as many would spill.
FOLD_UNITS, _FOLD_PARTS, PARAMETER_PARTS = 32, 64, 16
# parameter_stats: a program reads so many rows of so many elements; it writes partial sums of 2 to
# 5 % of what it reads. So many lanes share a row: 8 read a cache line of it, and three shuffles sum
# it up, without shared memory, but the more a thread holds of a row (here 16 elements), the more
# sums of columns it holds, too. With 8 elements of a row there were twice the shuffles, with 32
# columns' sums would spill. Rows that cannot be read wide are a warp's: 4 elements of each.
PARAMETER_ROWS, PARAMETER_FAST = 128, 128
PARAMETER_LANES, PARAMETER_NARROW = 8, 32
# select and resample_: elements that a program reads at once. The histogram asks of each block
# whether there is something to count: 16 elements of a thread share the barriers of that, and with
# 8 warps twice as many would be counted for one that is asked for. Triton 3.6 counts every bin by
# itself: for 8 elements of a thread, 530 instructions with 256 bins (131 where a block has nothing
# to count) and 2099 with 2048, for four passes instead of three. Triton 3.8 adds in shared memory.
ELEMENT_BLOCK = 1024
HISTOGRAM_BLOCK = 2048
ADD_BLOCK = 256
_ELEMENT_TASK, _ELEMENT_TASKS = 1 << 16, 2048


class Tile(NamedTuple):
    """What one program reads at once."""

    units: int
    positions: int


class Split(NamedTuple):
    """How positions are dealt out: each program has `outer` indices of `blocks` tiles.

    `unit_blocks` tiles side by side cover the units.
    """

    unit_blocks: int
    outer: int
    blocks: int
    inner_splits: int
    splits: int


def vector_width(itemsize: int, numbers: Iterable[int] = ()) -> int:
    """Return the most elements per load, a power of two, that divides all sizes and strides."""
    return math.gcd(_VECTOR_BYTES // itemsize, *numbers)


# Triton's cdiv takes 3 us, as much as half of all else before a launch, so what is asked for at
# every tensor is kept by `lru_cache`.
@lru_cache(maxsize=4096)
def stats_tile(units: int, positions: int, itemsize: int, units_adjacent: bool) -> Tile:
    """Return the tile of activation_stats and gradient_stats: one vector for each thread."""
    elements = _THREADS * _VECTOR_BYTES // itemsize
    fast, slow = (units, positions) if units_adjacent else (positions, units)
    slow = min(next_power_of_2(slow), elements)
    least = max(_ROW_BYTES // itemsize, elements // slow)
    block = _snug(fast, least, max(least, elements // 4))
    rest = min(elements // block, slow)
    return Tile(block, rest) if units_adjacent else Tile(rest, block)


@lru_cache(maxsize=4096)
def stats_split(tile: Tile, units: int, inner: int, outer: int) -> Split:
    """Deal out positions: enough programs to fill a card, accumulators not deeper than _DEPTH."""
    blocks = cdiv(inner, tile.positions)
    unit_blocks = cdiv(units, tile.units)
    programs = max(1, _PROGRAMS // unit_blocks)
    share = min(max(outer * blocks // programs, _LEAST_TILES), _DEPTH)
    each_outer = max(1, min(outer, share // blocks))
    each_blocks = blocks if each_outer > 1 else min(blocks, share)
    inner_splits = cdiv(blocks, each_blocks)
    splits = inner_splits * cdiv(outer, each_outer)
    return Split(unit_blocks, each_outer, each_blocks, inner_splits, splits)


def element_task(total: int) -> int:
    """Return how many elements a program of select or resample_ owns."""
    size: int = next_power_of_2(cdiv(total, _ELEMENT_TASKS))
    return max(_ELEMENT_TASK, size)


@lru_cache(maxsize=4096)
def fold_blocks(parts: int, units: int) -> tuple[int, int]:
    """Return how many partial sums of a unit the fold reads at once, and how many programs."""
    return min(next_power_of_2(parts), _FOLD_PARTS), cdiv(units, FOLD_UNITS)


def _snug(size: int, least: int, most: int) -> int:
    """Return the largest block in [least, most] that pads a size by an eighth at most."""
    if size <= least:
        rounded: int = next_power_of_2(size)
        return rounded
    blocks = [most >> k for k in range((most // least).bit_length())]
    fitting = (block for block in blocks if 8 * cdiv(size, block) * block <= 9 * size)
    return next(fitting, least)
