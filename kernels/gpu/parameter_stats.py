"""Statistics of all weights and their gradients, along rows and columns, on a GPU.

    parameter_stats  rows     float64 [8, sum D0]           n, sum |w|, sum w^2, n_dw, sum |dw|,
                                                            sum dw^2, sum |w dw|, #nonfinite dw
                     columns  float64 [6, sum groups * D1]  n, sum |w|, sum w^2, n_dw, sum w dw,
                                                            #nonfinite dw

One launch reads every w and dw once, from a table of addresses, and writes float32 partial sums of
both directions; a second one folds them in float64 into the tables. Weights of several dtypes, or
transposed ones among others, take one launch for each kind. A square above 3e38 counts as infinite.
A tile is taken to be finite at first; where a sum of w dw is not, it is read again, with care.
"""

from collections.abc import Sequence

import torch
import triton.language as tl
from torch import Tensor

from fastplastic.kernels.gpu import launch
from fastplastic.kernels.gpu.parameter_tables import (
    FOLD_COLUMNS,
    MATRIX_COLUMNS,
    POINTER_COLUMNS,
    TASK_COLUMNS,
    Operand,
    ParameterTables,
    tables_for,
)
from fastplastic.kernels.gpu.runtime import (
    TYPES,
    check_devices,
    device_function,
    keep_for_graph,
    kernel,
    launching,
    scratch,
)
from fastplastic.kernels.reference import parameter_stats as reference
from fastplastic.kernels.tables import parameter_tables

_N_MATRIX = tl.constexpr(MATRIX_COLUMNS)
_N_TASK = tl.constexpr(TASK_COLUMNS)
_N_FOLD = tl.constexpr(FOLD_COLUMNS)
_N_POINTERS = tl.constexpr(POINTER_COLUMNS)
_THREADS = tl.constexpr(32 * launch.WARPS)
_NARROW = tl.constexpr(launch.PARAMETER_NARROW)


