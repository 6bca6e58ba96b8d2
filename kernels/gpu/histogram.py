"""The histograms by which `select` finds its thresholds, on a GPU.

Stage one makes the scores in registers and writes the histogram of each task, int32 [n_tasks, 256];
stage two adds them up for each weight, int64 [n_weights, 256]. That goes to the host, added up over
processes where there are several: every pass waits for the GPU once.
"""

import torch
import triton.language as tl
from torch import Tensor

from fastplastic.kernels.elements import Operands
from fastplastic.kernels.gpu import launch
from fastplastic.kernels.gpu.elements import (
    N_TASK,
    ElementTables,
    digit_of,
    element_of,
    elements,
    keys_of,
    range_of,
    words_of,
)
from fastplastic.kernels.gpu.runtime import (
    TYPES,
    device_function,
    kernel,
    launching,
    scratch,
    table,
)
from fastplastic.kernels.scores import SCORES
from fastplastic.kernels.selection import EIGHT_BITS, Query
from fastplastic.kernels.shards import Shards

# Columns of the table of a query: prefix, key, word, Philox key.
_N_QUERY = tl.constexpr(4)
BINS = 1 << EIGHT_BITS.element


@device_function
def _count(
    weight_ptr,
    task_ptr,
    query_ptr,
    shift,
    bits,
    NUMBER: tl.constexpr,
    W_POWER: tl.constexpr,
    DW_POWER: tl.constexpr,
    W_TYPE: tl.constexpr,
    DW_TYPE: tl.constexpr,
    DEPTH: tl.constexpr,
    DENSE: tl.constexpr,
    SHARDED: tl.constexpr,
    VECTOR: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Return the histogram of a task."""
    begin, end = range_of(task_ptr, BLOCK, VECTOR, DENSE)
    prefix = tl.load(query_ptr)
    last_key, last_word = tl.load(query_ptr + 1), tl.load(query_ptr + 2)
    philox = tl.load(query_ptr + 3)
    counts = tl.zeros((BINS,), tl.int32)
    for first in range(begin, end, BLOCK):
        lane = tl.arange(0, BLOCK)
        position, inside = first + lane.to(tl.int64), lane < (end - first).to(tl.int32)
        key, counted = keys_of(
            weight_ptr, position, inside, W_POWER, DW_POWER, W_TYPE, DW_TYPE, DEPTH, DENSE
        )
        if NUMBER == "key":
            digit, shares = digit_of(key, shift, bits, prefix)
            counts = _added(counts, digit, counted & shares, BINS)
        else:
            if W_POWER + DW_POWER > 0:
                counted &= key == last_key.to(tl.int32)
            # Few keys are equal: words take longer than all else.
            if tl.max(counted.to(tl.int32)) > 0:
                element = element_of(weight_ptr, position, DEPTH, DENSE, SHARDED)
                word = words_of(philox, element)
                if NUMBER == "word":
                    digit, shares = digit_of(word, shift, bits, prefix)
                else:
                    counted &= word == last_word.to(tl.uint32)
                    digit, shares = digit_of(element, shift, bits, prefix)
                counts = _added(counts, digit, counted & shares, BINS)
    return counts


@device_function
def _added(counts, digit, counted, BINS: tl.constexpr):
    """Return the counts with those of a block: of none, mostly, from the third digit on."""
    if tl.max(counted.to(tl.int32)) > 0:
        counts += tl.histogram(digit, BINS, mask=counted)
    return counts


@kernel
def _histogram_kernel(
    weights_ptr,
    tasks_ptr,
    queries_ptr,
    counts_ptr,
    weight_columns: tl.int64,
    first_task: tl.int64,
    shift: tl.int64,
    bits: tl.int64,
    NUMBER: tl.constexpr,
    W_POWER: tl.constexpr,
    DW_POWER: tl.constexpr,
    W_TYPE: tl.constexpr,
    DW_TYPE: tl.constexpr,
    DEPTH: tl.constexpr,
    SHARDED: tl.constexpr,
    VECTOR: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Count the digits of the elements that a query asks for.

    This program owns one task, a range of elements of one weight: grid (tasks of a launch,).

    Args:
        weights_ptr: int64 [n_weights, weight_columns], contiguous: addresses of weight, gradient
            and mask, whether all is dense, sizes, strides, first element; see `elements.py`.
        tasks_ptr: int64 [n_tasks, 3], contiguous: weight, first position, end.
        queries_ptr: int64 [n_weights, 4], contiguous: prefix (-1 leaves it out), key, word and
            Philox key of the weight.
        counts_ptr: int32 [n_tasks, BINS], contiguous; the rows of tasks that are not left out are
            written.
        weight_columns: Columns of the first table.
        first_task: Task of program 0.
        shift: Bits to the right of the digit.
        bits: Bits of the digit.
        NUMBER: What is counted: "key", "word" or "element".
        W_POWER: Power of the weight in the score.
        DW_POWER: Power of the gradient in the score.
        W_TYPE: Dtype of the weights of this launch.
        DW_TYPE: Dtype of their gradients.
        DEPTH: Number of dimensions of a walk.
        SHARDED: Whether any of the weights is a part of one.
        VECTOR: Elements that are read at once where all is dense.
        BINS: 256.
        BLOCK: Elements that are counted at once.
    """
    task = first_task + tl.program_id(0)
    task_ptr = tasks_ptr + task * N_TASK
    weight = tl.load(task_ptr)
    weight_ptr = weights_ptr + weight * weight_columns
    query_ptr = queries_ptr + weight * _N_QUERY
    count_ptr = counts_ptr + task * BINS + tl.arange(0, BINS)
    # What is left out is not read by the host.
    if tl.load(query_ptr) >= 0:
        if tl.load(weight_ptr + 3) != 0:
            counts = _count(
                weight_ptr, task_ptr, query_ptr, shift, bits, NUMBER, W_POWER, DW_POWER,
                W_TYPE, DW_TYPE, DEPTH, True, SHARDED, VECTOR, BINS, BLOCK,
            )  # fmt: skip
            tl.store(count_ptr, counts)
        else:
            counts = _count(
                weight_ptr, task_ptr, query_ptr, shift, bits, NUMBER, W_POWER, DW_POWER,
                W_TYPE, DW_TYPE, DEPTH, False, SHARDED, 1, BINS, BLOCK,
            )  # fmt: skip
            tl.store(count_ptr, counts)


@kernel
def _add_kernel(
    ranges_ptr,
    counts_ptr,
    total_ptr,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add up the histograms of the tasks of each weight.

    This program owns BLOCK bins of one weight: grid (weights, blocks of bins).

    Args:
        ranges_ptr: int64 [n_weights, 2], contiguous: first task of a weight and the end of them.
        counts_ptr: int32 [n_tasks, BINS], contiguous.
        total_ptr: int64 [n_weights, BINS], contiguous; every element is written.
        BINS: 256.
        BLOCK: Bins of a program.
    """
    weight = tl.program_id(0).to(tl.int64)
    bin = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    begin, end = tl.load(ranges_ptr + 2 * weight), tl.load(ranges_ptr + 2 * weight + 1)
    total = tl.zeros((BLOCK,), tl.int64)
    for task in range(begin, end):
        total += tl.load(counts_ptr + task * BINS + bin)
    tl.store(total_ptr + weight * BINS + bin, total)


class GpuHistogram:
    """Answers the queries of the search on the host."""

    def __init__(
        self, criterion: str, operands: list[Operands], ties: list[int], shards: Shards = None
    ) -> None:
        self._score = SCORES[criterion]
        # Their memory is read as long as this lives.
        self._operands = operands
        self._ties = ties
        self._shards = shards
        self._elements: ElementTables | None = None

    def __call__(self, query: Query) -> Tensor:
        """Count what the query asks for, in int64 [n_weights, BINS] on the device."""
        device = self._operands[0][0].device
        with launching(device):
            if self._elements is None:
                self._elements = elements(self._operands, self._shards)
            found = self._elements
            counts = scratch(device, (found.tasks.shape[0], BINS), torch.int32)
            self._launch(found, query, counts)
            total = torch.empty(len(self._operands), BINS, dtype=torch.int64, device=device)
            _add_kernel[len(self._operands), BINS // launch.ADD_BLOCK](
                found.ranges,
                counts,
                total,
                BINS=BINS,
                BLOCK=launch.ADD_BLOCK,
                **launch.OPTIONS,
            )
            return total

    def _launch(self, found: ElementTables, query: Query, counts: Tensor) -> None:
        columns = (query.prefixes.tolist(), query.keys.tolist(), query.words.tolist(), self._ties)
        queries = table(list(zip(*columns, strict=True)), len(columns), counts.device)
        for kind, (begin, end) in found.launches.items():
            _histogram_kernel[(end - begin,)](
                found.weights,
                found.tasks,
                queries,
                counts,
                found.weights.shape[1],
                begin,
                query.shift,
                query.bits,
                NUMBER=query.number,
                W_POWER=self._score.w,
                DW_POWER=self._score.dw,
                W_TYPE=TYPES[kind.w_dtype],
                DW_TYPE=TYPES[kind.dw_dtype],
                DEPTH=found.depth,
                SHARDED=found.sharded,
                VECTOR=kind.vector,
                BINS=BINS,
                BLOCK=launch.HISTOGRAM_BLOCK,
                **launch.OPTIONS,
            )
