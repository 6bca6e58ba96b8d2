"""A tensor of any strides as units times positions, without a copy.

Positions are up to three nested dimensions after merging: NCHW is (N, HW), channels_last and
(batch, tokens, channels) are one, a crop of NCHW is (N, H, W). Strides of 0 (expanded) are fine.
"""

from dataclasses import dataclass

from torch import Tensor

from fastplastic.kernels.gpu.launch import vector_width
from fastplastic.kernels.strides import merged, slowest_first

Dimension = tuple[int, int]


@dataclass(frozen=True)
class Layout:
    """Sizes and strides in elements.

    Attributes:
        x: The tensor, or a contiguous copy where four or more dimensions of positions remained.
        units: Number and stride of the units.
        inner: Size and stride of the dimension of positions that makes tiles with the units.
        outer: Number of the other positions.
        middle: Size and stride of the faster one of two other dimensions, (1, 0) if there is one.
        outer_stride: Stride of the slower one.
        units_adjacent: Whether the units are the faster dimension of a tile.
    """

    x: Tensor
    units: Dimension
    inner: Dimension
    outer: int
    middle: Dimension
    outer_stride: int
    units_adjacent: bool

    @property
    def dense(self) -> bool:
        """Whether the faster dimension of a tile has stride 1."""
        return self.fast[1] == 1

    @property
    def fast(self) -> Dimension:
        """Return size and stride of the faster dimension of a tile."""
        return self.units if self.units_adjacent else self.inner

    @property
    def vector(self) -> int:
        """Return how many elements may be read at once everywhere."""
        if not self.dense:
            return 1
        slow = self.inner if self.units_adjacent else self.units
        strides = (slow[1], self.middle[1], self.outer_stride)
        return vector_width(self.x.element_size(), (self.fast[0], *strides))


def layout(x: Tensor, axis: int) -> Layout:
    """Return the layout of a tensor that has elements, with the units along `axis`."""
    dimensions = [(x.shape[d], x.stride(d)) for d in slowest_first(x) if d != axis]
    positions = [(size, stride) for size, stride in merged(dimensions)]
    if len(positions) > 3:
        return layout(x.contiguous(), axis)
    unit = (x.shape[axis], x.stride(axis))
    units_adjacent = unit[0] > 1 and unit[1] == 1
    inner = _inner(positions, units_adjacent)
    others = [dimension for dimension in positions if dimension is not inner]
    others = [(1, 0)] * (2 - len(others)) + others
    (slow, slow_stride), middle = others
    if slow == 1:
        # One other dimension is the outer one.
        slow, slow_stride, middle = middle[0], middle[1], (1, 0)
    return Layout(x, unit, inner, slow * middle[0], middle, slow_stride, units_adjacent)


def _inner(positions: list[Dimension], units_adjacent: bool) -> Dimension:
    adjacent = [dimension for dimension in positions if dimension[1] == 1]
    if adjacent and not units_adjacent:
        return adjacent[0]
    return max(positions, default=(1, 0))
