"""Numba: exact selection of the smallest scores over many weights, without sorting any."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastplastic.kernels.checks import Gradients, check_select, check_selection
from fastplastic.kernels.cpu.elements import (
    BLOCK,
    Block,
    Thresholds,
    compiled,
    fill_selected,
    kernel,
    new_block,
    offset_of,
    thresholds_of,
)
from fastplastic.kernels.cpu.histogram import Histogram
from fastplastic.kernels.cpu.memory import byte_at, next_task
from fastplastic.kernels.cpu.tasks import on_threads
from fastplastic.kernels.elements import (
    MASK,
    Table,
    Walks,
    counted_operands,
    operands_of,
    tasks,
    walks,
)
from fastplastic.kernels.philox import TIES, philox_key
from fastplastic.kernels.selection import Reduce, Selection, TotalHistogram, select_with
from fastplastic.kernels.shards import Shards, sizes_of


def select(
    weights: Sequence[Tensor],
    gradients: Gradients,
    names: Sequence[str],
    count: int,
    *,
    criterion: str = "swr",
    caps: Sequence[int] | None = None,
    seed: int = 0,
    shards: Shards = None,
    reduce: Reduce | None = None,
) -> Selection:
    """Choose the elements with the smallest scores over all weights at once, exactly `count`.

    See `fastplastic.kernels.select`.
    """
    check_select(weights, gradients, names, count, criterion, caps, shards)
    ties = np.array([philox_key(seed, TIES, name) for name in names], dtype=np.uint64)
    sizes = sizes_of(weights, shards)
    walk = walks(counted_operands(criterion, weights, gradients, shards), shards)
    histogram = Histogram(criterion, walk, ties, count, caps or sizes, sum(sizes))
    total = TotalHistogram(histogram, names, sizes, walk.counts, reduce)
    return select_with(total, sizes, names, count, criterion=criterion, caps=caps, seed=seed)


def selection_masks(
    selection: Selection,
    weights: Sequence[Tensor],
    gradients: Gradients,
    *,
    shards: Shards = None,
) -> list[Tensor]:
    """Return which elements of each weight are selected, bool in the shape of the weight.

    See `fastplastic.kernels.selection_masks`.
    """
    check_selection(selection, weights, gradients, shards)
    masks = [torch.empty(weight.shape, dtype=torch.bool) for weight in weights]
    walk = walks(operands_of(selection.criterion, weights, gradients, masks), shards)
    pieces = tasks(walk.counts, torch.get_num_threads())
    on_threads(_mark, thresholds_of(selection), walk, pieces, np.zeros(1, dtype=np.int64))
    return masks


@kernel
def _mark(thresholds: Thresholds, walk: Walks, pieces: Table, turn: Any) -> None:
    """Write the masks."""
    block = new_block()
    t = next_task(turn.ctypes.data)
    while t < len(pieces):
        _mark_task(thresholds, walk, pieces[t], block)
        t = next_task(turn.ctypes.data)


@compiled
def _mark_task(thresholds: Thresholds, walk: Walks, piece: Any, block: Block) -> None:
    w, start, stop = piece
    sizes, strides = walk.sizes[w], walk.strides[w, MASK]
    mask = byte_at(walk.addresses[w, MASK])
    for position in range(start, stop, BLOCK):
        n = min(BLOCK, stop - position)
        fill_selected(thresholds, walk, w, position, n, block)
        for i in range(n):
            mask[offset_of(position + i, sizes, strides)] = block.chosen[i]