@device_function
def _read(
    matrix_ptr,
    task_ptr,
    w_ptr,
    dw_ptr,
    parts_ptr,
    TRANSPOSED: tl.constexpr,
    CAREFUL: tl.constexpr,
    VECTOR: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_FAST: tl.constexpr,
):
    """Write the partial sums of a task: along rows of the matrix at once, along columns at last.

    Return whether something is not finite: unless CAREFUL, the sums of the task are wrong then.
    """
    WIDTH: tl.constexpr = LANES * VECTOR
    CHUNKS: tl.constexpr = BLOCK_FAST // WIDTH
    SLOW: tl.constexpr = _THREADS // LANES
    # A tile is [CHUNKS * SLOW, WIDTH], all rows of the first chunk of columns first: the threads
    # cover one chunk, LANES of them a row, and each holds the same place of all chunks.
    TILE: tl.constexpr = (CHUNKS, SLOW, LANES, VECTOR)
    # VECTOR divides these: told so, the compiler reads that many elements at once.
    fast_size = tl.load(matrix_ptr + 1) // VECTOR * VECTOR
    w_stride = tl.load(matrix_ptr + 2) // VECTOR * VECTOR
    dw_stride = tl.load(matrix_ptr + 3) // VECTOR * VECTOR
    slow_size = tl.load(matrix_ptr)
    tiles, chunks = tl.load(matrix_ptr + 6), tl.load(matrix_ptr + 7)
    begin, end = tl.load(task_ptr + 1), tl.load(task_ptr + 2)
    tile, chunk = tl.load(task_ptr + 3), tl.load(task_ptr + 4)
    # Where there is no gradient, none of it is read.
    dw_end = tl.where(dw_ptr.to(tl.int64) != 0, end, begin)
    line = tl.arange(0, CHUNKS * SLOW)[:, None]
    fast = tile * BLOCK_FAST + line // SLOW * WIDTH + tl.arange(0, WIDTH)[None, :]
    width = tl.minimum(fast_size - tile * BLOCK_FAST, BLOCK_FAST)
    # Sum s of a row is written by lane s of those that read the row: the loop needs no barrier.
    thread = tl.arange(0, _THREADS)
    row, which = thread // LANES, thread % LANES
    written = (which < 3) | (which == 6) if TRANSPOSED else which < 7
    slow_plane = tiles * slow_size
    sums_ptr = parts_ptr + tl.load(matrix_ptr + 4) + tile * slow_size + which * slow_plane

    zeros = tl.zeros((CHUNKS * SLOW, WIDTH), tl.float32)
    sum_w, sum_sq_w, sum_dw, sum_sq_dw, sum_w_dw = zeros, zeros, zeros, zeros, zeros
    count = zeros.to(tl.int32)
    for first in range(begin, end, SLOW):
        slow = first + line % SLOW
        inside = (slow < end) & (fast < fast_size)
        dw_inside = (slow < dw_end) & (fast < fast_size)
        w = tl.load(w_ptr + (slow * w_stride + fast), mask=inside, other=0.0).to(tl.float32)
        dw = tl.load(dw_ptr + (slow * dw_stride + fast), mask=dw_inside, other=0.0).to(tl.float32)
        w_dw = w * dw
        n_row = tl.where(first + row < dw_end, width, 0).to(tl.float32)
        if CAREFUL:
            finite = dw_inside & (tl.abs(dw) < float("inf"))
            dw = tl.where(finite, dw, 0.0)
            w_dw = tl.where(finite, w_dw, 0.0)
            there = finite.to(tl.int32)
            n_row = _along(there, TILE).to(tl.float32)
            count += there

        sums = tl.where(which == 0, _along(tl.abs(w), TILE), n_row)
        sums = tl.where(which == 1, _along(w * w, TILE), sums)
        if not TRANSPOSED:
            sums = tl.where(which == 3, _along(tl.abs(dw), TILE), sums)
            sums = tl.where(which == 4, _along(dw * dw, TILE), sums)
            sums = tl.where(which == 5, _along(tl.abs(w_dw), TILE), sums)
        # A depthwise filter is a column too.
        sums = tl.where(which == 6, _along(w_dw, TILE), sums)
        tl.store(sums_ptr + first + row, sums, mask=written & (first + row < end))

        sum_w += tl.abs(w)
        sum_sq_w += w * w
        if TRANSPOSED:
            sum_dw += tl.abs(dw)
            sum_sq_dw += dw * dw
            sum_w_dw += tl.abs(w_dw)
        else:
            sum_w_dw += w_dw

    fast = tile * BLOCK_FAST + tl.arange(0, BLOCK_FAST)
    mask = fast < fast_size
    fast_ptr = parts_ptr + tl.load(matrix_ptr + 5) + chunk * fast_size + fast
    fast_plane = chunks * fast_size
    n_column = tl.where(mask, dw_end - begin, 0).to(tl.int32)
    if CAREFUL:
        n_column = _down(count, CHUNKS)
    product = _down(sum_w_dw, CHUNKS)
    tl.store(fast_ptr, _down(sum_w, CHUNKS), mask=mask)
    tl.store(fast_ptr + fast_plane, _down(sum_sq_w, CHUNKS), mask=mask)
    tl.store(fast_ptr + 2 * fast_plane, n_column.to(tl.float32), mask=mask)
    if TRANSPOSED:
        tl.store(fast_ptr + 3 * fast_plane, _down(sum_dw, CHUNKS), mask=mask)
        tl.store(fast_ptr + 4 * fast_plane, _down(sum_sq_dw, CHUNKS), mask=mask)
        tl.store(fast_ptr + 5 * fast_plane, product, mask=mask)
    else:
        tl.store(fast_ptr + 6 * fast_plane, product, mask=mask)
    # Whatever is not finite, in w or dw, spoils the sum of w dw of its column.
    return tl.sum(tl.where(tl.abs(product) < float("inf"), 0, 1)) > 0


@device_function
def _along(values, TILE: tl.constexpr):
    """Sum up the rows of a tile, first what a thread holds; each lane of a row has the sum."""
    lanes = tl.sum(tl.sum(tl.reshape(values, TILE), 0), 2)
    sums = tl.broadcast_to(tl.sum(lanes, 1, keep_dims=True), lanes.shape)
    return tl.reshape(sums, (_THREADS,))


@device_function
def _down(values, CHUNKS: tl.constexpr):
    """Sum up the columns of a tile."""
    SLOW: tl.constexpr = values.shape[0] // CHUNKS
    sums = tl.sum(tl.reshape(values, (CHUNKS, SLOW, values.shape[1])), 1)
    return tl.reshape(sums, (CHUNKS * values.shape[1],))


