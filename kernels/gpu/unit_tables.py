"""The tables that describe many tensors to the kernel of activation_stats and gradient_stats.

A tensor is units times positions (`layout.py`). An item is what one program reads: a block of units
and, of the positions, a range of outer indices times a range of inner ones.
"""

import itertools
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastplastic.kernels.gpu import launch
from fastplastic.kernels.gpu.layout import Layout, layout
from fastplastic.kernels.gpu.runtime import Addresses, Filled, send

# How a tensor is read: units next to each other or not, rows that are read wide or not.
NARROW_ADJACENT, ADJACENT, NARROW_PLANES, PLANES, HALF_PLANES = range(5)
TENSOR_COLUMNS, ITEM_COLUMNS, FOLD_COLUMNS = 9, 8, 5


class Form(NamedTuple):
    """Everything about a tensor, but its address, that decides how to read it.

    Attributes:
        shape, strides: Of the tensor.
        axis: Dimension of the units.
        dtype: Of the tensor.
        aligned: Whether its address is a multiple of 16 bytes.
        activation: Name of f, "" for gradients.
        masked: Whether a mask says which positions count.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    axis: int
    dtype: torch.dtype
    aligned: bool
    activation: str
    masked: bool


class Row(NamedTuple):
    """A tensor in the table of tensors, strides in elements."""

    units: int
    middle: int
    unit_stride: int
    inner_stride: int
    middle_stride: int
    outer_stride: int
    # Where its partial sums begin.
    parts: int
    splits: int
    path: int


class Kind(NamedTuple):
    """What makes another variant of the kernel, and so another launch."""

    dtype: torch.dtype
    activation: str
    masked: bool


@dataclass(frozen=True, eq=False)
class UnitTables:
    """The tables of one list of tensors, on the device, and how to launch over them.

    Attributes:
        tensors: int64 [n_tensors, TENSOR_COLUMNS].
        items: int64 [n_items, ITEM_COLUMNS]: tensor, first unit, where its first outer index
            begins, how many until the slower one goes on, how many in all, inner begin and end,
            split.
        launches: First item of each kind and the end of its items.
        folds: int64 [n_folds, FOLD_COLUMNS]: first part, splits, units of the tensor, units of the
            block, column of the output.
        parts: Number of partial sums of one row.
        filled: When they are there.
        addresses: Tables of addresses that were sent.
    """

    tensors: Tensor
    items: Tensor
    launches: dict[Kind, tuple[int, int]]
    folds: Tensor
    parts: int
    filled: Filled
    addresses: Addresses = field(default_factory=Addresses)


@lru_cache(maxsize=4096)
def layout_of(shape: tuple[int, ...], strides: tuple[int, ...], axis: int) -> Layout | None:
    """Return how a tensor is read, None where it must be copied first."""
    return layout(shape, strides, axis)


def maskable(plan: Layout) -> bool:
    """Tell whether a mask over the positions can be read beside a tensor with this layout."""
    return plan.units_adjacent and plan.outer == 1


@lru_cache(maxsize=256)
def tables_for(
    forms: tuple[Form, ...], columns: tuple[int, ...], rows: int, device: torch.device
) -> UnitTables:
    """Return the tables of a list of tensors.

    Args:
        forms: The tensors; all have elements, and none must be copied.
        columns: First column of the output of each.
        rows: Rows of the output.
        device: Where the tables are.
    """
    shares = [_share(form) for form in forms]
    # By a tensor alone, so that its sums are the same beside whichever others it is read.
    splits = [share.split(launch.unit_depth(share.tiles)) for share in shares]
    ends = np.cumsum([own.number * x.units for own, x in zip(splits, shares, strict=True)])
    firsts = (rows * np.array([0, *ends[:-1]])).tolist()
    kinds: dict[Kind, list[NDArray[np.int64]]] = {}
    tensors, folds = [], []
    for i, (form, share, split, first) in enumerate(
        zip(forms, shares, splits, firsts, strict=True)
    ):
        kind = Kind(form.dtype, form.activation, form.masked)
        kinds.setdefault(kind, []).append(_items(i, share, split))
        tensors.append(share.row(first, split.number))
        folds.append(_folds(first, split.number, share.units, columns[i]))
    bounds = [0, *itertools.accumulate(sum(map(len, items)) for items in kinds.values())]
    return UnitTables(
        _sent(np.array(tensors, dtype=np.int64), device),
        _sent(np.concatenate([own for items in kinds.values() for own in items]), device),
        dict(zip(kinds, itertools.pairwise(bounds), strict=True)),
        _sent(np.concatenate(folds), device),
        int(ends[-1]),
        Filled(device),
    )


class _Split(NamedTuple):
    """How positions are dealt out: `outer` indices of `inner` tiles for each item."""

    outer: int
    inner: int
    inner_splits: int
    number: int


class _Share(NamedTuple):
    """A tensor in tiles."""

    plan: Layout
    path: int
    units: int
    step: int
    block: int

    @property
    def blocks(self) -> int:
        """Tiles side by side along the inner positions."""
        return _blocks(self.plan.inner[0], self.step)

    @property
    def tiles(self) -> int:
        """All tiles."""
        return _blocks(self.units, self.block) * self.blocks * self.plan.outer

    def split(self, depth: int) -> _Split:
        """Return items of `depth` to twice as many tiles, where there are so many."""
        outer = _blocks(self.plan.outer, max(1, self.plan.outer * self.blocks // depth))
        inner = self.blocks
        if self.blocks >= 2 * depth:
            outer, inner = 1, _blocks(self.blocks, self.blocks // depth)
        inner_splits = _blocks(self.blocks, inner)
        return _Split(outer, inner, inner_splits, inner_splits * _blocks(self.plan.outer, outer))

    def row(self, parts: int, splits: int) -> Row:
        """Return the row of the table of tensors."""
        plan = self.plan
        strides = (plan.units[1], plan.inner[1], plan.middle[1], plan.outer_stride)
        return Row(self.units, plan.middle[0], *strides, parts, splits, self.path)


def _blocks(size: int, block: int) -> int:
    return -(-size // block)


def _share(form: Form) -> _Share:
    plan = layout_of(form.shape, form.strides, form.axis)
    assert plan is not None and (maskable(plan) or not form.masked), form
    path = _path(plan, form)
    fast = launch.UNIT_ROW_BYTES // form.dtype.itemsize // (2 if path == HALF_PLANES else 1)
    if plan.units_adjacent:
        return _Share(plan, path, plan.units[0], launch.UNIT_SLOW, fast)
    return _Share(plan, path, plan.units[0], fast, launch.UNIT_SLOW)


def _path(plan: Layout, form: Form) -> int:
    whole = launch.VECTOR_BYTES // form.dtype.itemsize
    vector = plan.vector(form.dtype.itemsize) if form.aligned and plan.middle[0] == 1 else 1
    if plan.units_adjacent:
        return ADJACENT if vector == whole else NARROW_ADJACENT
    return {whole: PLANES, whole // 2: HALF_PLANES}.get(vector, NARROW_PLANES)


def _items(tensor: int, share: _Share, split: _Split) -> NDArray[np.int64]:
    """Return rows of the table of items, block of units by block of units."""
    part = np.arange(split.number, dtype=np.int64)
    outer = part // split.inner_splits * split.outer
    inner = part % split.inner_splits * (split.inner * share.step)
    unit = np.arange(0, share.units, share.block, dtype=np.int64)
    rows = np.empty((len(unit), split.number, ITEM_COLUMNS), dtype=np.int64)
    rows[..., 0], rows[..., 1] = tensor, unit[:, None]
    middle, stride = share.plan.middle
    rows[..., 2] = outer // middle * share.plan.outer_stride + outer % middle * stride
    rows[..., 3] = middle - outer % middle
    rows[..., 4] = np.minimum(split.outer, share.plan.outer - outer)
    rows[..., 5] = inner
    rows[..., 6] = np.minimum(inner + split.inner * share.step, share.plan.inner[0])
    rows[..., 7] = part
    return rows.reshape(-1, ITEM_COLUMNS)


def _folds(parts: int, splits: int, units: int, column: int) -> NDArray[np.int64]:
    """Return rows of the table of folds: blocks of units."""
    unit = np.arange(0, units, launch.FOLD_UNITS, dtype=np.int64)
    rows = np.empty((len(unit), FOLD_COLUMNS), dtype=np.int64)
    rows[:, 0], rows[:, 1], rows[:, 2] = parts + unit, splits, units
    rows[:, 3], rows[:, 4] = np.minimum(launch.FOLD_UNITS, units - unit), column + unit
    return rows


def _sent(rows: NDArray[np.int64], device: torch.device) -> Tensor:
    result = torch.empty(rows.shape, dtype=torch.int64, device=device)
    send(rows.ravel().tolist(), result)
    return result
