"""How a program of activation_stats or gradient_stats walks through its share of a tensor.

A tile is [positions, units] where units lie next to each other in memory and [units, positions]
elsewhere, so that its last dimension is the fast one. A program owns some units and, of the
positions, a range of outer indices times a range of inner ones.
"""

from typing import Any, NamedTuple

import triton.language as tl
from torch import Tensor

from fastplastic.kernels.gpu import launch
from fastplastic.kernels.gpu.layout import layout
from fastplastic.kernels.gpu.runtime import device_function


class Tiles(NamedTuple):
    """How to launch stage one.

    Attributes:
        grid: Blocks of units, splits of positions.
        arguments: What the kernels take by name, the tensor among it.
    """

    grid: tuple[int, int]
    arguments: dict[str, Any]


def tiles(x: Tensor, axis: int) -> Tiles:
    """Return how to read a tensor that has elements, with the units along `axis`."""
    plan = layout(x.detach(), axis)
    (units, unit_stride), (inner, inner_stride) = plan.units, plan.inner
    tile = launch.stats_tile(units, inner, x.element_size(), plan.units_adjacent)
    split = launch.stats_split(tile, units, inner, plan.outer)
    grid = (split.unit_blocks, split.splits)
    return Tiles(
        grid,
        {
            "x_ptr": plan.x,
            "units": units,
            "inner": inner,
            "outer": plan.outer,
            "middle": plan.middle[0],
            "unit_stride": unit_stride,
            "inner_stride": inner_stride,
            "middle_stride": plan.middle[1],
            "outer_stride": plan.outer_stride,
            "outer_share": split.outer,
            "inner_blocks": split.blocks,
            "inner_splits": split.inner_splits,
            "UNITS_ADJACENT": plan.units_adjacent,
            "DENSE": plan.dense,
            "NESTED": plan.middle[0] > 1,
            "VECTOR": plan.vector,
            "BLOCK_UNITS": tile.units,
            "BLOCK_POSITIONS": tile.positions,
            **launch.OPTIONS,
        },
    )


@device_function
def share_of(split, share, size):
    """Return the range of indices that a split owns."""
    return split * share, tl.minimum((split + 1) * share, size)


@device_function
def start_of(index, middle, middle_stride, outer_stride, NESTED: tl.constexpr):
    """Return the offset of an outer index, which may be two dimensions."""
    if NESTED:
        return (index // middle) * outer_stride + (index % middle) * middle_stride
    else:
        return index * outer_stride


@device_function
def offsets_of(unit, lane, unit_stride, inner_stride, UNITS_ADJACENT: tl.constexpr):
    """Return the int64 offsets of a tile."""
    along_units, along_lanes = unit.to(tl.int64) * unit_stride, lane.to(tl.int64) * inner_stride
    if UNITS_ADJACENT:
        return along_lanes[:, None] + along_units[None, :]
    else:
        return along_units[:, None] + along_lanes[None, :]


@device_function
def inside_of(unit, position, units, inner, UNITS_ADJACENT: tl.constexpr):
    """Return where a tile lies inside the tensor."""
    if UNITS_ADJACENT:
        return (position < inner)[:, None] & (unit < units)[None, :]
    else:
        return (unit < units)[:, None] & (position < inner)[None, :]


@device_function
def told(
    units,
    inner,
    unit_stride,
    inner_stride,
    UNITS_ADJACENT: tl.constexpr,
    DENSE: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Return sizes and strides so that the compiler knows which are 1 or multiples of VECTOR."""
    if UNITS_ADJACENT:
        fast = 1 if DENSE else unit_stride
        return multiple(units, VECTOR), inner, fast, multiple(inner_stride, VECTOR)
    else:
        fast = 1 if DENSE else inner_stride
        return units, multiple(inner, VECTOR), multiple(unit_stride, VECTOR), fast


@device_function
def multiple(number, VECTOR: tl.constexpr):
    """Return the number, which VECTOR divides, so that the compiler knows: it reads wide then."""
    return number // VECTOR * VECTOR
