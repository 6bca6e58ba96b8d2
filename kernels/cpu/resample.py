"""Numba: fresh initial values, written in place at the selected elements only.

The formulas, operation by operation, are in `law.py`; the words in `philox.py`. No operation here
may be fused or reordered: the bits are the same on every backend.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor, get_num_threads
from torch.autograd.graph import increment_version

from fastplastic.kernels.checks import check_resample
from fastplastic.kernels.cpu.elements import (
    BFLOAT16,
    BLOCK,
    FLOAT16,
    FLOAT32,
    Block,
    compact,
    compiled,
    fill_elements,
    fill_flags,
    kernel,
    new_block,
    offset_of,
    philox,
)
from fastplastic.kernels.cpu.memory import double_at, float_at, next_task, short_at
from fastplastic.kernels.cpu.tasks import on_threads
from fastplastic.kernels.elements import MASK, WEIGHT, Table, Walks, tasks, walks
from fastplastic.kernels.law import CENTRE, LEAST, LOG, LOG_HIGH, LOG_LOW, SQRT_2, TAIL, Law
from fastplastic.kernels.philox import INITIAL_VALUES, philox_key
from fastplastic.kernels.shards import Shards

F = np.float32
_HALF, _ONE, _TWO, _THREE, _FIVE = F(0.5), F(1), F(2), F(3), F(5)
_UNIT, _MIDDLE = F(2.0**-23), F(2.5)
_SQRT_2, _LEAST = F(SQRT_2), F(LEAST)
_LOG_LOW, _LOG_HIGH = F(LOG_LOW), F(LOG_HIGH)
_LOG, _CENTRE, _TAIL = (tuple(map(F, numbers)) for numbers in (LOG, CENTRE, TAIL))


class Draws(NamedTuple):
    """What fresh values come from.

    Attributes:
        keys: uint64 per weight, Philox keys.
        normal: bool per weight, whether the law is normal.
        numbers: float32 [n_weights, 6], `Law.numbers`.
    """

    keys: Any
    normal: Any
    numbers: Any


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
    none = [None] * len(weights)
    walk = walks(list(zip(weights, none, masks or none, strict=True)), shards)
    keys = [philox_key(seed, INITIAL_VALUES, name) for name in names]
    draws = Draws(
        np.array(keys, dtype=np.uint64),
        np.array([law.kind == "normal" for law in laws], dtype=np.bool_),
        np.array([law.numbers for law in laws], dtype=np.float32).reshape(len(laws), 6),
    )
    pieces = tasks(walk.counts, get_num_threads())
    on_threads(_resample, draws, walk, pieces, np.zeros(1, dtype=np.int64))
    # Written behind the back of autograd, which has to know.
    increment_version([weight for weight in weights if not weight.is_inference()])


@kernel
def _resample(draws: Draws, walk: Walks, pieces: Table, turn: Any) -> None:
    block = new_block()
    values = np.empty(BLOCK, dtype=np.float32)
    t = next_task(turn.ctypes.data)
    while t < len(pieces):
        w, start, stop = pieces[t]
        for position in range(start, stop, BLOCK):
            n = min(BLOCK, stop - position)
            _choose(walk, w, position, n, block)
            _write(draws, walk, w, position, n, block, values)
        t = next_task(turn.ctypes.data)


@compiled
def _choose(walk: Walks, w: int, start: int, count: int, block: Block) -> None:
    """Flag the elements of a block that are written."""
    if walk.addresses[w, MASK] != 0:
        fill_flags(walk, w, start, block.chosen[:count])
    else:
        block.chosen[:count] = 1


@compiled
def _write(
    draws: Draws, walk: Walks, w: int, start: int, count: int, block: Block, values: Any
) -> None:
    """Draw the flagged elements of a block and store them."""
    n = compact(block.chosen, count, block.inside)
    inside, elements, fresh = block.inside[:n], block.elements[:n], values[:n]
    fill_elements(walk, w, start, inside, elements)
    _draw(draws, w, elements, block.words[:n], fresh)
    sizes, strides = walk.sizes[w], walk.strides[w, WEIGHT]
    if sizes.size == 1:
        for i in range(n):
            elements[i] = (start + inside[i]) * strides[0]
    else:
        for i in range(n):
            elements[i] = offset_of(start + inside[i], sizes, strides)
    _store(walk.addresses[w, WEIGHT], walk.dtypes[w, WEIGHT], elements, fresh)


@compiled
def _draw(draws: Draws, w: int, elements: Any, words: Any, values: Any) -> None:
    location, scale, p_low, p_width, low, high = draws.numbers[w]
    if scale == 0:
        p_width = F(0)
    else:
        for i in range(elements.size):
            words[i] = philox(draws.keys[w], elements[i])
    whole = p_low == F(0) and p_width == _ONE
    for i in range(elements.size):
        u = (F(np.int32(words[i] >> np.uint32(9))) + _HALF) * _UNIT
        values[i] = u if whole else p_low + u * p_width
    if draws.normal[w]:
        for i in range(elements.size):
            values[i] = _SQRT_2 * _erfinv(_TWO * values[i] - _ONE)
    for i in range(elements.size):
        value = location + scale * values[i]
        value = low if value < low else value
        values[i] = high if value > high else value


@compiled
def _erfinv(x: Any) -> Any:
    w = -_log(max((_ONE - x) * (_ONE + x), _LEAST))
    centre = _polynomial(_CENTRE, w - _MIDDLE)
    tail = _polynomial(_TAIL, np.sqrt(w) - _THREE)
    return (centre if w < _FIVE else tail) * x


@compiled
def _log(a: Any) -> Any:
    bits = F(a).view(np.int32)
    exponent = np.int32(bits >> np.int32(23)) - np.int32(127)
    m = np.int32((bits & np.int32(0x7FFFFF)) | np.int32(0x3F800000)).view(np.float32)
    large = m > _SQRT_2
    m = m * _HALF if large else m
    e = F(np.int32(exponent + np.int32(large)))
    f = m - _ONE
    z = f * f
    y = f * z * _polynomial(_LOG, f)
    y = y + _LOG_LOW * e
    y = y - _HALF * z
    return (f + y) + _LOG_HIGH * e


@compiled
def _polynomial(c: Any, x: Any) -> Any:
    first = (((c[0] * x + c[1]) * x + c[2]) * x + c[3]) * x + c[4]
    return (((first * x + c[5]) * x + c[6]) * x + c[7]) * x + c[8]


@compiled
def _store(address: int, dtype: int, offsets: Any, values: Any) -> None:
    if dtype == FLOAT32:
        floats = float_at(address)
        for i in range(values.size):
            floats[offsets[i]] = values[i]
    elif dtype == BFLOAT16 or dtype == FLOAT16:
        shorts = short_at(address)
        for i in range(values.size):
            bits = F(values[i]).view(np.uint32)
            shorts[offsets[i]] = _to_bfloat16(bits) if dtype == BFLOAT16 else _to_float16(bits)
    else:
        doubles = double_at(address)
        for i in range(values.size):
            doubles[offsets[i]] = values[i]


@compiled
def _to_bfloat16(bits: Any) -> Any:
    """Round to nearest, ties to even."""
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    return np.uint16(np.uint32(bits + np.uint32(0x7FFF) + odd) >> np.uint32(16))


@compiled
def _to_float16(bits: Any) -> Any:
    """Round to nearest, ties to even; below 2^-14 to multiples of 2^-24, from 65520 on to inf."""
    sign = np.uint32((bits >> np.uint32(16)) & np.uint32(0x8000))
    size = np.uint32(bits & np.uint32(0x7FFFFFFF))
    if size >= np.uint32(0x477FF000):
        return np.uint16(sign | np.uint32(0x7C00))
    if size < np.uint32(0x38800000):
        # Next to 0.5 one unit in the last place is 2^-24.
        steps = F(size.view(np.float32) + _HALF).view(np.uint32) - np.uint32(0x3F000000)
        return np.uint16(sign | np.uint32(steps))
    odd = (size >> np.uint32(13)) & np.uint32(1)
    rounded = np.uint32(size + np.uint32(0xFFF) + odd) - np.uint32(112 << 23)
    return np.uint16(sign | np.uint32(np.uint32(rounded) >> np.uint32(13)))
