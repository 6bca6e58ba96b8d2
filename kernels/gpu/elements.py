"""What the Triton kernels of `select` and `resample_` share: reading elements of many weights.

A weight, its gradient and its mask are walked through together (see `elements.py` in the folder
above). A program owns a task: a range of positions of one walk. The table of a weight tells the
addresses, whether the walk is dense (all operands are one stretch, aligned: a position is an offset
in each, and they are read wide), then the sizes, operand by operand the strides of its dimensions,
and the number of the first element. But for shards of columns, positions of a dense walk count
elements.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import triton.language as tl
from torch import Tensor

from fastplastic.kernels.elements import Operands, Table, walks
from fastplastic.kernels.gpu import launch
from fastplastic.kernels.gpu.runtime import check_devices, device_function, table
from fastplastic.kernels.philox import TIES, philox_key
from fastplastic.kernels.selection import Selection
from fastplastic.kernels.shards import Shards

# Columns of the table of a weight before its sizes: addresses, dense.
_N_HEAD = tl.constexpr(4)
# Columns of a task, and of the thresholds of a weight.
N_TASK, N_CHOICE = tl.constexpr(3), tl.constexpr(4)
# Columns of the strides.
WEIGHT, GRADIENT, MASK, ELEMENT = (tl.constexpr(operand) for operand in range(4))


class Dtypes(NamedTuple):
    """Dtypes of a weight and its gradient: what makes another variant of a kernel."""

    w_dtype: torch.dtype
    dw_dtype: torch.dtype

    @property
    def vector(self) -> int:
        """Return how many elements are read at once."""
        return launch.vector_width(max(self.w_dtype.itemsize, self.dw_dtype.itemsize))


@dataclass(frozen=True, eq=False)
class ElementTables:
    """Weights as the kernels take them.

    Attributes:
        weights: int64 [n_weights, ...], the tables.
        tasks: int64 [n_tasks, 3]: weight, first position, end.
        launches: First task of each kind and the end of its tasks.
        ranges: int64 [n_weights, 2], the first task of each weight and the end of its tasks.
        depth: Number of dimensions of the walks.
        sharded: Whether any of the weights is a part of one.
    """

    weights: Tensor
    tasks: Tensor
    launches: dict[Dtypes, tuple[int, int]]
    ranges: Tensor
    depth: int
    sharded: bool


def elements(operands: Sequence[Operands], shards: Shards = None) -> ElementTables:
    """Describe weights; the caller keeps the tensors alive.

    Args:
        operands: Weight, gradient or None, mask or None, of one shape, for each weight, at least
            one, all on one device.
        shards: Which part of a weight each is.

    Raises:
        ValueError: They are not on one device.
    """
    device = operands[0][0].device
    check_devices((tensor for tensors in operands for tensor in tensors), device)
    walk = walks(operands, shards)
    pairs = zip(operands, shards or [None] * len(operands), strict=True)
    sharded = any(part is not None and part.shape != tensors[0].shape for tensors, part in pairs)
    counts = walk.counts.tolist()
    kinds = [Dtypes(w.dtype, w.dtype if dw is None else dw.dtype) for w, dw, _ in operands]
    size = launch.element_task(sum(counts))
    rows: list[tuple[int, ...]] = []
    tasks: list[tuple[int, int, int]] = []
    launches: dict[Dtypes, tuple[int, int]] = {}
    ranges = [(0, 0)] * len(counts)
    for kind in dict.fromkeys(kinds):
        begin = len(tasks)
        for i in (i for i, own in enumerate(kinds) if own == kind):
            first = len(tasks)
            tasks += [(i, at, min(at + size, counts[i])) for at in range(0, counts[i], size)]
            ranges[i] = (first, len(tasks))
        launches[kind] = (begin, len(tasks))
    for i, kind in enumerate(kinds):
        addresses = walk.addresses[i].tolist()
        # Where the kernels count the elements of shards by themselves, those need not be dense.
        read = walk.strides[i, : ELEMENT.value] if sharded else walk.strides[i]
        dense = _is_dense(walk.sizes[i], read) and counts[i] % kind.vector == 0
        dense &= all(at % 16 == 0 for at in addresses)
        sizes, strides = walk.sizes[i].tolist(), walk.strides[i].ravel().tolist()
        rows.append((*addresses, int(dense), *sizes, *strides, int(walk.firsts[i])))
    return ElementTables(
        table(rows, len(rows[0]), device),
        table(tasks, N_TASK.value, device),
        {kind: (begin, end) for kind, (begin, end) in launches.items() if end > begin},
        table(ranges, 2, device),
        walk.sizes.shape[1],
        sharded,
    )


def _is_dense(sizes: Table, strides: Table) -> bool:
    """Tell whether a walk of some sizes is through one stretch in each operand."""
    steps = np.append(sizes[:0:-1].cumprod()[::-1], 1)
    return bool(((strides == steps) | (sizes == 1)).all())


def signed(number: int) -> int:
    """Return an unsigned 64-bit number as the signed one with its bits."""
    return number - (1 << 64) if number >> 63 else number


def choice_table(selection: Selection, device: torch.device) -> Tensor:
    """Return the thresholds of each weight and the Philox key of its words."""
    ties = (signed(philox_key(selection.seed, TIES, name)) for name in selection.names)
    rows = list(zip(selection.keys, selection.words, selection.elements, ties, strict=True))
    return table(rows, N_CHOICE.value, device)


@device_function
def range_of(task_ptr, BLOCK: tl.constexpr, VECTOR: tl.constexpr, DENSE: tl.constexpr):
    """Return the first position of a task and its end, with what divides them."""
    end = tl.load(task_ptr + 2)
    if DENSE:
        end = end // VECTOR * VECTOR
    return tl.load(task_ptr + 1) // BLOCK * BLOCK, end


@device_function
def offset_of(
    weight_ptr, position, OPERAND: tl.constexpr, DEPTH: tl.constexpr, DENSE: tl.constexpr
):
    """Return where positions of a walk are in an operand, in elements."""
    if DENSE:
        return position
    else:
        stride_ptr = weight_ptr + _N_HEAD + (1 + OPERAND) * DEPTH
        offset = position * 0
        rest = position
        for i in tl.static_range(DEPTH - 1):
            size = tl.load(weight_ptr + _N_HEAD + (DEPTH - 1 - i))
            offset += rest % size * tl.load(stride_ptr + (DEPTH - 1 - i))
            rest = rest // size
        return offset + rest * tl.load(stride_ptr)


@device_function
def element_of(
    weight_ptr, position, DEPTH: tl.constexpr, DENSE: tl.constexpr, SHARDED: tl.constexpr
):
    """Return the numbers of the elements at positions of a walk."""
    if SHARDED:
        first = tl.load(weight_ptr + _N_HEAD + (2 + ELEMENT) * DEPTH)
        return first + offset_of(weight_ptr, position, ELEMENT, DEPTH, False)
    else:
        return offset_of(weight_ptr, position, ELEMENT, DEPTH, DENSE)


@device_function
def pointer_of(weight_ptr, OPERAND: tl.constexpr, TYPE: tl.constexpr, DENSE: tl.constexpr):
    """Return the address of an operand."""
    pointer = tl.load(weight_ptr + OPERAND).to(tl.pointer_type(TYPE))
    if DENSE:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@device_function
def size_of(
    weight_ptr,
    position,
    inside,
    OPERAND: tl.constexpr,
    TYPE: tl.constexpr,
    DEPTH: tl.constexpr,
    DENSE: tl.constexpr,
):
    """Return the absolute values of an operand in float32, NaN outside."""
    pointer = pointer_of(weight_ptr, OPERAND, TYPE, DENSE)
    offset = offset_of(weight_ptr, position, OPERAND, DEPTH, DENSE)
    return tl.abs(tl.load(pointer + offset, mask=inside, other=float("nan")).to(tl.float32))


@device_function
def keys_of(
    weight_ptr,
    position,
    inside,
    W_POWER: tl.constexpr,
    DW_POWER: tl.constexpr,
    W_TYPE: tl.constexpr,
    DW_TYPE: tl.constexpr,
    DEPTH: tl.constexpr,
    DENSE: tl.constexpr,
):
    """Return the keys of positions, int32, and which are eligible."""
    if W_POWER + DW_POWER == 0:
        return (position * 0).to(tl.int32), inside
    else:
        score = tl.full(position.shape, 1.0, tl.float32)
        if W_POWER > 0:
            size = size_of(weight_ptr, position, inside, WEIGHT, W_TYPE, DEPTH, DENSE)
            for _ in tl.static_range(W_POWER):
                score *= size
        if DW_POWER > 0:
            size = size_of(weight_ptr, position, inside, GRADIENT, DW_TYPE, DEPTH, DENSE)
            for _ in tl.static_range(DW_POWER):
                score *= size
        key = score.to(tl.int32, bitcast=True)
        return key, inside & (score >= 0.0)


@device_function
def words_of(key, element):
    """Return Philox word 0 of elements, uint32."""
    low, high = element.to(tl.uint32), (element >> 32).to(tl.uint32)
    word, _, _, _ = tl.philox(key, low, high, low * 0, low * 0)
    return word


@device_function
def digit_of(number, shift, bits, prefix):
    """Return a digit of numbers, int32, and which of them have the prefix before it."""
    # Both shifts together may be by all bits of the type, which one shift must not be.
    rest = number >> shift.to(number.dtype)
    shares = (rest >> bits.to(number.dtype)) == prefix.to(number.dtype)
    return (rest & ((1 << bits) - 1).to(number.dtype)).to(tl.int32), shares


@device_function
def chosen_of(choice_ptr, key, element):
    """Return which eligible elements are selected."""
    last_key, last_word = tl.load(choice_ptr), tl.load(choice_ptr + 1)
    word = words_of(tl.load(choice_ptr + 3), element).to(tl.int64)
    tied = (word < last_word) | ((word == last_word) & (element <= tl.load(choice_ptr + 2)))
    return (key < last_key) | ((key == last_key) & tied)
