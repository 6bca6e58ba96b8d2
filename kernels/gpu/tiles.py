"""Parts of the kernel of activation_stats and gradient_stats: its tiles, and what it writes."""

import triton.language as tl

from fastplastic.kernels.gpu import launch
from fastplastic.kernels.gpu.runtime import device_function

# Size of the slow dimension of a tile.
SLOW = tl.constexpr(launch.UNIT_SLOW)


@device_function
def tile_of(
    tensor_ptr, item_ptr, UNITS_ADJACENT: tl.constexpr, FAST: tl.constexpr, VECTOR: tl.constexpr
):
    """Return the units and lanes of a tile, its offsets, and which units there are.

    FAST is the size of the last dimension; VECTOR divides what it says to the compiler, which then
    reads so many elements at once; 1 where strides may be anything.
    """
    unit_stride, inner_stride = tl.load(tensor_ptr + 2), tl.load(tensor_ptr + 3)
    units = tl.load(tensor_ptr)
    begin = tl.load(item_ptr + 1)
    if UNITS_ADJACENT:
        unit, lane = begin + tl.arange(0, FAST), tl.arange(0, SLOW)
        if VECTOR > 1:
            unit = begin // VECTOR * VECTOR + tl.arange(0, FAST)
            units, unit_stride = units // VECTOR * VECTOR, 1
            inner_stride = inner_stride // VECTOR * VECTOR
        offsets = lane.to(tl.int64)[:, None] * inner_stride + (unit * unit_stride)[None, :]
        there = (unit < units)[None, :]
    else:
        unit, lane = begin + tl.arange(0, SLOW), tl.arange(0, FAST)
        if VECTOR > 1:
            unit_stride, inner_stride = unit_stride // VECTOR * VECTOR, 1
        offsets = (unit * unit_stride)[:, None] + lane.to(tl.int64)[None, :] * inner_stride
        there = (unit < units)[:, None]
    return unit, lane, offsets, there


@device_function
def inside_of(lane, left, there, UNITS_ADJACENT: tl.constexpr):
    """Return where a tile lies inside its share of the tensor, `left` positions of which follow."""
    if UNITS_ADJACENT:
        return (lane < left)[:, None] & there
    else:
        return (lane < left)[None, :] & there


@device_function
def counted_of(mask_ptr, lane, left):
    """Return which positions of a tile count by a mask."""
    return tl.load(mask_ptr + lane, mask=lane < left, other=0) != 0


@device_function
def flat_of(
    z,
    FLAT_BELOW: tl.constexpr,
    FLAT_FROM: tl.constexpr,
    FLAT_TO: tl.constexpr,
    FLAT_ABOVE: tl.constexpr,
):
    """Return where a function is flat that is flat below an end at least."""
    flat = z <= FLAT_BELOW
    if FLAT_FROM is not None:
        flat |= (z >= FLAT_FROM) & (z <= FLAT_TO)
    if FLAT_ABOVE is not None:
        flat |= z >= FLAT_ABOVE
    return flat


@device_function
def store_sums(parts_ptr, row, mask, n, seen, sum_h, sum_abs, sum_sq, GRADIENT: tl.constexpr):
    """Write the partial sums of which there are those of gradients too, but for sum h."""
    tl.store(parts_ptr, n.to(tl.float32), mask=mask)
    if GRADIENT:
        tl.store(parts_ptr + row, sum_abs, mask=mask)
        tl.store(parts_ptr + 2 * row, sum_sq, mask=mask)
        tl.store(parts_ptr + 3 * row, (seen - n).to(tl.float32), mask=mask)
    else:
        tl.store(parts_ptr + row, sum_h, mask=mask)
        tl.store(parts_ptr + 2 * row, sum_abs, mask=mask)
        tl.store(parts_ptr + 3 * row, sum_sq, mask=mask)
        tl.store(parts_ptr + 8 * row, (seen - n).to(tl.float32), mask=mask)


@device_function
def store_activations(parts_ptr, row, mask, least, most, zero, flat):
    """Write the partial results that activations have alone."""
    tl.store(parts_ptr + 4 * row, least, mask=mask)
    tl.store(parts_ptr + 5 * row, most, mask=mask)
    tl.store(parts_ptr + 6 * row, zero.to(tl.float32), mask=mask)
    tl.store(parts_ptr + 7 * row, flat.to(tl.float32), mask=mask)
