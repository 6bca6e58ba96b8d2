"""Statistics of the gradients to the activations of each unit, on a GPU.

    gradient_stats  float64 [4, C]  n, sum |g|, sum g^2, #nonfinite

NaN and infinite gradients count in the last row alone. Stage one reads g once, in tiles of units
times positions, and writes float32 partial sums [4, splits, C]; stage two folds them in float64
into the table. A square above 3e38 counts as infinite.
"""

import torch
import triton.language as tl
from torch import Tensor

from fastplastic.kernels.gpu.fold import fold
from fastplastic.kernels.gpu.runtime import kernel, launching, scratch
from fastplastic.kernels.gpu.tiles import (
    inside_of,
    multiple,
    offsets_of,
    share_of,
    start_of,
    tiles,
    told,
)
from fastplastic.kernels.reference import gradient_stats as reference
from fastplastic.kernels.tables import GRADIENT_ROWS, check_axis, gradient_table


@kernel
def _gradient_kernel(
    x_ptr,
    parts_ptr,
    units: tl.int64,
    inner: tl.int64,
    outer: tl.int64,
    middle: tl.int64,
    unit_stride: tl.int64,
    inner_stride: tl.int64,
    middle_stride: tl.int64,
    outer_stride: tl.int64,
    outer_share: tl.int64,
    inner_blocks: tl.int64,
    inner_splits: tl.int64,
    UNITS_ADJACENT: tl.constexpr,
    DENSE: tl.constexpr,
    NESTED: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_UNITS: tl.constexpr,
    BLOCK_POSITIONS: tl.constexpr,
):
    """Write the partial sums of gradients.

    This program owns BLOCK_UNITS units in one split of the positions: grid (blocks of units,
    splits).

    A position is one of `inner` fast ones of one of `outer` others; an outer index is two
    dimensions where NESTED. Strides are in elements, 0 and negative ones too.

    Args:
        x_ptr: g with `units` units, any float dtype but float64.
        parts_ptr: float32 [4, splits, units], contiguous; every element is written.
        units: C.
        inner: Size of the positions that make tiles with the units.
        outer: Number of the other positions.
        middle: Size of the faster of the two outer dimensions; read if NESTED.
        unit_stride: From one unit to the next.
        inner_stride: From one inner position to the next.
        middle_stride: Along the faster outer dimension; read if NESTED.
        outer_stride: Along the slower outer dimension, or the only one.
        outer_share: Outer indices of a split.
        inner_blocks: Tiles along inner of a split.
        inner_splits: Splits along inner; split s is s // inner_splits along outer.
        UNITS_ADJACENT: Whether tiles are [positions, units], else [units, positions].
        DENSE: Whether the stride of the last dimension of a tile is 1.
        NESTED: Whether an outer index is two dimensions.
        VECTOR: What divides all sizes and strides but the dense one: so many are read at once.
        BLOCK_UNITS: Units of a tile.
        BLOCK_POSITIONS: Inner positions of a tile.
    """
    units, inner, unit_stride, inner_stride = told(
        units, inner, unit_stride, inner_stride, UNITS_ADJACENT, DENSE, VECTOR
    )
    middle_stride, outer_stride = multiple(middle_stride, VECTOR), multiple(outer_stride, VECTOR)
    split = tl.program_id(1)
    outer_begin, outer_end = share_of(split // inner_splits, outer_share, outer)
    inner_share = inner_blocks * BLOCK_POSITIONS
    inner_begin, inner_end = share_of(split % inner_splits, inner_share, inner)
    unit = tl.program_id(0) * BLOCK_UNITS + tl.arange(0, BLOCK_UNITS)
    lane = tl.arange(0, BLOCK_POSITIONS)
    offsets = offsets_of(unit, lane, unit_stride, inner_stride, UNITS_ADJACENT)

    count = tl.zeros(offsets.shape, tl.int32)
    sum_abs = tl.zeros(offsets.shape, tl.float32)
    sum_sq = tl.zeros(offsets.shape, tl.float32)
    for index in range(outer_begin, outer_end):
        start = start_of(index, middle, middle_stride, outer_stride, NESTED)
        for first in range(inner_begin, inner_end, BLOCK_POSITIONS):
            inside = inside_of(unit, first + lane, units, inner, UNITS_ADJACENT)
            # Outside is NaN, which counts nowhere.
            tile_ptr = x_ptr + (start + first * inner_stride) + offsets
            size = tl.abs(tl.load(tile_ptr, mask=inside, other=float("nan")).to(tl.float32))
            finite = size < float("inf")
            size = tl.where(finite, size, 0.0)
            count += finite.to(tl.int32)
            sum_abs += size
            sum_sq += size * size

    AXIS: tl.constexpr = 0 if UNITS_ADJACENT else 1
    n = tl.sum(count, AXIS)
    seen = ((outer_end - outer_begin) * (inner_end - inner_begin)).to(tl.int32)
    part_ptr = parts_ptr + split.to(tl.int64) * units + unit
    row = tl.num_programs(1) * units
    mask = unit < units
    tl.store(part_ptr, n.to(tl.float32), mask=mask)
    tl.store(part_ptr + row, tl.sum(sum_abs, AXIS), mask=mask)
    tl.store(part_ptr + 2 * row, tl.sum(sum_sq, AXIS), mask=mask)
    tl.store(part_ptr + 3 * row, (seen - n).to(tl.float32), mask=mask)


def gradient_stats(g: Tensor, unit_axis: int = 1, *, out: Tensor | None = None) -> Tensor:
    """Sum up the gradients to the activations of each unit.

    See `fastplastic.kernels.gradient_stats`.
    """
    axis = check_axis(g, unit_axis)
    if g.dtype == torch.float64:
        return reference.gradient_stats(g, unit_axis, out=out)
    table = gradient_table(g, axis, out)
    if g.numel() == 0:
        return table
    with launching(g.device):
        plan = tiles(g, axis)
        parts = scratch(g.device, (len(GRADIENT_ROWS), plan.grid[1], g.shape[axis]))
        _gradient_kernel[plan.grid](parts_ptr=parts, **plan.arguments)
        fold(parts, table)
    return table