@kernel
def _parameter_kernel(
    matrices_ptr,
    tasks_ptr,
    pointers_ptr,
    parts_ptr,
    first_task: tl.int64,
    W_TYPE: tl.constexpr,
    DW_TYPE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    VECTOR: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_FAST: tl.constexpr,
):
    """Write the partial sums of weights and gradients along rows and columns.

    This program owns one task, a tile of the stretch in a chunk of the slow indices of one weight:
    grid (tasks of a launch,).

    Args:
        matrices_ptr: int64 [n_weights, 8], contiguous: `Matrix`, with strides in elements.
        tasks_ptr: int64 [n_tasks, 5], contiguous: weight, first and last slow index, tile, chunk.
        pointers_ptr: int64 [n_weights, 3], contiguous: addresses of w [slow, fast] with strides
            (w_stride, 1) and of dw with (dw_stride, 1), or 0; whether both can be read wide.
        parts_ptr: float32, where a matrix says: [7, tiles, slow] and [7, chunks, fast],
            contiguous. What the fold reads is written.
        first_task: Task of program 0.
        W_TYPE: Dtype of the weights of this launch.
        DW_TYPE: Dtype of their gradients.
        TRANSPOSED: Whether the slow index is that of columns.
        VECTOR: Elements that are read at once where the addresses allow it.
        LANES: Threads that share a slow index where rows are read wide.
        BLOCK_FAST: Elements of the stretch of a tile.
    """
    task_ptr = tasks_ptr + (first_task + tl.program_id(0)) * _N_TASK
    weight = tl.load(task_ptr)
    matrix_ptr = matrices_ptr + weight * _N_MATRIX
    pointer_ptr = pointers_ptr + weight * _N_POINTERS
    w_ptr = tl.load(pointer_ptr).to(tl.pointer_type(W_TYPE))
    dw_ptr = tl.load(pointer_ptr + 1).to(tl.pointer_type(DW_TYPE))
    again = True
    if tl.load(pointer_ptr + 2) != 0:
        again = _read(
            matrix_ptr, task_ptr, tl.multiple_of(w_ptr, 16), tl.multiple_of(dw_ptr, 16), parts_ptr,
            TRANSPOSED, False, VECTOR, LANES, BLOCK_FAST,
        )  # fmt: skip
    if again:
        # Other threads write here what the first reading wrote.
        tl.debug_barrier()
        _read(
            matrix_ptr, task_ptr, w_ptr, dw_ptr, parts_ptr, TRANSPOSED, True, 1, _NARROW,
            BLOCK_FAST,
        )  # fmt: skip


@kernel
def _parameter_fold_kernel(
    folds_ptr,
    parts_ptr,
    rows_ptr,
    columns_ptr,
    rows_stride: tl.int64,
    columns_stride: tl.int64,
    BLOCK_PARTS: tl.constexpr,
    BLOCK_UNITS: tl.constexpr,
):
    """Add partial sums to the tables of rows and columns.

    This program owns a block of up to BLOCK_UNITS columns of one table, with all statistics: grid
    (folds,).

    Args:
        folds_ptr: int64 [n_folds, 12], contiguous: `Fold`, with steps in elements.
        parts_ptr: float32, what `_parameter_kernel` wrote.
        rows_ptr: float64 [8, sum of D0], row stride `rows_stride`, column stride 1; added to.
        columns_ptr: float64 [6, sum of groups * D1], row stride `columns_stride`, column stride
            1; added to.
        rows_stride: From one statistic of rows to the next, in elements.
        columns_stride: From one statistic of columns to the next, in elements.
        BLOCK_PARTS: Partial sums that are read at once.
        BLOCK_UNITS: Most columns of a program.
    """
    fold_ptr = folds_ptr + tl.program_id(0) * _N_FOLD
    first_part, plane = tl.load(fold_ptr), tl.load(fold_ptr + 1)
    count, step = tl.load(fold_ptr + 2), tl.load(fold_ptr + 3)
    behind, behind_step = tl.load(fold_ptr + 4), tl.load(fold_ptr + 5)
    units, unit_step = tl.load(fold_ptr + 6), tl.load(fold_ptr + 7)
    out, is_column = tl.load(fold_ptr + 8), tl.load(fold_ptr + 9) != 0
    positions, has_dw = tl.load(fold_ptr + 10), tl.load(fold_ptr + 11)
    unit = tl.arange(0, BLOCK_UNITS)
    inside = unit < units
    out_ptr, stride = rows_ptr, rows_stride
    if is_column:
        out_ptr, stride = columns_ptr, columns_stride
    out_ptr += out + unit

    # Rows have the first six sums, columns the first three and the last.
    sums = tl.where(is_column, 4, 6)
    base_ptr = parts_ptr + first_part + unit[None, :] * unit_step
    before = tl.load(out_ptr, mask=inside, other=0.0)
    tl.store(out_ptr, before + positions, mask=inside)
    for index in range(0, sums):
        plane_index = tl.where(is_column & (index == 3), 6, index)
        total = tl.zeros((BLOCK_PARTS, BLOCK_UNITS), tl.float64)
        for first in range(0, count * behind, BLOCK_PARTS):
            part = first + tl.arange(0, BLOCK_PARTS)
            offset = part // behind * step + part % behind * behind_step
            mask = (part < count * behind)[:, None] & inside[None, :]
            part_ptr = base_ptr + (plane_index * plane + offset)[:, None]
            total += tl.load(part_ptr, mask=mask, other=0.0)
        folded = tl.sum(total, 0)
        row_ptr = out_ptr + (index + 1) * stride
        tl.store(row_ptr, tl.load(row_ptr, mask=inside, other=0.0) + folded, mask=inside)
        if index == 2:
            row_ptr = out_ptr + (sums + 1) * stride
            absent = has_dw * positions - folded
            tl.store(row_ptr, tl.load(row_ptr, mask=inside, other=0.0) + absent, mask=inside)


