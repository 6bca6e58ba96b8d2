"""A tensor of any strides as units times positions, without a copy.

Positions are up to three nested dimensions after merging: NCHW is (N, HW), channels_last and
(batch, tokens, channels) are one, a crop of NCHW is (N, H, W). Strides of 0 (expanded) are fine.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from fastplastic.kernels.gpu.launch import vector_width
from fastplastic.kernels.strides import merged

Dimension = tuple[int, int]


@dataclass(frozen=True)
class Layout:
    """Sizes and strides in elements.

    Attributes:
        units: Number and stride of the units.
        inner: Size and stride of the dimension of positions that makes tiles with the units.
        outer: Number of the other positions.
        middle: Size and stride of the faster one of two other dimensions, (1, 0) if there is one.
        outer_stride: Stride of the slower one.
        units_adjacent: Whether the units are the faster dimension of a tile.
    """

    units: Dimension
    inner: Dimension
    outer: int
    middle: Dimension
    outer_stride: int
    units_adjacent: bool

    @property
    def fast(self) -> Dimension:
        """Return size and stride of the faster dimension of a tile."""
        return self.units if self.units_adjacent else self.inner

    def vector(self, itemsize: int) -> int:
        """Return how many elements of so many bytes may be read at once everywhere."""
        size, stride = self.fast
        if stride != 1:
            return 1
        slow = self.inner if self.units_adjacent else self.units
        return vector_width(itemsize, (size, slow[1], self.middle[1], self.outer_stride))


def layout(shape: Sequence[int], strides: Sequence[int], axis: int) -> Layout | None:
    """Return the layout of a tensor that has elements, with the units along `axis`.

    None where four or more dimensions of positions remain: then it must be copied.
    """
    slowest_first = sorted(range(len(shape)), key=strides.__getitem__, reverse=True)
    dimensions = [(shape[d], strides[d]) for d in slowest_first if d != axis]
    positions = [(size, stride) for size, stride in merged(dimensions)]
    if len(positions) > 3:
        return None
    unit = (shape[axis], strides[axis])
    units_adjacent = unit[0] > 1 and unit[1] == 1
    inner = _inner(positions, units_adjacent)
    others = [dimension for dimension in positions if dimension is not inner]
    others = [(1, 0)] * (2 - len(others)) + others
    (slow, slow_stride), middle = others
    if slow == 1:
        # One other dimension is the outer one.
        slow, slow_stride, middle = middle[0], middle[1], (1, 0)
    return Layout(unit, inner, slow * middle[0], middle, slow_stride, units_adjacent)


def _inner(positions: list[Dimension], units_adjacent: bool) -> Dimension:
    adjacent = [dimension for dimension in positions if dimension[1] == 1]
    if adjacent and not units_adjacent:
        return adjacent[0]
    return max(positions, default=(1, 0))
