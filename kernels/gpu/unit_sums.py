"""Stage one of activation_stats and gradient_stats: the kernel that both of them launch.

It reads many tensors z or g once, in tiles of units times positions, and writes float32 partial
sums; stage two (`fold.py`) folds them. The rows are those of `tables.py`. NaN and infinite elements
count in the last row alone. A square above 3e38 counts as infinite.

A tile is [positions, units] where units lie next to each other in memory and [units, positions]
elsewhere, so that its last dimension is the fast one. Wide rows are read 16 bytes at once, by a
loop that takes all elements for finite; where they turn out not to be, and where rows are not wide,
a careful loop reads.
"""

import triton.language as tl

from fastplastic.kernels.gpu import launch
from fastplastic.kernels.gpu.functions import activate, rounded
from fastplastic.kernels.gpu.runtime import device_function, kernel
from fastplastic.kernels.gpu.tiles import (
    SLOW,
    counted_of,
    flat_of,
    inside_of,
    store_activations,
    store_sums,
    tile_of,
)
from fastplastic.kernels.gpu.unit_tables import (
    ADJACENT,
    HALF_PLANES,
    ITEM_COLUMNS,
    PLANES,
    TENSOR_COLUMNS,
)

_N_TENSOR, _N_ITEM = tl.constexpr(TENSOR_COLUMNS), tl.constexpr(ITEM_COLUMNS)
_ADJACENT, _PLANES = tl.constexpr(ADJACENT), tl.constexpr(PLANES)
_HALF_PLANES = tl.constexpr(HALF_PLANES)
_ROW_BYTES = tl.constexpr(launch.UNIT_ROW_BYTES)
_VECTOR_BYTES, _UNROLL = tl.constexpr(launch.VECTOR_BYTES), tl.constexpr(launch.UNIT_UNROLL)


