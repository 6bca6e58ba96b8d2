"""Places in tensors: rows, columns, single elements, in indices of whole tensors.

A process that holds a part of a tensor asks for what is `within` that part.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastplastic.kernels import Law
from fastplastic.model import Lines, Part


@dataclass(frozen=True, eq=False)
class Region:
    """Some rows or columns of a tensor.

    Attributes:
        name: Name of the parameter or buffer.
        index: What to index it with.
        groups: Into how many parts its first dimension is split before that (grouped convolution).
    """

    name: str
    index: tuple[Tensor | slice, ...]
    groups: int = 1

    @property
    def column_dim(self) -> int:
        """The dimension that runs over columns, of a region of columns."""
        return 0 if isinstance(self.index[0], Tensor) and self.groups == 1 else 1

    @property
    def columns(self) -> tuple[Tensor, Tensor]:
        """Group and number in it of each column, of a region of columns."""
        lists = [part for part in self.index if isinstance(part, Tensor)]
        return lists[0] if self.groups > 1 else torch.tensor(0), lists[-1]

    def view(self, tensor: Tensor) -> Tensor:
        """Return the view of the tensor that `index` is for."""
        if self.groups == 1:
            return tensor
        return tensor.view(self.groups, -1, *tensor.shape[1:])

    def within(self, part: Part) -> "Region":
        """Return the same in the part of the tensor that this process holds."""
        if part.whole:
            return self
        if self.groups > 1:
            return Region(self.name, _pairs_within(self, part))
        sides = zip(self.index, part.offsets, part.sizes, strict=False)
        return Region(self.name, tuple(_side_within(*side) for side in sides))

    def size(self, tensor: Tensor) -> int:
        """Return the number of elements of the whole tensor in the region."""
        shape = list(tensor.shape)
        if self.groups > 1:
            shape = [self.groups, shape[0] // self.groups, *shape[1:]]
        indices = [(dim, part) for dim, part in enumerate(self.index) if isinstance(part, Tensor)]
        for dim, _ in indices:
            shape[dim] = 1
        # Several index tensors name elements together, not a grid.
        return math.prod(shape) * len(indices[0][1])


def _side_within(index: Tensor | slice, begin: int, size: int) -> Tensor | slice:
    """Return which of some indices of a dimension are in a stretch of it, counted from there."""
    if isinstance(index, slice):
        return index
    return index[(index >= begin) & (index < begin + size)] - begin


def _pairs_within(region: Region, part: Part) -> tuple[Tensor, Tensor]:
    """Return (row, column) of each pair in a part, of columns of the groups of a weight."""
    groups, _, columns = region.index
    assert isinstance(groups, Tensor) and isinstance(columns, Tensor)
    # A part may begin and end inside of a group.
    chosen = torch.zeros(region.groups, part.shape[1], dtype=torch.bool)
    chosen[groups, columns] = True
    rows = torch.arange(part.offsets[0], part.offsets[0] + part.sizes[0])
    group_of_row = rows // (part.shape[0] // region.groups)
    begin, size = part.offsets[1], part.sizes[1]
    row, column = chosen[group_of_row, begin : begin + size].nonzero(as_tuple=True)
    return row, column


@dataclass(frozen=True, eq=False)
class Elements:
    """Some elements of a tensor, one by one.

    Attributes:
        name: Name of the parameter.
        mask: bool, in the shape of the part of the parameter that this process holds, on the CPU.
        count: How many they are in all of the parameter.
    """

    name: str
    mask: Tensor
    count: int

    def within(self, part: Part) -> "Elements":
        """Return the same: a mask is of the part that this process holds."""
        return self

    def size(self, tensor: Tensor) -> int:
        """Return the number of elements of the whole tensor."""
        return self.count


Where = Region | Elements


@dataclass(frozen=True, eq=False)
class Draw:
    """Elements that are drawn afresh.

    Attributes:
        where: Where they are.
        law: From which law each is drawn.
        norm: The norm that each column of a region is given then; None to leave it as drawn.
    """

    where: Where
    law: Law
    norm: float | None = None


@dataclass(frozen=True, eq=False)
class FillWrite:
    """A region that becomes one value."""

    region: Region
    value: float


def columns_of(region: Region, weight: Tensor) -> Lines:
    """Return all columns of a weight, of which a region has some."""
    return Lines(region.name, weight, region.column_dim, region.groups)


def region_mask(region: Region, tensor: Tensor) -> Tensor:
    """Return a mask in the shape of the tensor, expanded where that can be."""
    sizes = list(region.view(tensor).shape)
    for dim in range(len(sizes)):
        listed = dim < len(region.index) and isinstance(region.index[dim], Tensor)
        sizes[dim] = sizes[dim] if listed else 1
    mask = torch.zeros(sizes, dtype=torch.bool)
    mask[region.index] = True
    mask = mask.to(tensor.device)
    if region.groups == 1:
        return mask.expand(tensor.shape)
    groups, columns = mask.shape[0], mask.shape[2]
    rows = mask.expand(groups, tensor.shape[0] // groups, columns, *mask.shape[3:])
    return rows.reshape(tensor.shape[0], columns, *mask.shape[3:]).expand(tensor.shape)


def shift_within(shift: Tensor, part: Part) -> Tensor:
    """Return what of a table, one number for each unit, is in a part of a bias."""
    return shift[part.offsets[0] : part.offsets[0] + part.sizes[0]]


def merged_fills(fills: Iterable[FillWrite]) -> Iterator[FillWrite]:
    """Yield the same writes with those together that fill one tensor along one dimension.

    A layer of a DenseNet reads the units of dozens of others.
    """
    by_value: dict[float, list[Region]] = {}
    for fill in fills:
        by_value.setdefault(fill.value, []).append(fill.region)
    for value, regions in by_value.items():
        yield from (FillWrite(region, value) for region in merged(regions))


def merged(regions: Iterable[Region]) -> Iterator[Region]:
    """Yield regions that cover the same, one for each tensor and way of indexing it."""
    alike: dict[tuple[str, int, int], list[Region]] = {}
    for region in regions:
        alike.setdefault((region.name, region.groups, len(region.index)), []).append(region)
    for (name, parts, _), same in alike.items():
        # For each dimension, all have a list of indices or all take the whole of it.
        dims = zip(*(region.index for region in same), strict=True)
        yield Region(name, tuple(map(_joined, dims)), parts)


def _joined(parts: tuple[Tensor | slice, ...]) -> Tensor | slice:
    """Return the indices of several regions in one dimension, one after the other."""
    lists = [part for part in parts if isinstance(part, Tensor)]
    return torch.cat(lists) if lists else parts[0]
