"""Stage two of activation_stats and gradient_stats: partial sums into the table of statistics.

    out[row, unit] += sum over splits of parts[row, split, unit]

in float64, in one fixed order; a minimum and a maximum instead of the sum in two of the rows.
"""

import triton.language as tl
from torch import Tensor

from fastplastic.kernels.gpu.launch import FOLD_UNITS, OPTIONS, fold_blocks
from fastplastic.kernels.gpu.runtime import device_function, kernel


@device_function
def _join(a, b, is_min, is_max):
    return tl.where(is_min, tl.minimum(a, b), tl.where(is_max, tl.maximum(a, b), a + b))


@kernel
def fold_kernel(
    parts_ptr,
    out_ptr,
    splits: tl.int64,
    units: tl.int64,
    out_stride: tl.int64,
    MIN_ROW: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    BLOCK_UNITS: tl.constexpr,
):
    """Add partial sums to a table.

    This program owns BLOCK_UNITS units of one row: grid (blocks of units, rows).

    Args:
        parts_ptr: float32 [rows, splits, units], contiguous.
        out_ptr: float64 [rows, units], row stride `out_stride`, column stride 1; added to.
        splits: Partial sums of each unit.
        units: C.
        out_stride: From one row of the table to the next, in elements.
        MIN_ROW: Row that holds minima; the next one holds maxima.
        BLOCK_SPLITS: Partial sums that are read at once.
        BLOCK_UNITS: Units of a program.
    """
    row = tl.program_id(1)
    unit = tl.program_id(0).to(tl.int64) * BLOCK_UNITS + tl.arange(0, BLOCK_UNITS)
    lanes = tl.arange(0, BLOCK_SPLITS)
    is_min, is_max = row == MIN_ROW, row == MIN_ROW + 1
    neutral = tl.where(is_min, float("inf"), tl.where(is_max, float("-inf"), 0.0))

    total = tl.zeros((BLOCK_SPLITS, BLOCK_UNITS), tl.float64) + neutral
    for first in range(0, splits, BLOCK_SPLITS):
        split = first + lanes
        mask = (split[:, None] < splits) & (unit[None, :] < units)
        offset = (row * splits + split[:, None]) * units + unit[None, :]
        part = tl.load(parts_ptr + offset, mask=mask, other=0.0)
        total = _join(total, tl.where(mask, part, neutral), is_min, is_max)

    least, most, added = tl.min(total, 0), tl.max(total, 0), tl.sum(total, 0)
    folded = tl.where(is_min, least, tl.where(is_max, most, added))
    inside = unit < units
    before = tl.load(out_ptr + row * out_stride + unit, mask=inside, other=0.0)
    tl.store(out_ptr + row * out_stride + unit, _join(before, folded, is_min, is_max), mask=inside)


def fold(parts: Tensor, out: Tensor, min_row: int | None = None) -> None:
    """Add partial sums to a table.

    Args:
        parts: float32 [rows, splits, units], contiguous.
        out: float64 [rows, units] with adjacent columns, added to in place.
        min_row: Row that holds minima; the next one holds maxima. None where all rows are sums.
    """
    rows, splits, units = parts.shape
    block_splits, blocks = fold_blocks(splits, units)
    fold_kernel[(blocks, rows)](
        parts,
        out,
        splits,
        units,
        out.stride(0),
        MIN_ROW=rows if min_row is None else min_row,
        BLOCK_SPLITS=block_splits,
        BLOCK_UNITS=FOLD_UNITS,
        **OPTIONS,
    )
