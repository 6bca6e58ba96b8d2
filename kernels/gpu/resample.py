"""Fresh initial values, written in place at the selected elements only, on a GPU.

    resample_  w[element] = value(law, Philox word 0 of (seed, "initial values", name, element))

The formulas, operation by operation, are in `law.py`; the words in `philox.py`. No operation here
may be fused or reordered: the bits are the same on every backend. One launch writes all weights of
a dtype; nothing is stored at elements that are not selected.
"""

from collections.abc import Sequence

import torch
import triton.language as tl
from torch import Tensor

from fastplastic.kernels.checks import check_resample
from fastplastic.kernels.gpu import launch
from fastplastic.kernels.gpu.elements import (
    MASK,
    N_TASK,
    WEIGHT,
    element_of,
    elements,
    offset_of,
    pointer_of,
    range_of,
    signed,
    words_of,
)
from fastplastic.kernels.gpu.functions import rounded
from fastplastic.kernels.gpu.runtime import TYPES, device_function, kernel, launching, send, table
from fastplastic.kernels.law import CENTRE, LEAST, LOG, LOG_HIGH, LOG_LOW, SQRT_2, TAIL, Law
from fastplastic.kernels.philox import INITIAL_VALUES, philox_key
from fastplastic.kernels.shards import Shards

_LOG, _CENTRE, _TAIL = tl.constexpr(LOG), tl.constexpr(CENTRE), tl.constexpr(TAIL)
_LOG_LOW, _LOG_HIGH = tl.constexpr(LOG_LOW), tl.constexpr(LOG_HIGH)
_LEAST, _SQRT_2 = tl.constexpr(LEAST), tl.constexpr(SQRT_2)
_UNIT = tl.constexpr(2.0**-23)
# Numbers of a law.
_N_NUMBERS = tl.constexpr(6)


@device_function
def _polynomial(x, COEFFICIENTS: tl.constexpr):
    total = x * COEFFICIENTS[0] + COEFFICIENTS[1]
    for i in tl.static_range(2, 9):
        total = total * x + COEFFICIENTS[i]
    return total


@device_function
def _log(a):
    bits = a.to(tl.int32, bitcast=True)
    m = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
    large = m > _SQRT_2
    m = tl.where(large, m * 0.5, m)
    e = ((bits >> 23) - 127 + large.to(tl.int32)).to(tl.float32)
    f = m - 1.0
    z = f * f
    y = f * z * _polynomial(f, _LOG)
    y = y + e * _LOG_LOW
    y = y - z * 0.5
    return (f + y) + e * _LOG_HIGH


@device_function
def _erfinv(x):
    w = -_log(tl.maximum((1.0 - x) * (1.0 + x), _LEAST))
    centre = _polynomial(w - 2.5, _CENTRE)
    tail = _polynomial(tl.math.sqrt_rn(w) - 3.0, _TAIL)
    return tl.where(w < 5.0, centre, tail) * x


@device_function
def _values(word, number_ptr, is_normal):
    """Return the values of a law for words."""
    location, scale = tl.load(number_ptr), tl.load(number_ptr + 1)
    p_low, p_width = tl.load(number_ptr + 2), tl.load(number_ptr + 3)
    low, high = tl.load(number_ptr + 4), tl.load(number_ptr + 5)
    u = ((word >> 9).to(tl.float32) + 0.5) * _UNIT
    s = tl.where((p_low == 0.0) & (p_width == 1.0), u, p_low + u * p_width)
    if is_normal:
        s = _erfinv(s * 2.0 - 1.0) * _SQRT_2
    value = location + scale * s
    value = tl.where(value < low, low, value)
    return tl.where(value > high, high, value)


