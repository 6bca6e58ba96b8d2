"""Which unit stands at each element of a traced tensor, as integers of the tensor's shape.

Operators that only move elements are executed on these integers, so that reshape, permute, concat,
split and window partitioning need no rules of their own.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fastplastic.graph.nodes import shape_of

# What stands at an element that carries no unit: it depends on the input, or it does not.
DATA = -1
CONST = -2


@dataclass(frozen=True, eq=False)
class Value:
    """What is known of one traced tensor.

    Attributes:
        shape: Its shape.
        ids: int32 tensor of that shape (mostly expanded), or None when no unit is in it.
        const: Without ids: it does not depend on the input.
        pristine: Its units have met no activation function and no branch on the way.
    """

    shape: tuple[int, ...]
    ids: Tensor | None = None
    const: bool = False
    pristine: bool = False

    def filled(self) -> Tensor:
        """Return the ids, with DATA or CONST everywhere where there are none."""
        if self.ids is not None:
            return self.ids
        fill = torch.tensor(CONST if self.const else DATA, dtype=torch.int32)
        return fill.expand(self.shape)


def collapse(ids: Tensor) -> Tensor:
    """Return the same integers with every dimension along which they are constant expanded."""
    small = ids
    for dim in range(ids.dim()):
        if small.shape[dim] > 1:
            first = small.narrow(dim, 0, 1)
            if small.stride(dim) == 0 or bool((small == first).all()):
                small = first
    return small.expand(ids.shape)


def along(ids: Tensor, axis: int) -> Tensor | None:
    """Return the unit at each index of `axis`, or None when it changes along another dimension.

    Constants do not count: a zero-padded border leaves the unit as it is.
    """
    axis %= max(ids.dim(), 1)
    for dim in range(ids.dim()):
        if dim != axis and ids.shape[dim] > 1 and ids.stride(dim) == 0:
            ids = ids.narrow(dim, 0, 1)
    rows = ids.movedim(axis, 0).reshape(ids.shape[axis], -1)
    if rows.numel() == 0:
        return None
    high = rows.amax(1)
    low = torch.where(rows == CONST, high[:, None], rows).amin(1)
    return high if torch.equal(high, low) else None


def distinct(ids: Tensor) -> list[int]:
    """Return the units that stand in `ids`, ascending."""
    units = without_repeats(ids).flatten()
    units = units[units >= 0]
    if not len(units):
        return []
    # Counted, not sorted: there are many more elements than units.
    low = int(units.min())
    found: list[int] = (torch.bincount(units - low).nonzero().flatten() + low).tolist()
    return found


def without_repeats(ids: Tensor) -> Tensor:
    """Return the same integers without the repeats of expanded dimensions."""
    return without_common_repeats(ids)[0]


def without_common_repeats(*tensors: Tensor) -> list[Tensor]:
    """Return tensors of one shape without the dimensions along which all of them are expanded."""
    cut = list(tensors)
    for dim in range(cut[0].dim()):
        if cut[0].shape[dim] > 1 and all(ids.stride(dim) == 0 for ids in cut):
            cut = [ids.narrow(dim, 0, 1) for ids in cut]
    return cut


def reduce_dims(ids: Tensor, dims: Iterable[int]) -> Tensor | None:
    """Return ids with `dims` cut to size 1, or None when units change along them."""
    for dim in dims:
        high = ids.amax(dim, keepdim=True)
        if not bool(((ids == high) | (ids == CONST)).all()):
            return None
        ids = high
    return ids


def on_axis(units: Tensor, axis: int, shape: tuple[int, ...], pristine: bool = False) -> Value:
    """Return a value that has `units` along `axis` and is constant along every other dimension."""
    view = [1] * len(shape)
    view[axis] = len(units)
    return Value(shape, units.reshape(view).expand(shape), pristine=pristine)


def values_in(args: Any) -> list[Value]:
    """Return every `Value` in nested arguments."""
    if isinstance(args, Value):
        return [args]
    if isinstance(args, (list, tuple)):
        return [value for arg in args for value in values_in(arg)]
    return []


def plain(node: Node, const: bool = False) -> Any:
    """Return the output of `node` without units."""
    out = node.meta.get("val")
    if isinstance(out, (list, tuple)):
        return [Value(tuple(getattr(item, "shape", ())), None, const) for item in out]
    return Value(shape_of(node), None, const)
