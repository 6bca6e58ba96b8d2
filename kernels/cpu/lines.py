"""How weights lie in memory, as lines of adjacent elements, and how those are cut into tasks."""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from fastplastic.kernels.strides import stretch_of

# Elements of a task, and the lines that are summed up in float32 at most.
_TASK, _LINES = 1 << 17, 512
# A weight that is read alone makes so many tasks, but none of fewer lines.
_LEAST_TASKS, _FEW_LINES = 4, 32


class LineMatrix(NamedTuple):
    """How one weight lies in memory.

    Attributes:
        lines: Number of lines.
        length: Elements of a line.
        stride: Elements between two lines.
        repeat, period: Element q of a line belongs to unit q // repeat % period of the other
            direction.
        groups: Ranges of lines with other units each.
        by_columns: Whether the lines are columns of the weight.
        apart: 0 where the gradient lies as the weight does; else `repeat`, and the elements of a
            unit lie `period` apart in a line of the gradient (channels last).
    """

    lines: int
    length: int
    stride: int
    repeat: int
    period: int
    groups: int
    by_columns: bool
    apart: int = 0


@lru_cache(maxsize=4096)
def matrix_of(shape: tuple[int, ...], strides: tuple[int, ...], groups: int) -> LineMatrix | None:
    """Return the lines of a weight, None where neither rows nor columns are contiguous."""
    kernel = math.prod(shape[2:])
    dims = [d for d, size in enumerate(shape) if size > 1]
    if math.prod(shape) <= 1 or not dims:
        return LineMatrix(shape[0], shape[1] * kernel, 1, kernel, shape[1], groups, False)
    order = sorted(dims, key=lambda d: -strides[d])
    rows_first = [d for d in order if d != 0]
    if _adjacent(shape, strides, rows_first) and order == [
        d for d in (0, *rows_first) if d in order
    ]:
        period, repeat = _cycle(shape, rows_first, 1)
        stride = strides[0] if shape[0] > 1 else 1
        return LineMatrix(shape[0], shape[1] * kernel, stride, repeat, period, groups, False)
    columns_first = [d for d in order if d != 1]
    if groups == 1 and order[0] == 1 and _adjacent(shape, strides, columns_first):
        period, repeat = _cycle(shape, columns_first, 0)
        return LineMatrix(shape[1], shape[0] * kernel, strides[1], repeat, period, 1, True)
    return None


def _adjacent(shape: tuple[int, ...], strides: tuple[int, ...], dims: Sequence[int]) -> bool:
    stretch = stretch_of((shape[dim], strides[dim]) for dim in dims)
    return stretch is not None and stretch[1] == 1


def _cycle(shape: tuple[int, ...], dims: Sequence[int], dim: int) -> tuple[int, int]:
    """Return (period, repeat) of a dimension within a line over these dimensions."""
    if dim not in dims:
        return shape[dim], math.prod(shape[d] for d in dims)
    return shape[dim], math.prod(shape[d] for d in dims[dims.index(dim) + 1 :])


# Columns of a plan, the first four for addresses and places.
FIELDS = 14


def tasks_of(matrices: tuple[LineMatrix, ...]) -> tuple[Any, Any, int]:
    """Return the plan int64 [weights, fields], the tasks (weight, first, last segment), slots.

    A segment is some lines of one group; its sums across lines have slots, one for each element
    of a line.
    """
    plan, tasks, slots = [], [], 0
    for index, matrix in enumerate(matrices):
        per_group = matrix.lines // matrix.groups
        lines = max(1, min(_LINES, per_group))
        if len(matrices) == 1:
            # Else a single weight would be the work of one thread.
            lines = min(lines, max(_FEW_LINES, -(-matrix.lines // _LEAST_TASKS)))
        cuts = -(-per_group // lines)
        segments = matrix.groups * cuts
        plan.append([
            0, 0, 0, 0, matrix.length, matrix.stride, matrix.repeat, matrix.period, per_group,
            cuts, lines, slots, matrix.groups, matrix.apart,
        ])  # fmt: skip
        at_a_time = max(1, _TASK // max(1, lines * matrix.length))
        for first in range(0, segments, at_a_time):
            tasks.append([index, first, min(first + at_a_time, segments)])
        slots += segments * matrix.length
    return np.array(plan, dtype=np.int64), np.array(tasks, dtype=np.int64), slots
