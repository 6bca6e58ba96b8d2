"""How a tensor [A, C, B] is cut into tasks for the kernels of `blocks.py`."""

import math
from functools import lru_cache
from typing import NamedTuple

from fastplastic.kernels.cpu.memory import LANES
from fastplastic.kernels.strides import view_of

# Found by timing shapes of ResNet-50 and ViT-B: what a long run is; rows shorter than `_LONG_ROW`
# are joined until they have about as many lanes.
_LONG_RUN = 128
_LONG_ROW = 1024
# Elements of a task of runs, and how many there are for each partial result. A task of rows has at
# least so many of them, and there are at most so many chunks, since each writes partial results.
_RUN_TASK, _RUN_RESULTS = 1 << 16, 512
_TASK_ROWS = 256
_CHUNKS = 32
# Lanes that LLVM takes in one turn of a loop.
_VECTORS = 64


class Cuts(NamedTuple):
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
def cuts_of(
    shape: tuple[int, ...], strides: tuple[int, ...], axis: int, unroll: int
) -> Cuts | None:
    """Return how to read a tensor with these strides; None where pieces must be copied."""
    view = view_of(shape, strides, axis)
    if math.prod(shape) == 0:
        return Cuts(shape[axis], 0, 0, None, ())
    if view is None:
        return None
    (ahead, units, behind), (stride, unit_stride, inner) = view
    if behind >= _LONG_RUN and inner == 1:
        # Few indices of A and many units: a task then reads one stretch of memory.
        chunks = max(1, min(ahead, _CHUNKS, ahead * behind // _RUN_RESULTS))
        group = min(units, max(1, _RUN_TASK // (-(-ahead // chunks) * behind)))
        groups = -(-units // group)
        arguments = (ahead, stride, units, unit_stride, behind, group)
        return Cuts(units, ahead * behind, chunks, (chunks * groups, arguments), ())
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
    return Cuts(units, ahead * behind, chunks + (rest > 0), None, tuple(calls))


def _chunks(rows: int, most: int) -> int:
    chunks = max(1, min(rows // _TASK_ROWS, most, _CHUNKS))
    # Shares that come out even for two, four or more threads.
    return chunks if chunks < 3 else min(most, -(-chunks // 4) * 4)
