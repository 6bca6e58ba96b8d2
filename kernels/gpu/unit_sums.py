"""Stage one of activation_stats and gradient_stats: the kernel that both of them launch.

It reads z or g once, in tiles of units times positions, and writes float32 partial sums; stage two
(`fold.py`) folds them. The rows are those of `tables.py`. NaN and infinite elements count in the
last row alone. A square above 3e38 counts as infinite.
"""

import triton.language as tl

from fastplastic.kernels.gpu.functions import activate, rounded
from fastplastic.kernels.gpu.runtime import kernel
from fastplastic.kernels.gpu.tiles import (
    inside_of,
    multiple,
    offsets_of,
    share_of,
    start_of,
    told,
)


@kernel
def unit_kernel(
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
    slope,
    ACTIVATION: tl.constexpr,
    FLAT_BELOW: tl.constexpr,
    FLAT_FROM: tl.constexpr,
    FLAT_TO: tl.constexpr,
    FLAT_ABOVE: tl.constexpr,
    GRADIENT: tl.constexpr,
    UNITS_ADJACENT: tl.constexpr,
    DENSE: tl.constexpr,
    NESTED: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_UNITS: tl.constexpr,
    BLOCK_POSITIONS: tl.constexpr,
):
    """Write the partial sums of activations or of gradients.

    This program owns BLOCK_UNITS units in one split of the positions: grid (blocks of units,
    splits).

    A position is one of `inner` fast ones of one of `outer` others; an outer index is two
    dimensions where NESTED. Strides are in elements, 0 and negative ones too.

    Args:
        x_ptr: z or g with `units` units, any float dtype but float64.
        parts_ptr: float32 [9, splits, units], of gradients [4, splits, units], contiguous; every
            element is written.
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
        slope: Of a leaky ReLU.
        ACTIVATION: Name of f in h = f(z).
        FLAT_BELOW: f is flat up to here; None if nowhere.
        FLAT_FROM: And from here; None if nowhere.
        FLAT_TO: Up to here.
        FLAT_ABOVE: And from here on; None if nowhere.
        GRADIENT: Whether x is g: then h is abs(g), and the rows of h alone are left out.
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

    # Three counters of 10 bits: finite, zero, flat. A program has at most 512 tiles.
    counts = tl.zeros(offsets.shape, tl.int32)
    sum_h = tl.zeros(offsets.shape, tl.float32)
    sum_abs = tl.zeros(offsets.shape, tl.float32)
    sum_sq = tl.zeros(offsets.shape, tl.float32)
    # The largest |h| that the dtype rounds to 0.
    TYPE: tl.constexpr = x_ptr.dtype.element_ty
    ZERO: tl.constexpr = 2.0**-25 if TYPE == tl.float16 else 0.0
    least = tl.full(offsets.shape, float("inf"), tl.float32)
    most = tl.full(offsets.shape, float("-inf"), tl.float32)
    for index in range(outer_begin, outer_end):
        start = start_of(index, middle, middle_stride, outer_stride, NESTED)
        for first in range(inner_begin, inner_end, BLOCK_POSITIONS):
            inside = inside_of(unit, first + lane, units, inner, UNITS_ADJACENT)
            # Outside is NaN, which counts nowhere.
            tile_ptr = x_ptr + (start + first * inner_stride) + offsets
            z = tl.load(tile_ptr, mask=inside, other=float("nan")).to(tl.float32)
            h = tl.abs(z) if GRADIENT else activate(z, slope, ACTIVATION, TYPE)
            finite = (tl.abs(z) < float("inf")) & (tl.abs(h) < float("inf"))
            counted = tl.where(finite, h, 0.0)
            sum_abs += counted if GRADIENT else tl.abs(counted)
            sum_sq += counted * counted
            count = tl.where(finite, 1, 0)
            if not GRADIENT:
                sum_h += counted
                least = tl.minimum(least, tl.where(finite, h, float("inf")))
                most = tl.maximum(most, tl.where(finite, h, float("-inf")))
                count = 1 + tl.where(tl.abs(h) <= ZERO, 1 << 10, 0)
                if FLAT_BELOW is not None:
                    is_flat = z <= FLAT_BELOW
                    if FLAT_FROM is not None:
                        is_flat |= (z >= FLAT_FROM) & (z <= FLAT_TO)
                    if FLAT_ABOVE is not None:
                        is_flat |= z >= FLAT_ABOVE
                    count += tl.where(is_flat, 1 << 20, 0)
                count = tl.where(finite, count, 0)
            counts += count

    AXIS: tl.constexpr = 0 if UNITS_ADJACENT else 1
    n = tl.sum(counts if GRADIENT else counts & 1023, AXIS)
    seen = ((outer_end - outer_begin) * (inner_end - inner_begin)).to(tl.int32)
    part_ptr = parts_ptr + split.to(tl.int64) * units + unit
    row = tl.num_programs(1) * units
    mask = unit < units
    tl.store(part_ptr, n.to(tl.float32), mask=mask)
    if not GRADIENT:
        part_ptr += row
        tl.store(part_ptr, tl.sum(sum_h, AXIS), mask=mask)
    tl.store(part_ptr + row, tl.sum(sum_abs, AXIS), mask=mask)
    tl.store(part_ptr + 2 * row, tl.sum(sum_sq, AXIS), mask=mask)
    part_ptr += 3 * row
    if not GRADIENT:
        tl.store(part_ptr, rounded(tl.min(least, AXIS), TYPE), mask=mask)
        tl.store(part_ptr + row, rounded(tl.max(most, AXIS), TYPE), mask=mask)
        zero, flat = (counts >> 10) & 1023, counts >> 20
        tl.store(part_ptr + 2 * row, tl.sum(zero, AXIS).to(tl.float32), mask=mask)
        tl.store(part_ptr + 3 * row, tl.sum(flat, AXIS).to(tl.float32), mask=mask)
        part_ptr += 4 * row
    tl.store(part_ptr, (seen - n).to(tl.float32), mask=mask)
