"""The tables that describe all weights of one call of `parameter_stats` to its two kernels.

A weight is read as a matrix of slow indices times one dense stretch of fast elements. Slow is
dimension 0, fast is dimension 1 together with the dimensions behind it; or, where dimension 0 is
the dense one (a transposed view), the other way round. Element (j, k), k behind, is at
j * unit_step + k * behind_step of the stretch. A weight that is neither is copied.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from fastplastic.kernels.gpu import launch
from fastplastic.kernels.gpu.runtime import Addresses, Filled, table
from fastplastic.kernels.strides import stretch_of

Strides = tuple[int, ...]

# Columns of the tables.
TASK_COLUMNS, MATRIX_COLUMNS, FOLD_COLUMNS, POINTER_COLUMNS = 5, 8, 12, 3
# Partial sums of each index: |w|, w^2, n_dw, |dw|, dw^2, |w dw|, w dw.
SUMS = 7


class Operand(NamedTuple):
    """Everything about a weight and its gradient, but the addresses, that decides how to read them.

    Without a gradient, `dw_strides` is None and `dw_dtype` that of the weight.
    """

    shape: tuple[int, ...]
    w_strides: Strides
    dw_strides: Strides | None
    w_dtype: torch.dtype
    dw_dtype: torch.dtype
    groups: int

    @property
    def contiguous(self) -> "Operand":
        """Return the same after a copy."""
        strides = tuple(math.prod(self.shape[dim + 1 :]) for dim in range(len(self.shape)))
        return self._replace(
            w_strides=strides, dw_strides=None if self.dw_strides is None else strides
        )


class Variant(NamedTuple):
    """What makes another variant of the kernel, and so another launch."""

    w_dtype: torch.dtype
    dw_dtype: torch.dtype
    transposed: bool

    @property
    def vector(self) -> int:
        """Return how many elements are read at once."""
        return launch.vector_width(max(self.w_dtype.itemsize, self.dw_dtype.itemsize))


class Matrix(NamedTuple):
    """A weight as slow indices times a dense stretch; the row of the table."""

    slow: int
    fast: int
    w_stride: int
    dw_stride: int
    # Where its partial sums begin, and how many there are of each index.
    slow_parts: int
    fast_parts: int
    tiles: int
    chunks: int


class Fold(NamedTuple):
    """Partial sums that belong to a block of columns of an output; the row of the table.

    Sum s of unit u is that of parts[parts + s * plane + t * step + k * behind_step + u * unit_step]
    over t < pieces and k < behind.
    """

    parts: int
    plane: int
    pieces: int
    step: int
    behind: int
    behind_step: int
    units: int
    unit_step: int
    out: int
    is_column: bool
    positions: int
    has_dw: bool

    def blocks(self) -> Iterator["Fold"]:
        """Cut into blocks of units."""
        for first in range(0, self.units, launch.FOLD_UNITS):
            yield self._replace(
                parts=self.parts + first * self.unit_step,
                units=min(launch.FOLD_UNITS, self.units - first),
                out=self.out + first,
            )


@dataclass(frozen=True, eq=False)
class ParameterTables:
    """The tables of one list of weights, on the device, and how to launch over them.

    Attributes:
        matrices: int64 [n_weights, MATRIX_COLUMNS].
        tasks: int64 [n_tasks, TASK_COLUMNS]: weight, first and last slow index, tile, chunk.
        launches: First task of each kind and the end of its tasks.
        folds: int64 [n_folds, FOLD_COLUMNS].
        copied: Which weights must be made contiguous.
        wide: Which weights have rows that can be read wide where the addresses allow it.
        parts: Number of partial sums.
        filled: When the tables are there.
    """

    matrices: Tensor
    tasks: Tensor
    launches: dict[Variant, tuple[int, int]]
    folds: Tensor
    copied: tuple[bool, ...]
    wide: tuple[bool, ...]
    parts: int
    filled: Filled
    _addresses: Addresses = field(default_factory=Addresses)

    def pointers(self, addresses: Sequence[tuple[int, int]]) -> Tensor:
        """Return int64 [n_weights, POINTER_COLUMNS]: addresses, whether to read wide."""
        rows = tuple(
            (w, dw, int(wide and (w | dw) % 16 == 0))
            for (w, dw), wide in zip(addresses, self.wide, strict=True)
        )
        return self._addresses.of(rows, self.matrices.device)


class _Builder:
    """Tables that grow with each weight."""

    def __init__(self) -> None:
        self.matrices: list[Matrix] = []
        self.tasks: dict[Variant, list[tuple[int, ...]]] = {}
        self.folds: list[Fold] = []
        self.copied: list[bool] = []
        self.wide: list[bool] = []
        self.parts = self.row = self.column = 0

    def add(self, operand: Operand) -> None:
        """Describe one more weight."""
        shape, groups = operand.shape, operand.groups
        as_given = _stretch(operand)
        stretch = as_given or _stretch(operand.contiguous)
        assert stretch is not None, operand
        kind = Variant(operand.w_dtype, operand.dw_dtype, stretch.transposed)
        # A depthwise filter has one column, with the sums of its row.
        depthwise = groups == shape[0] and shape[1] == 1 and not stretch.transposed
        parts = 1 if depthwise else groups
        numbers = (stretch.fast, stretch.w_stride, stretch.dw_stride)
        self.copied.append(as_given is None)
        self.wide.append(math.gcd(kind.vector, *numbers) == kind.vector)
        matrix = self._matrix(stretch, parts)
        if math.prod(shape):
            self.tasks.setdefault(kind, []).extend(_tasks(len(self.matrices), matrix, parts))
            self._fold_slow(operand, stretch, matrix, is_column=stretch.transposed)
            if depthwise:
                self._fold_slow(operand, stretch, matrix, is_column=True)
            else:
                self._fold_fast(operand, stretch, matrix)
        self.matrices.append(matrix)
        self.row += shape[0]
        self.column += groups * shape[1]

    def _matrix(self, stretch: "_Stretch", groups: int) -> Matrix:
        slow, fast = stretch.slow, stretch.fast
        tiles = triton.cdiv(fast, launch.PARAMETER_FAST)
        chunks = groups * triton.cdiv(slow // groups, launch.PARAMETER_ROWS)
        begin = self.parts
        middle = begin + SUMS * tiles * slow
        self.parts = middle + SUMS * chunks * fast
        strides = (stretch.w_stride, stretch.dw_stride)
        return Matrix(slow, fast, *strides, begin, middle, tiles, chunks)

    def _fold_slow(
        self, operand: Operand, stretch: "_Stretch", matrix: Matrix, is_column: bool
    ) -> None:
        fold = Fold(
            parts=matrix.slow_parts,
            plane=matrix.tiles * matrix.slow,
            pieces=matrix.tiles,
            step=matrix.slow,
            behind=1,
            behind_step=0,
            units=matrix.slow,
            unit_step=1,
            out=self.column if is_column else self.row,
            is_column=is_column,
            positions=matrix.fast,
            has_dw=operand.dw_strides is not None,
        )
        self.folds.extend(fold.blocks())

    def _fold_fast(self, operand: Operand, stretch: "_Stretch", matrix: Matrix) -> None:
        is_column = not stretch.transposed
        units = operand.shape[1] if is_column else operand.shape[0]
        groups = operand.groups
        count = matrix.chunks // groups
        for group in range(groups):
            fold = Fold(
                parts=matrix.fast_parts + group * count * matrix.fast,
                plane=matrix.chunks * matrix.fast,
                pieces=count,
                step=matrix.fast,
                behind=stretch.behind,
                behind_step=stretch.behind_step,
                units=units,
                unit_step=stretch.unit_step,
                out=self.column + group * units if is_column else self.row,
                is_column=is_column,
                positions=matrix.slow // groups * stretch.behind,
                has_dw=operand.dw_strides is not None,
            )
            self.folds.extend(fold.blocks())


@lru_cache(maxsize=256)
def tables_for(operands: tuple[Operand, ...], device: torch.device) -> ParameterTables:
    """Return the tables of a list of weights."""
    builder = _Builder()
    for operand in operands:
        builder.add(operand)
    ends = [0, *itertools.accumulate(len(tasks) for tasks in builder.tasks.values())]
    return ParameterTables(
        matrices=table(builder.matrices, MATRIX_COLUMNS, device),
        tasks=table([task for own in builder.tasks.values() for task in own], TASK_COLUMNS, device),
        launches=dict(zip(builder.tasks, itertools.pairwise(ends), strict=True)),
        folds=table(builder.folds, FOLD_COLUMNS, device),
        copied=tuple(builder.copied),
        wide=tuple(builder.wide),
        parts=builder.parts,
        filled=Filled(device),
    )


def _tasks(weight: int, matrix: Matrix, groups: int) -> Iterator[tuple[int, ...]]:
    """Yield rows of the table of tasks: a chunk of slow indices of one group, a tile."""
    size = matrix.slow // groups
    per_group = matrix.chunks // groups
    for chunk, tile in itertools.product(range(matrix.chunks), range(matrix.tiles)):
        group, part = divmod(chunk, per_group)
        begin = group * size + part * launch.PARAMETER_ROWS
        end = min(begin + launch.PARAMETER_ROWS, (group + 1) * size)
        yield weight, begin, end, tile, chunk


class _Stretch(NamedTuple):
    """How a weight is a matrix; `transposed` where dimension 0 is in the stretch."""

    slow: int
    fast: int
    w_stride: int
    dw_stride: int
    unit_step: int
    behind: int
    behind_step: int
    transposed: bool


def _stretch(operand: Operand) -> _Stretch | None:
    """Return the weight as a matrix, None where its strides do not allow it."""
    # Groups cut dimension 0, which is easy only where that is slow.
    for slow in (0, 1) if operand.groups == 1 else (0,):
        w_steps = _steps(operand.shape, operand.w_strides, slow)
        given = operand.dw_strides
        dw_steps = w_steps if given is None else _steps(operand.shape, given, slow)
        if w_steps is not None and w_steps == dw_steps:
            unit_step, behind_step = w_steps
            behind = math.prod(operand.shape[2:])
            return _Stretch(
                operand.shape[slow],
                operand.shape[1 - slow] * behind,
                operand.w_strides[slow],
                0 if given is None else given[slow],
                unit_step,
                behind,
                behind_step,
                slow == 1,
            )
    return None


def _steps(shape: tuple[int, ...], strides: Strides, slow: int) -> tuple[int, int] | None:
    """Return the step of the unit and of the dimensions behind, None where they are not dense."""
    units, unit_step = shape[1 - slow], strides[1 - slow]
    stretch = stretch_of(zip(shape[2:], strides[2:], strict=True))
    if stretch is None:
        return None
    behind, behind_step = stretch if stretch[0] > 1 else (1, 0)
    # A dimension of size 1 may have any stride.
    if units == 1:
        unit_step = behind if behind_step == 1 else 1
    behind_first = behind_step == 1 and unit_step == behind
    unit_first = unit_step == 1 and (behind == 1 or behind_step == units)
    return (unit_step, behind_step) if behind_first or unit_first else None