@device_function
def _read_wide(
    x_ptr,
    mask_ptr,
    tensor_ptr,
    item_ptr,
    parts_ptr,
    slope,
    ACTIVATION: tl.constexpr,
    MONOTONE: tl.constexpr,
    POSITIVE: tl.constexpr,
    FLAT_BELOW: tl.constexpr,
    FLAT_FROM: tl.constexpr,
    FLAT_TO: tl.constexpr,
    FLAT_ABOVE: tl.constexpr,
    GRADIENT: tl.constexpr,
    MASKED: tl.constexpr,
    UNITS_ADJACENT: tl.constexpr,
    FAST: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Write the partial sums of an item; return 0, and write none, unless all is finite."""
    TYPE: tl.constexpr = x_ptr.dtype.element_ty
    unit, lane, offsets, there = tile_of(tensor_ptr, item_ptr, UNITS_ADJACENT, FAST, VECTOR)
    STEP: tl.constexpr = SLOW if UNITS_ADJACENT else FAST
    inner_stride = tl.load(tensor_ptr + 3) // VECTOR * VECTOR if UNITS_ADJACENT else 1
    outer_stride = tl.load(tensor_ptr + 5) // VECTOR * VECTOR
    inner_begin = tl.load(item_ptr + 5) // STEP * STEP
    # An item is at most 512 tiles long.
    positions = (tl.load(item_ptr + 6) - inner_begin).to(tl.int32)
    if not UNITS_ADJACENT:
        positions = positions // VECTOR * VECTOR
    outers = tl.load(item_ptr + 4).to(tl.int32)
    blocks = tl.cdiv(positions, STEP)
    along = STEP * inner_stride
    back = outer_stride - (blocks - 1) * along
    start = tl.load(item_ptr + 2) // VECTOR * VECTOR
    tile_ptr = x_ptr + (start + inner_begin * inner_stride) + offsets

    # Two counters of 10 bits: zero (which is flat for a ReLU), flat. An item has at most 512 tiles.
    counts = tl.zeros(offsets.shape, tl.int32)
    sum_h = tl.zeros(offsets.shape, tl.float32)
    sum_abs = tl.zeros(offsets.shape, tl.float32)
    sum_sq = tl.zeros(offsets.shape, tl.float32)
    # Of z where f never falls, else of h; and then abs(z), because h may hide that z is infinite.
    least = tl.full(offsets.shape, float("inf"), tl.float32)
    most = tl.full(offsets.shape, float("-inf"), tl.float32)
    size = tl.zeros(offsets.shape, tl.float32)
    # The largest |h| that the dtype rounds to 0.
    ZERO: tl.constexpr = 2.0**-25 if TYPE == tl.float16 else 0.0
    left = positions
    seen = outers * positions
    if MASKED:
        chosen = tl.zeros(lane.shape, tl.int32)
        mask_ptr += inner_begin
    for _ in tl.range(0, outers * blocks, loop_unroll_factor=_UNROLL):
        inside = inside_of(lane, left, there, UNITS_ADJACENT)
        if MASKED:
            rows = counted_of(mask_ptr, lane, left)
            inside &= rows[:, None]
            chosen += rows.to(tl.int32)
            mask_ptr += STEP
        # Outside is NaN, which is in no interval and not the smaller or larger of two numbers.
        z = tl.load(tile_ptr, mask=inside, other=float("nan")).to(tl.float32)
        last = left <= STEP
        tile_ptr += tl.where(last, back, along)
        left = tl.where(last, positions, left - STEP)
        if GRADIENT:
            z = tl.where(inside, z, 0.0)
            sum_abs += tl.abs(z)
            sum_sq += z * z
        else:
            h = activate(z, slope, ACTIVATION, TYPE)
            if MONOTONE:
                least, most = tl.minimum(least, z), tl.maximum(most, z)
            else:
                least, most = tl.minimum(least, h), tl.maximum(most, h)
                size = tl.maximum(size, tl.abs(z))
            if ACTIVATION == "relu":
                counts += tl.where(z <= 0.0, 1, 0)
            else:
                counts += tl.where(tl.abs(h) <= ZERO, 1, 0)
                if FLAT_BELOW is not None:
                    flat = flat_of(z, FLAT_BELOW, FLAT_FROM, FLAT_TO, FLAT_ABOVE)
                    counts += tl.where(flat, 1 << 10, 0)
            h = tl.where(inside, h, 0.0)
            sum_h += h
            sum_sq += h * h
            if not POSITIVE:
                sum_abs += tl.abs(h)

    AXIS: tl.constexpr = 0 if UNITS_ADJACENT else 1
    if MASKED:
        seen = tl.sum(chosen, 0)
    sum_h, sum_sq = tl.sum(sum_h, AXIS), tl.sum(sum_sq, AXIS)
    sum_abs = sum_h if POSITIVE else tl.sum(sum_abs, AXIS)
    low, high = tl.min(least, AXIS), tl.max(most, AXIS)
    # NaN and infinite h show in the sums.
    finite = (sum_abs < float("inf")) & (sum_sq < float("inf"))
    if not GRADIENT:
        finite &= (low > float("-inf")) & (high < float("inf"))
        if not MONOTONE:
            finite &= tl.max(size, AXIS) < float("inf")
    mask = unit < tl.load(tensor_ptr)
    done = tl.min(tl.where(finite | (mask == 0), 1, 0), 0)
    if done != 0:
        units = tl.load(tensor_ptr)
        row = tl.load(tensor_ptr + 7) * units
        part_ptr = parts_ptr + tl.load(item_ptr + 7) * units + unit
        n = tl.zeros(unit.shape, tl.int32) + seen
        store_sums(part_ptr, row, mask, n, n, sum_h, sum_abs, sum_sq, GRADIENT)
        if not GRADIENT:
            if MONOTONE:
                # Where no position counts, the ends of nothing stay what they are.
                low = tl.where(low < float("inf"), activate(low, slope, ACTIVATION, TYPE), low)
                high = tl.where(low < float("inf"), activate(high, slope, ACTIVATION, TYPE), high)
            zero = tl.sum(counts & 1023, AXIS)
            flat = zero if ACTIVATION == "relu" else tl.sum(counts >> 10, AXIS)
            low, high = rounded(low, TYPE), rounded(high, TYPE)
            store_activations(part_ptr, row, mask, low, high, zero, flat)
    return done


@device_function
def _read_carefully(
    x_ptr,
    mask_ptr,
    tensor_ptr,
    item_ptr,
    parts_ptr,
    slope,
    ACTIVATION: tl.constexpr,
    POSITIVE: tl.constexpr,
    FLAT_BELOW: tl.constexpr,
    FLAT_FROM: tl.constexpr,
    FLAT_TO: tl.constexpr,
    FLAT_ABOVE: tl.constexpr,
    GRADIENT: tl.constexpr,
    MASKED: tl.constexpr,
    UNITS_ADJACENT: tl.constexpr,
    FAST: tl.constexpr,
):
    """Write the partial sums of an item with any strides and any numbers."""
    TYPE: tl.constexpr = x_ptr.dtype.element_ty
    unit, lane, offsets, there = tile_of(tensor_ptr, item_ptr, UNITS_ADJACENT, FAST, 1)
    STEP: tl.constexpr = SLOW if UNITS_ADJACENT else FAST
    inner_stride, middle = tl.load(tensor_ptr + 3), tl.load(tensor_ptr + 1)
    middle_stride, outer_stride = tl.load(tensor_ptr + 4), tl.load(tensor_ptr + 5)
    start, turn, outers = tl.load(item_ptr + 2), tl.load(item_ptr + 3), tl.load(item_ptr + 4)
    inner_begin, inner_end = tl.load(item_ptr + 5), tl.load(item_ptr + 6)
    back = outer_stride - (middle - 1) * middle_stride

    counts = tl.zeros(offsets.shape, tl.int32)
    sum_h = tl.zeros(offsets.shape, tl.float32)
    sum_abs = tl.zeros(offsets.shape, tl.float32)
    sum_sq = tl.zeros(offsets.shape, tl.float32)
    ZERO: tl.constexpr = 2.0**-25 if TYPE == tl.float16 else 0.0
    least = tl.full(offsets.shape, float("inf"), tl.float32)
    most = tl.full(offsets.shape, float("-inf"), tl.float32)
    seen = (outers * (inner_end - inner_begin)).to(tl.int32)
    if MASKED:
        chosen = tl.zeros(lane.shape, tl.int32)
    for _ in range(0, outers):
        for first in range(inner_begin, inner_end, STEP):
            inside = inside_of(lane, inner_end - first, there, UNITS_ADJACENT)
            if MASKED:
                rows = counted_of(mask_ptr + first, lane, inner_end - first)
                inside &= rows[:, None]
                chosen += rows.to(tl.int32)
            tile_ptr = x_ptr + (start + first * inner_stride) + offsets
            z = tl.load(tile_ptr, mask=inside, other=float("nan")).to(tl.float32)
            h = tl.abs(z) if GRADIENT else activate(z, slope, ACTIVATION, TYPE)
            finite = (tl.abs(z) < float("inf")) & (tl.abs(h) < float("inf"))
            counted = tl.where(finite, h, 0.0)
            if not POSITIVE:
                sum_abs += tl.abs(counted)
            sum_sq += counted * counted
            count = tl.where(finite, 1, 0)
            if not GRADIENT:
                sum_h += counted
                least = tl.minimum(least, tl.where(finite, h, float("inf")))
                most = tl.maximum(most, tl.where(finite, h, float("-inf")))
                count = 1 + tl.where(tl.abs(h) <= ZERO, 1 << 10, 0)
                if FLAT_BELOW is not None and ACTIVATION != "relu":
                    flat = flat_of(z, FLAT_BELOW, FLAT_FROM, FLAT_TO, FLAT_ABOVE)
                    count += tl.where(flat, 1 << 20, 0)
                count = tl.where(finite, count, 0)
            counts += count
        # An outer index is two dimensions.
        start += tl.where(turn == 1, back, middle_stride)
        turn = tl.where(turn == 1, middle, turn - 1)

    AXIS: tl.constexpr = 0 if UNITS_ADJACENT else 1
    n = tl.sum(counts & 1023, AXIS)
    if MASKED:
        seen = tl.sum(chosen, 0)
    units = tl.load(tensor_ptr)
    row, mask = tl.load(tensor_ptr + 7) * units, unit < units
    part_ptr = parts_ptr + tl.load(item_ptr + 7) * units + unit
    sum_h, sum_sq = tl.sum(sum_h, AXIS), tl.sum(sum_sq, AXIS)
    sum_abs = sum_h if POSITIVE else tl.sum(sum_abs, AXIS)
    store_sums(part_ptr, row, mask, n, seen, sum_h, sum_abs, sum_sq, GRADIENT)
    if not GRADIENT:
        least, most = rounded(tl.min(least, AXIS), TYPE), rounded(tl.max(most, AXIS), TYPE)
        zero = tl.sum((counts >> 10) & 1023, AXIS)
        flat = zero if ACTIVATION == "relu" else tl.sum(counts >> 20, AXIS)
        store_activations(part_ptr, row, mask, least, most, zero, flat)


@kernel
def unit_kernel(
    x_address: tl.int64,
    mask_address: tl.int64,
    addresses_ptr,
    tensors_ptr,
    items_ptr,
    parts_ptr,
    first_item: tl.int64,
    slope,
    TYPE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    MONOTONE: tl.constexpr,
    POSITIVE: tl.constexpr,
    FLAT_BELOW: tl.constexpr,
    FLAT_FROM: tl.constexpr,
    FLAT_TO: tl.constexpr,
    FLAT_ABOVE: tl.constexpr,
    GRADIENT: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Write the partial sums of activations or of gradients of many tensors.

    This program owns an item, a block of units in one split of the positions of one tensor: grid
    (items of a launch,).

    A position is one of `inner` fast ones of one of `outer` others; an outer index is two
    dimensions where `middle` is above 1. Strides are in elements, 0 and negative ones too.

    Args:
        x_address: Of z or g, if the launch is over one tensor.
        mask_address: Of uint8 [inner], contiguous, 0 where a position does not count, if the launch
            is over one tensor and MASKED.
        addresses_ptr: int64 [n_tensors, 2], contiguous: these of all tensors; None if there is one.
        tensors_ptr: int64 [n_tensors, 9], contiguous: `Row` of `unit_tables`.
        items_ptr: int64 [n_items, 8], contiguous: tensor, first unit, where its first outer index
            begins, how many until the slower one goes on, how many in all, inner begin and end,
            split.
        parts_ptr: float32, of each tensor where its row says: [9, splits, units], of gradients [4,
            splits, units], contiguous; every element is written.
        first_item: Item of program 0.
        slope: Of a leaky ReLU.
        TYPE: Dtype of the tensors of this launch, any float dtype but float64.
        ACTIVATION: Name of f in h = f(z).
        MONOTONE: Whether f never falls.
        POSITIVE: Whether h is never negative.
        FLAT_BELOW: f is flat up to here; None if nowhere.
        FLAT_FROM: And from here; None if nowhere.
        FLAT_TO: Up to here.
        FLAT_ABOVE: And from here on; None if nowhere.
        GRADIENT: Whether x is g: then h is abs(g), and the rows of h alone are left out.
        MASKED: Whether only positions count that a mask says; units are adjacent then, and all
            positions are inner ones.
    """
    item_ptr = items_ptr + (first_item + tl.program_id(0)) * _N_ITEM
    tensor = tl.load(item_ptr)
    tensor_ptr = tensors_ptr + tensor * _N_TENSOR
    if addresses_ptr is not None:
        x_address = tl.load(addresses_ptr + 2 * tensor)
        mask_address = tl.load(addresses_ptr + 2 * tensor + 1)
    x_ptr = x_address.to(tl.pointer_type(TYPE))
    # A pointer of its own, of which alone the compiler is told that it is aligned.
    wide_ptr = tl.multiple_of(x_address.to(tl.pointer_type(TYPE)), 16)
    mask_ptr = x_ptr
    if MASKED:
        mask_ptr = mask_address.to(tl.pointer_type(tl.uint8))
    parts_ptr += tl.load(tensor_ptr + 6)
    path = tl.load(tensor_ptr + 8)
    FAST: tl.constexpr = _ROW_BYTES // (TYPE.primitive_bitwidth // 8)
    VECTOR: tl.constexpr = _VECTOR_BYTES // (TYPE.primitive_bitwidth // 8)
    done = 0
    if path == _ADJACENT:
        done = _read_wide(
            wide_ptr, mask_ptr, tensor_ptr, item_ptr, parts_ptr, slope, ACTIVATION, MONOTONE,
            POSITIVE, FLAT_BELOW, FLAT_FROM, FLAT_TO, FLAT_ABOVE, GRADIENT, MASKED, True, FAST,
            VECTOR,
        )  # fmt: skip
    if not MASKED:
        if path == _PLANES:
            done = _read_wide(
                wide_ptr, mask_ptr, tensor_ptr, item_ptr, parts_ptr, slope, ACTIVATION, MONOTONE,
                POSITIVE, FLAT_BELOW, FLAT_FROM, FLAT_TO, FLAT_ABOVE, GRADIENT, False, False, FAST,
                VECTOR,
            )  # fmt: skip
        elif path == _HALF_PLANES:
            done = _read_wide(
                wide_ptr, mask_ptr, tensor_ptr, item_ptr, parts_ptr, slope, ACTIVATION, MONOTONE,
                POSITIVE, FLAT_BELOW, FLAT_FROM, FLAT_TO, FLAT_ABOVE, GRADIENT, False, False,
                FAST // 2, VECTOR // 2,
            )  # fmt: skip
    if done == 0:
        if path <= _ADJACENT:
            _read_carefully(
                x_ptr, mask_ptr, tensor_ptr, item_ptr, parts_ptr, slope, ACTIVATION, POSITIVE,
                FLAT_BELOW, FLAT_FROM, FLAT_TO, FLAT_ABOVE, GRADIENT, MASKED, True, FAST,
            )  # fmt: skip
        elif not MASKED:
            _read_carefully(
                x_ptr, mask_ptr, tensor_ptr, item_ptr, parts_ptr, slope, ACTIVATION, POSITIVE,
                FLAT_BELOW, FLAT_FROM, FLAT_TO, FLAT_ABOVE, GRADIENT, False, False, FAST,
            )  # fmt: skip
