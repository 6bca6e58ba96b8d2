"""Statistics of all weights and their gradients, along rows and columns, on a GPU.

    parameter_stats  rows     float64 [8, sum D0]           n, sum |w|, sum w^2, n_dw, sum |dw|,
                                                            sum dw^2, sum |w dw|, #nonfinite dw
                     columns  float64 [6, sum groups * D1]  n, sum |w|, sum w^2, n_dw, sum w dw,
                                                            #nonfinite dw

One launch reads every w and dw once, from a table of addresses, and writes float32 partial sums of
both directions; a second one folds them in float64 into the tables. Weights of several dtypes, or
transposed ones among others, take one launch for each kind. A square above 3e38 counts as infinite.
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
    stream_of,
)
from fastplastic.kernels.reference import parameter_stats as reference
from fastplastic.kernels.tables import parameter_tables

_N_MATRIX = tl.constexpr(MATRIX_COLUMNS)
_N_TASK = tl.constexpr(TASK_COLUMNS)
_N_FOLD = tl.constexpr(FOLD_COLUMNS)
_N_POINTERS = tl.constexpr(POINTER_COLUMNS)
_NARROW = tl.constexpr(launch.PARAMETER_NARROW)


@device_function
def _read(
    matrix_ptr,
    task_ptr,
    w_ptr,
    dw_ptr,
    parts_ptr,
    TRANSPOSED: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_SLOW: tl.constexpr,
    BLOCK_FAST: tl.constexpr,
):
    """Write the partial sums of a task: along rows of the matrix at once, along columns at last."""
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
    fast = tile * BLOCK_FAST + tl.arange(0, BLOCK_FAST)
    slow_ptr = parts_ptr + tl.load(matrix_ptr + 4) + tile * slow_size
    fast_ptr = parts_ptr + tl.load(matrix_ptr + 5) + chunk * fast_size + fast
    slow_plane, fast_plane = tiles * slow_size, chunks * fast_size

    SHAPE: tl.constexpr = (BLOCK_SLOW, BLOCK_FAST)
    sum_w, sum_sq_w = tl.zeros(SHAPE, tl.float32), tl.zeros(SHAPE, tl.float32)
    count, sum_w_dw = tl.zeros(SHAPE, tl.int32), tl.zeros(SHAPE, tl.float32)
    sum_dw, sum_sq_dw = tl.zeros(SHAPE, tl.float32), tl.zeros(SHAPE, tl.float32)
    for first in range(begin, end, BLOCK_SLOW):
        slow = first + tl.arange(0, BLOCK_SLOW)
        inside = (slow < end)[:, None] & (fast < fast_size)[None, :]
        dw_inside = (slow < dw_end)[:, None] & (fast < fast_size)[None, :]
        w_offset = slow[:, None] * w_stride + fast[None, :]
        dw_offset = slow[:, None] * dw_stride + fast[None, :]
        w = tl.load(w_ptr + w_offset, mask=inside, other=0.0).to(tl.float32)
        # What is not there is NaN, which counts nowhere.
        dw = tl.load(dw_ptr + dw_offset, mask=dw_inside, other=float("nan")).to(tl.float32)
        finite = tl.abs(dw) < float("inf")
        dw = tl.where(finite, dw, 0.0)
        w_dw = tl.where(finite, w * dw, 0.0)
        there = finite.to(tl.int32)

        row_ptr, mask = slow_ptr + slow, slow < end
        tl.store(row_ptr, tl.sum(tl.abs(w), 1), mask=mask)
        tl.store(row_ptr + slow_plane, tl.sum(w * w, 1), mask=mask)
        tl.store(row_ptr + 2 * slow_plane, tl.sum(there, 1).to(tl.float32), mask=mask)
        if TRANSPOSED:
            tl.store(row_ptr + 6 * slow_plane, tl.sum(w_dw, 1), mask=mask)
        else:
            tl.store(row_ptr + 3 * slow_plane, tl.sum(tl.abs(dw), 1), mask=mask)
            tl.store(row_ptr + 4 * slow_plane, tl.sum(dw * dw, 1), mask=mask)
            tl.store(row_ptr + 5 * slow_plane, tl.sum(tl.abs(w_dw), 1), mask=mask)
            # A depthwise filter is a column too.
            tl.store(row_ptr + 6 * slow_plane, tl.sum(w_dw, 1), mask=mask)

        sum_w += tl.abs(w)
        sum_sq_w += w * w
        count += there
        if TRANSPOSED:
            sum_dw += tl.abs(dw)
            sum_sq_dw += dw * dw
            sum_w_dw += tl.abs(w_dw)
        else:
            sum_w_dw += w_dw

    mask = fast < fast_size
    tl.store(fast_ptr, tl.sum(sum_w, 0), mask=mask)
    tl.store(fast_ptr + fast_plane, tl.sum(sum_sq_w, 0), mask=mask)
    tl.store(fast_ptr + 2 * fast_plane, tl.sum(count, 0).to(tl.float32), mask=mask)
    if TRANSPOSED:
        tl.store(fast_ptr + 3 * fast_plane, tl.sum(sum_dw, 0), mask=mask)
        tl.store(fast_ptr + 4 * fast_plane, tl.sum(sum_sq_dw, 0), mask=mask)
        tl.store(fast_ptr + 5 * fast_plane, tl.sum(sum_w_dw, 0), mask=mask)
    else:
        tl.store(fast_ptr + 6 * fast_plane, tl.sum(sum_w_dw, 0), mask=mask)


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
    BLOCK_SLOW: tl.constexpr,
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
        BLOCK_SLOW: Slow indices of a tile.
        BLOCK_FAST: Elements of the stretch of a tile.
    """
    task_ptr = tasks_ptr + (first_task + tl.program_id(0)) * _N_TASK
    weight = tl.load(task_ptr)
    matrix_ptr = matrices_ptr + weight * _N_MATRIX
    pointer_ptr = pointers_ptr + weight * _N_POINTERS
    w_ptr = tl.load(pointer_ptr).to(tl.pointer_type(W_TYPE))
    dw_ptr = tl.load(pointer_ptr + 1).to(tl.pointer_type(DW_TYPE))
    if tl.load(pointer_ptr + 2) != 0:
        w_ptr, dw_ptr = tl.multiple_of(w_ptr, 16), tl.multiple_of(dw_ptr, 16)
        _read(
            matrix_ptr, task_ptr, w_ptr, dw_ptr, parts_ptr, TRANSPOSED, VECTOR, BLOCK_SLOW,
            BLOCK_FAST,
        )  # fmt: skip
    else:
        _read(matrix_ptr, task_ptr, w_ptr, dw_ptr, parts_ptr, TRANSPOSED, 1, _NARROW, BLOCK_FAST)


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
        plan = tables_for(operands, device, stream_of(device))
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
            BLOCK_SLOW=launch.parameter_slow(kind.vector),
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
