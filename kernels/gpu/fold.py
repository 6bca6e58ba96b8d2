"""Stage two of activation_stats and gradient_stats: partial sums into the table of statistics.

    out[row, unit] += sum over splits of parts[row, split, unit]

in float64, in one fixed order; a minimum and a maximum instead of the sum in two of the rows.
"""

import triton.language as tl

from fastplastic.kernels.gpu.runtime import device_function, kernel
from fastplastic.kernels.gpu.unit_tables import FOLD_COLUMNS

_N_FOLD = tl.constexpr(FOLD_COLUMNS)


@device_function
def _join(a, b, is_min, is_max):
    return tl.where(is_min, tl.minimum(a, b), tl.where(is_max, tl.maximum(a, b), a + b))


@kernel
def fold_kernel(
    folds_ptr,
    parts_ptr,
    out_ptr,
    out_stride: tl.int64,
    MIN_ROW: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    BLOCK_UNITS: tl.constexpr,
):
    """Add partial sums to a table.

    This program owns one row of a block of up to BLOCK_UNITS units of one tensor: grid (folds,
    rows).

    Args:
        folds_ptr: int64 [n_folds, 5], contiguous: first part of row 0, splits, units of the tensor,
            units of the block, column of the table.
        parts_ptr: float32, of each tensor [rows, splits, units], contiguous.
        out_ptr: float64 [rows, columns], row stride `out_stride`, column stride 1; added to.
        out_stride: From one row of the table to the next, in elements.
        MIN_ROW: Row that holds minima; the next one holds maxima.
        BLOCK_SPLITS: Partial sums that are read at once.
        BLOCK_UNITS: Most units of a program.
    """
    fold_ptr, row = folds_ptr + tl.program_id(0) * _N_FOLD, tl.program_id(1)
    splits, units = tl.load(fold_ptr + 1), tl.load(fold_ptr + 2)
    parts_ptr += tl.load(fold_ptr) + row * splits * units
    out_ptr += row * out_stride + tl.load(fold_ptr + 4)
    unit, lanes = tl.arange(0, BLOCK_UNITS), tl.arange(0, BLOCK_SPLITS)
    inside = unit < tl.load(fold_ptr + 3)
    is_min, is_max = row == MIN_ROW, row == MIN_ROW + 1
    neutral = tl.where(is_min, float("inf"), tl.where(is_max, float("-inf"), 0.0))

    total = tl.zeros((BLOCK_SPLITS, BLOCK_UNITS), tl.float64) + neutral
    for first in range(0, splits, BLOCK_SPLITS):
        split = first + lanes
        mask = (split < splits)[:, None] & inside[None, :]
        part = tl.load(parts_ptr + (split[:, None] * units + unit[None, :]), mask=mask, other=0.0)
        total = _join(total, tl.where(mask, part, neutral), is_min, is_max)

    least, most, added = tl.min(total, 0), tl.max(total, 0), tl.sum(total, 0)
    folded = tl.where(is_min, least, tl.where(is_max, most, added))
    before = tl.load(out_ptr + unit, mask=inside, other=0.0)
    tl.store(out_ptr + unit, _join(before, folded, is_min, is_max), mask=inside)