def parameter_stats(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    groups: Sequence[int] | None = None,
    *,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum up every weight and its gradient, along rows (dimension 0) and columns (dimension 1).

    See `fastplastic.kernels.parameter_stats`.
    """
    tables = parameter_tables(weights, gradients, groups, out)
    dtypes = {tensor.dtype for tensor in (*weights, *gradients) if tensor is not None}
    if torch.float64 in dtypes:
        return reference.parameter_stats(weights, gradients, groups, out=tables)
    if not any(weight.numel() for weight in weights):
        return tables
    device = weights[0].device
    check_devices((*weights, *gradients), device)
    parts = (1,) * len(weights) if groups is None else groups
    operands = tuple(map(_operand, weights, gradients, parts))
    with launching(device):
        plan = tables_for(operands, device)
        plan.filled.wait()
        # Copies live until the launches are queued.
        pairs = list(zip(weights, gradients, plan.copied, strict=True))
        kept = [_readable(w, dw, copied) for w, dw, copied in pairs]
        addresses = [(w.data_ptr(), 0 if dw is None else dw.data_ptr()) for w, dw in kept]
        pointers = plan.pointers(addresses)
        keep_for_graph(device, plan, pointers)
        _launch(plan, pointers, scratch(device, (plan.parts,)), *tables)
    return tables


def _operand(weight: Tensor, gradient: Tensor | None, groups: int) -> Operand:
    strides = None if gradient is None else gradient.stride()
    dtype = weight.dtype if gradient is None else gradient.dtype
    return Operand(tuple(weight.shape), weight.stride(), strides, weight.dtype, dtype, groups)


def _readable(
    weight: Tensor, gradient: Tensor | None, copied: bool
) -> tuple[Tensor, Tensor | None]:
    if not copied:
        return weight, gradient
    return weight.contiguous(), None if gradient is None else gradient.contiguous()


def _launch(
    plan: ParameterTables, pointers: Tensor, parts: Tensor, rows: Tensor, columns: Tensor
) -> None:
    for kind, (begin, end) in plan.launches.items():
        _parameter_kernel[(end - begin,)](
            plan.matrices,
            plan.tasks,
            pointers,
            parts,
            begin,
            W_TYPE=TYPES[kind.w_dtype],
            DW_TYPE=TYPES[kind.dw_dtype],
            TRANSPOSED=kind.transposed,
            VECTOR=kind.vector,
            LANES=launch.PARAMETER_LANES,
            BLOCK_FAST=launch.PARAMETER_FAST,
            **launch.OPTIONS,
        )
    _parameter_fold_kernel[(plan.folds.shape[0],)](
        plan.folds,
        parts,
        rows,
        columns,
        rows.stride(0),
        columns.stride(0),
        BLOCK_PARTS=launch.PARAMETER_PARTS,
        BLOCK_UNITS=launch.FOLD_UNITS,
        **launch.OPTIONS,
    )