@device_function
def _write(
    weight_ptr,
    task_ptr,
    source_ptr,
    number_ptr,
    MASKED: tl.constexpr,
    W_TYPE: tl.constexpr,
    DEPTH: tl.constexpr,
    DENSE: tl.constexpr,
    SHARDED: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the selected elements of a task."""
    begin, end = range_of(task_ptr, BLOCK, VECTOR, DENSE)
    w_ptr = pointer_of(weight_ptr, WEIGHT, W_TYPE, DENSE)
    mask_ptr = pointer_of(weight_ptr, MASK, tl.int8, DENSE)
    # Where there is no mask, none of it is read.
    masked_end = tl.where(tl.load(weight_ptr + MASK) != 0, end, begin)
    philox, is_normal = tl.load(source_ptr), tl.load(source_ptr + 1) != 0
    for first in range(begin, end, BLOCK):
        position = first + tl.arange(0, BLOCK).to(tl.int64)
        chosen = position < end
        element = element_of(weight_ptr, position, DEPTH, DENSE, SHARDED)
        if MASKED:
            offset = offset_of(weight_ptr, position, MASK, DEPTH, DENSE)
            flag = tl.load(mask_ptr + offset, mask=position < masked_end, other=1)
            chosen &= flag != 0
        value = _values(words_of(philox, element), number_ptr, is_normal)
        if W_TYPE == tl.bfloat16:
            value = rounded(value, W_TYPE)
        offset = offset_of(weight_ptr, position, WEIGHT, DEPTH, DENSE)
        tl.store(w_ptr + offset, value.to(W_TYPE), mask=chosen)


@kernel
def _resample_kernel(
    weights_ptr,
    tasks_ptr,
    sources_ptr,
    numbers_ptr,
    weight_columns: tl.int64,
    first_task: tl.int64,
    MASKED: tl.constexpr,
    W_TYPE: tl.constexpr,
    DEPTH: tl.constexpr,
    SHARDED: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write fresh values into weights.

    This program owns one task, a range of elements of one weight: grid (tasks of a launch,).

    Args:
        weights_ptr: int64 [n_weights, weight_columns], contiguous: addresses of weight, gradient
            (not read) and mask (0 where there is none), whether all is dense, sizes, strides,
            first element; see `elements.py`. The weights are written where the mask is set.
        tasks_ptr: int64 [n_tasks, 3], contiguous: weight, first position, end.
        sources_ptr: int64 [n_weights, 2], contiguous: Philox key, whether the law is normal.
        numbers_ptr: float32 [n_weights, 6], contiguous: `Law.numbers`.
        weight_columns: Columns of the first table.
        first_task: Task of program 0.
        MASKED: Whether there are masks.
        W_TYPE: Dtype of the weights of this launch.
        DEPTH: Number of dimensions of a walk.
        SHARDED: Whether any of the weights is a part of one.
        VECTOR: Elements that are written at once where all is dense.
        BLOCK: Elements that are drawn at once by the program.
    """
    task_ptr = tasks_ptr + (first_task + tl.program_id(0)) * N_TASK
    weight = tl.load(task_ptr)
    weight_ptr = weights_ptr + weight * weight_columns
    source_ptr = sources_ptr + weight * 2
    number_ptr = numbers_ptr + weight * _N_NUMBERS
    if tl.load(weight_ptr + 3) != 0:
        _write(
            weight_ptr, task_ptr, source_ptr, number_ptr, MASKED, W_TYPE, DEPTH, True, SHARDED,
            VECTOR, BLOCK,
        )  # fmt: skip
    else:
        _write(
            weight_ptr, task_ptr, source_ptr, number_ptr, MASKED, W_TYPE, DEPTH, False, SHARDED, 1,
            BLOCK,
        )  # fmt: skip


def resample_(
    weights: Sequence[Tensor],
    names: Sequence[str],
    laws: Sequence[Law],
    *,
    seed: int = 0,
    masks: Sequence[Tensor | None] | None = None,
    shards: Shards = None,
) -> None:
    """Write fresh initial values into the selected elements of weights, in place.

    See `fastplastic.kernels.resample_`.
    """
    check_resample(weights, names, laws, masks, shards)
    if not any(weight.numel() for weight in weights):
        return
    device = weights[0].device
    none = [None] * len(weights)
    with launching(device):
        found = elements(list(zip(weights, none, masks or none, strict=True)), shards)
        keys = [signed(philox_key(seed, INITIAL_VALUES, name)) for name in names]
        normal = [int(law.kind == "normal") for law in laws]
        sources = table(list(zip(keys, normal, strict=True)), 2, device)
        numbers = torch.empty(len(laws), _N_NUMBERS.value, dtype=torch.float32, device=device)
        send([number for law in laws for number in law.numbers], numbers)
        for kind, (begin, end) in found.launches.items():
            _resample_kernel[(end - begin,)](
                found.weights,
                found.tasks,
                sources,
                numbers,
                found.weights.shape[1],
                begin,
                MASKED=masks is not None,
                W_TYPE=TYPES[kind.w_dtype],
                DEPTH=found.depth,
                SHARDED=found.sharded,
                VECTOR=kind.vector,
                BLOCK=launch.ELEMENT_BLOCK,
                **(launch.OPTIONS | {"enable_fp_fusion": False}),
            )
    for weight in weights:
        # What autograd saved of it is out of date.
        if not weight.is_inference():
            torch.autograd.graph.increment_version(weight)
