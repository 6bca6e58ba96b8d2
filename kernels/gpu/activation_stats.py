"""Statistics of the activations of each unit, on a GPU.

    activation_stats  float64 [9, C]  n, sum h, sum |h|, sum h^2, min h, max h, #(h == 0), #flat,
                                      #nonfinite

h = f(z) is made in registers from z, in float32. The network rounds h to the dtype of z: so are min
and max here, and h counts as 0 where that makes it 0; sums are of h before. A position is flat
where |f'(z)| <= 0.01, decided on z by comparisons with the ends of intervals. Where z or h is NaN
or infinite, the position counts in the last row alone.

Stage one reads z once, in tiles of units times positions, and writes float32 partial sums [9,
splits, C]; stage two folds them in float64 into the table. A square above 3e38 counts as infinite.
"""

import torch
import triton.language as tl
from torch import Tensor

from fastplastic.kernels.activations import parse_activation
from fastplastic.kernels.gpu.fold import fold
from fastplastic.kernels.gpu.functions import activate, flat_ends, rounded
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
from fastplastic.kernels.reference import activation_stats as reference
from fastplastic.kernels.tables import ACTIVATION_ROWS, MIN_ROW, activation_table, check_axis

_LEAKY_SLOPE = 0.01


@kernel
def _activation_kernel(
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
    UNITS_ADJACENT: tl.constexpr,
    DENSE: tl.constexpr,
    NESTED: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_UNITS: tl.constexpr,
    BLOCK_POSITIONS: tl.constexpr,
):
    """Write the partial sums of activations.

    This program owns BLOCK_UNITS units in one split of the positions: grid (blocks of units,
    splits).

    A position is one of `inner` fast ones of one of `outer` others; an outer index is two
    dimensions where NESTED. Strides are in elements, 0 and negative ones too.

    Args:
        x_ptr: z with `units` units, any float dtype but float64.
        parts_ptr: float32 [9, splits, units], contiguous; every element is written.
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
            h = activate(z, slope, ACTIVATION, TYPE)
            finite = (tl.abs(z) < float("inf")) & (tl.abs(h) < float("inf"))
            counted = tl.where(finite, h, 0.0)
            sum_h += counted
            sum_abs += tl.abs(counted)
            sum_sq += counted * counted
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
            counts += tl.where(finite, count, 0)

    AXIS: tl.constexpr = 0 if UNITS_ADJACENT else 1
    n = tl.sum(counts & 1023, AXIS)
    seen = ((outer_end - outer_begin) * (inner_end - inner_begin)).to(tl.int32)
    part_ptr = parts_ptr + split.to(tl.int64) * units + unit
    row = tl.num_programs(1) * units
    mask = unit < units
    tl.store(part_ptr, n.to(tl.float32), mask=mask)
    tl.store(part_ptr + row, tl.sum(sum_h, AXIS), mask=mask)
    tl.store(part_ptr + 2 * row, tl.sum(sum_abs, AXIS), mask=mask)
    tl.store(part_ptr + 3 * row, tl.sum(sum_sq, AXIS), mask=mask)
    tl.store(part_ptr + 4 * row, rounded(tl.min(least, AXIS), TYPE), mask=mask)
    tl.store(part_ptr + 5 * row, rounded(tl.max(most, AXIS), TYPE), mask=mask)
    tl.store(part_ptr + 6 * row, tl.sum((counts >> 10) & 1023, AXIS).to(tl.float32), mask=mask)
    tl.store(part_ptr + 7 * row, tl.sum(counts >> 20, AXIS).to(tl.float32), mask=mask)
    tl.store(part_ptr + 8 * row, (seen - n).to(tl.float32), mask=mask)


def activation_stats(
    x: Tensor, unit_axis: int = 1, activation: str = "identity", *, out: Tensor | None = None
) -> Tensor:
    """Sum up the activations of each unit; see `fastplastic.kernels.activation_stats`."""
    name, slope = parse_activation(activation)
    axis = check_axis(x, unit_axis)
    if x.dtype == torch.float64:
        return reference.activation_stats(x, unit_axis, activation, out=out)
    table = activation_table(x, axis, out)
    if x.numel() == 0:
        return table
    with launching(x.device):
        plan = tiles(x, axis)
        parts = scratch(x.device, (len(ACTIVATION_ROWS), plan.grid[1], x.shape[axis]))
        _activation_kernel[plan.grid](
            parts_ptr=parts,
            slope=_LEAKY_SLOPE if slope is None else slope,
            ACTIVATION=name,
            **flat_ends(name),
            **plan.arguments,
        )
        fold(parts, table, MIN_ROW)
    return table
