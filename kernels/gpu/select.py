"""Exact selection of the smallest scores over many weights by histograms, on a GPU.

    select           the `count` elements with the smallest (key, word, weight, element); the key is
                     the bit pattern of the float32 score, the word Philox word 0 of the element
    selection_masks  which elements those are, bool in the shape of each weight

What to count and what it means is in `selection.py`, how it is counted in `histogram.py`.
"""

from collections.abc import Sequence

import torch
import triton.language as tl
from torch import Tensor

from fastplastic.kernels.checks import Gradients, check_select, check_selection
from fastplastic.kernels.elements import counted_operands, operands_of
from fastplastic.kernels.gpu import launch
from fastplastic.kernels.gpu.elements import (
    MASK,
    N_CHOICE,
    N_TASK,
    choice_table,
    chosen_of,
    element_of,
    elements,
    keys_of,
    offset_of,
    pointer_of,
    range_of,
    signed,
)
from fastplastic.kernels.gpu.histogram import GpuHistogram
from fastplastic.kernels.gpu.runtime import TYPES, device_function, kernel, launching
from fastplastic.kernels.philox import TIES, philox_key
from fastplastic.kernels.scores import SCORES
from fastplastic.kernels.selection import (
    EIGHT_BITS,
    Reduce,
    Selection,
    TotalHistogram,
    select_with,
)
from fastplastic.kernels.shards import Shards, sizes_of


@device_function
def _mark(
    weight_ptr,
    task_ptr,
    choice_ptr,
    W_POWER: tl.constexpr,
    DW_POWER: tl.constexpr,
    W_TYPE: tl.constexpr,
    DW_TYPE: tl.constexpr,
    DEPTH: tl.constexpr,
    DENSE: tl.constexpr,
    SHARDED: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the mask of a task."""
    begin, end = range_of(task_ptr, BLOCK, VECTOR, DENSE)
    mask_ptr = pointer_of(weight_ptr, MASK, tl.int8, DENSE)
    for first in range(begin, end, BLOCK):
        position = first + tl.arange(0, BLOCK).to(tl.int64)
        inside = position < end
        key, eligible = keys_of(
            weight_ptr, position, inside, W_POWER, DW_POWER, W_TYPE, DW_TYPE, DEPTH, DENSE
        )
        element = element_of(weight_ptr, position, DEPTH, DENSE, SHARDED)
        chosen = eligible & chosen_of(choice_ptr, key, element)
        offset = offset_of(weight_ptr, position, MASK, DEPTH, DENSE)
        tl.store(mask_ptr + offset, chosen.to(tl.int8), mask=inside)


@kernel
def _mask_kernel(
    weights_ptr,
    tasks_ptr,
    choices_ptr,
    weight_columns: tl.int64,
    first_task: tl.int64,
    W_POWER: tl.constexpr,
    DW_POWER: tl.constexpr,
    W_TYPE: tl.constexpr,
    DW_TYPE: tl.constexpr,
    DEPTH: tl.constexpr,
    SHARDED: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write which elements are selected.

    This program owns one task, a range of elements of one weight: grid (tasks of a launch,).

    Args:
        weights_ptr: int64 [n_weights, weight_columns], contiguous, as in `_histogram_kernel`; the
            masks, one byte for each element, are written.
        tasks_ptr: int64 [n_tasks, 3], contiguous: weight, first position, end.
        choices_ptr: int64 [n_weights, 4], contiguous: thresholds of key, word and element, and the
            Philox key of the words.
        weight_columns: Columns of the first table.
        first_task: Task of program 0.
        W_POWER: Power of the weight in the score.
        DW_POWER: Power of the gradient in the score.
        W_TYPE: Dtype of the weights of this launch.
        DW_TYPE: Dtype of their gradients.
        DEPTH: Number of dimensions of a walk.
        SHARDED: Whether any of the weights is a part of one.
        VECTOR: Elements that are read at once where all is dense.
        BLOCK: Elements that are read at once by the program.
    """
    task_ptr = tasks_ptr + (first_task + tl.program_id(0)) * N_TASK
    weight = tl.load(task_ptr)
    weight_ptr = weights_ptr + weight * weight_columns
    choice_ptr = choices_ptr + weight * N_CHOICE
    if tl.load(weight_ptr + 3) != 0:
        _mark(
            weight_ptr, task_ptr, choice_ptr, W_POWER, DW_POWER, W_TYPE, DW_TYPE, DEPTH, True,
            SHARDED, VECTOR, BLOCK,
        )  # fmt: skip
    else:
        _mark(
            weight_ptr, task_ptr, choice_ptr, W_POWER, DW_POWER, W_TYPE, DW_TYPE, DEPTH, False,
            SHARDED, 1, BLOCK,
        )  # fmt: skip


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
    sizes = sizes_of(weights, shards)
    ties = [signed(philox_key(seed, TIES, name)) for name in names]
    operands = counted_operands(criterion, weights, gradients, shards)
    held = [weight.numel() for weight, _, _ in operands]
    histogram = GpuHistogram(criterion, operands, ties, shards)
    total = TotalHistogram(histogram, names, sizes, held, reduce)
    return select_with(
        total, sizes, names, count, criterion=criterion, caps=caps, seed=seed, digits=EIGHT_BITS
    )


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
    masks = [torch.empty(w.shape, dtype=torch.bool, device=w.device) for w in weights]
    if not any(weight.numel() for weight in weights):
        return masks
    device = weights[0].device
    score = SCORES[selection.criterion]
    with launching(device):
        operands = operands_of(selection.criterion, weights, gradients, masks)
        found = elements(operands, shards)
        choices = choice_table(selection, device)
        for kind, (begin, end) in found.launches.items():
            _mask_kernel[(end - begin,)](
                found.weights,
                found.tasks,
                choices,
                found.weights.shape[1],
                begin,
                W_POWER=score.w,
                DW_POWER=score.dw,
                W_TYPE=TYPES[kind.w_dtype],
                DW_TYPE=TYPES[kind.dw_dtype],
                DEPTH=found.depth,
                SHARDED=found.sharded,
                VECTOR=kind.vector,
                BLOCK=launch.ELEMENT_BLOCK,
                **launch.OPTIONS,
            )
    return masks
