"""Launch parameters of the Triton kernels: plain functions of shapes, the same on every card.

There was no card to tune them on. They follow from arithmetic: 16 bytes per thread and load is
what a GPU reads best, 4 warps leave room for many programs per multiprocessor, and the accumulators
of a tile (up to 8 for each element) must stay in registers. The compiled kernels are checked for
spills and for vector loads; see tests/test_triton_compile.py.
"""

import math
from collections.abc import Iterable

from triton import cdiv, next_power_of_2

WARPS = 4
# Options of a launch. Newer Tritons want to be told whether products and sums may be fused.
OPTIONS = {"num_warps": WARPS, "enable_fp_fusion": True}
_THREADS = 32 * WARPS
VECTOR_BYTES = 16
# activation_stats and gradient_stats: a tile is 16 rows of whole cache lines, one vector for each
# thread. Four tiles are in flight: with 5 programs on each multiprocessor 40 KB, where the memory
# of an H100 needs 25.
UNIT_ROW_BYTES, UNIT_UNROLL = 128, 4
UNIT_SLOW = _THREADS * VECTOR_BYTES // UNIT_ROW_BYTES
# Tiles of an item: where a tensor has so many, enough that the partial sums (36 bytes for each
# unit) are 3.5 % of what is read at most; enough items of one tensor to fill a card; at most four
# times as many are 512 values that one accumulator sums up in float32, and less than 1024, where
# counters end.
_LEAST_DEPTH, _MOST_DEPTH, _ITEMS = 32, 128, 2048
# The folds read float64 tiles of units times partial sums; twice as many would spill.
FOLD_UNITS, FOLD_PARTS, PARAMETER_PARTS = 32, 32, 16
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


def vector_width(itemsize: int, numbers: Iterable[int] = ()) -> int:
    """Return the most elements per load, a power of two, that divides all sizes and strides."""
    return math.gcd(VECTOR_BYTES // itemsize, *numbers)


def unit_depth(tiles: int) -> int:
    """Return how many tiles an item has at least, of so many of a tensor."""
    return min(max(tiles // _ITEMS, _LEAST_DEPTH), _MOST_DEPTH)


def element_task(total: int) -> int:
    """Return how many elements a program of select or resample_ owns."""
    size: int = next_power_of_2(cdiv(total, _ELEMENT_TASKS))
    return max(_ELEMENT_TASK, size)
