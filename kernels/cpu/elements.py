"""What the Numba kernels of `select` and `resample_` share: reading elements, keys, random words.

A kernel works on blocks of a walk (see `elements.py` in the folder above): `fill_operand` copies a
block of an operand to a float32 buffer, whatever its dtype and strides, so that everything after it
is a plain loop over contiguous buffers that the compiler vectorises. bfloat16 and float16, which
Numba does not know, are read through their bits.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
from numba import njit, types
from numba.extending import intrinsic

from fastplastic.kernels.cpu.compiling import cached
from fastplastic.kernels.cpu.memory import byte_at, double_at, float_at, short_at
from fastplastic.kernels.elements import ELEMENT, GRADIENT, MASK, WEIGHT
from fastplastic.kernels.philox import KEY_STEPS, MULTIPLIERS, ROUNDS, TIES, philox_key
from fastplastic.kernels.scores import SCORES, Score
from fastplastic.kernels.selection import Selection

Function = TypeVar("Function", bound=Callable[..., Any])

# Elements per block: its buffers stay in the first-level cache.
BLOCK = 4096

FLOAT32, BFLOAT16, FLOAT16 = range(3)
_INFINITE = np.int32(0x7F800000)
# All bits but the sign; as a key it is above all others.
NO_KEY = np.int32(0x7FFFFFFF)
_ZERO = np.int32(0)

# Eight flags as one number: times _PACK, flag i is bit i of the upper eight. For each such pattern:
# how many are set, and which, first, as uint16 in two numbers of four.
_PACK, _PACKED = np.uint64(0x0102040810204080), np.uint64(56)
_BITS = (np.arange(256)[:, None] >> np.arange(8)) & 1
_SET = _BITS.sum(1)
_PLACES = np.argsort(1 - _BITS, axis=1, kind="stable")
_PLACES = _PLACES.astype("<u2").view("<u8").astype(np.uint64)
_FOUR_ONES = np.uint64(0x0001000100010001)

_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)
_M0, _M1 = map(np.uint64, MULTIPLIERS)
_STEP0, _STEP1 = map(np.uint64, KEY_STEPS)
_NONE = np.uint64(0)


class Block(NamedTuple):
    """What a task needs for one block.

    Attributes:
        buffers: float32 [2, BLOCK].
        keys: int32 [BLOCK].
        elements: int64 [BLOCK].
        inside: uint16 [BLOCK + 8], positions within the block.
        flags: uint8 [BLOCK], what `gather` looks for.
        chosen: uint8 [BLOCK], what is selected.
        words: uint32 [BLOCK].
    """

    buffers: Any
    keys: Any
    elements: Any
    inside: Any
    flags: Any
    chosen: Any
    words: Any


class Thresholds(NamedTuple):
    """A `Selection` as tables.

    Attributes:
        score: The score of its criterion.
        ties: uint64 per weight, the Philox keys of the tie words.
        ends: int64 [n_weights, 3], the thresholds of key, word and element.
    """

    score: Score
    ties: Any
    ends: Any


def thresholds_of(selection: Selection) -> Thresholds:
    """Return a selection as tables."""
    ties = [philox_key(selection.seed, TIES, name) for name in selection.names]
    ends = np.array([selection.keys, selection.words, selection.elements], dtype=np.int64)
    score = SCORES[selection.criterion]
    return Thresholds(score, np.array(ties, dtype=np.uint64), np.ascontiguousarray(ends.T))


def compiled(function: Function) -> Function:
    """Compile a function that kernels call."""
    result: Any = cached(njit, function, nogil=True, forceinline=True)
    return cast(Function, result)


def kernel(function: Function) -> Function:
    """Compile a function that threads run at the same time, each taking tasks from a counter."""
    result: Any = cached(njit, function, nogil=True)
    return cast(Function, result)


@compiled
def new_block() -> Block:
    """Return buffers for one block."""
    return Block(
        np.empty((2, BLOCK), dtype=np.float32),
        np.empty(BLOCK, dtype=np.int32),
        np.empty(BLOCK, dtype=np.int64),
        np.empty(BLOCK + 8, dtype=np.uint16),
        np.empty(BLOCK, dtype=np.uint8),
        np.empty(BLOCK, dtype=np.uint8),
        np.empty(BLOCK, dtype=np.uint32),
    )


def _store_bits(typing: Any, address: Any, bits: Any) -> Any:
    """Write a uint64 at an address that need not be a multiple of 8."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        bits = arguments[1]
        builder.store(bits, builder.inttoptr(arguments[0], bits.type.as_pointer()), align=1)

    return types.void(types.int64, types.uint64), generate


# Compiled code calls them without the first argument.
store_bits: Any = intrinsic(_store_bits)


@compiled
def offset_of(position: int, sizes: Any, strides: Any) -> Any:
    """Return how far the element at a position of a walk is from the first, in elements."""
    offset = 0
    rest = position
    for dim in range(len(sizes) - 1, 0, -1):
        offset += rest % sizes[dim] * strides[dim]
        rest //= sizes[dim]
    return offset + rest * strides[0]


@compiled
def fill_operand(walk: Any, w: int, operand: int, start: int, out: Any) -> None:
    """Read an operand of walk `w` from a position on into `out`, float32 of any length."""
    address, dtype = walk.addresses[w, operand], walk.dtypes[w, operand]
    sizes, strides = walk.sizes[w], walk.strides[w, operand]
    fastest, stride = sizes[-1], strides[-1]
    count = out.size
    done = 0
    while done < count:
        position = start + done
        n = min(fastest - position % fastest, count - done)
        _run(address, dtype, offset_of(position, sizes, strides), stride, out[done : done + n])
        done += n


@compiled
def _run(address: int, dtype: int, offset: int, stride: int, out: Any) -> None:
    if dtype == FLOAT32:
        floats = float_at(address + 4 * offset)
        if stride == 1:
            for i in range(out.size):
                out[i] = floats[i]
        else:
            for i in range(out.size):
                out[i] = floats[i * stride]
    elif dtype == BFLOAT16:
        shorts = short_at(address + 2 * offset)
        bits = out.view(np.uint32)
        for i in range(out.size):
            bits[i] = np.uint32(shorts[i * stride]) << np.uint32(16)
    elif dtype == FLOAT16:
        shorts = short_at(address + 2 * offset)
        for i in range(out.size):
            out[i] = _float16(shorts[i * stride])
    else:
        doubles = double_at(address + 8 * offset)
        for i in range(out.size):
            out[i] = doubles[i * stride]


@compiled
def fill_flags(walk: Any, w: int, start: int, out: Any) -> None:
    """Read the mask of walk `w` from a position on into `out`, uint8 of any length."""
    sizes, strides = walk.sizes[w], walk.strides[w, MASK]
    fastest, stride = sizes[-1], strides[-1]
    done = 0
    while done < out.size:
        position = start + done
        n = min(fastest - position % fastest, out.size - done)
        mask = byte_at(walk.addresses[w, MASK] + offset_of(position, sizes, strides))
        run = out[done : done + n]
        for i in range(n):
            run[i] = mask[i * stride]
        done += n


@compiled
def _float16(short: int) -> Any:
    exponent = np.int32(short >> 10) & np.int32(31)
    fraction = np.int32(short) & np.int32(0x3FF)
    # Subnormal numbers are integers times 2^-24; infinity and NaN keep the largest exponent.
    small = np.float32(fraction) * np.float32(2.0**-24)
    shifted = np.int32(255) if exponent == 31 else np.int32(exponent + 112)
    large = np.int32((shifted << 23) | (fraction << 13)).view(np.float32)
    size = small if exponent == 0 else large
    return -size if short & 0x8000 else size


@compiled
def _is_plain(walk: Any, w: int, operand: int) -> Any:
    """Tell whether an operand is float32 in one stretch."""
    one = walk.sizes.shape[1] == 1 and walk.strides[w, operand, 0] == 1
    return one and walk.dtypes[w, operand] == FLOAT32


@compiled
def fill_keys(score: Score, walk: Any, w: int, start: int, count: int, buffers: Any) -> Any:
    """Return the keys of a block of walk `w`, int32 [count]; `NO_KEY` where the score is NaN.

    `buffers` is float32 [2, BLOCK]; the keys are a view of it.
    """
    first, second = buffers[0, :count], buffers[1, :count]
    keys = first.view(np.int32)
    if score.w == 0 and score.dw == 0:
        keys[:] = _ZERO
        return keys
    one_of_each = score.w == 1 and score.dw == 1
    if one_of_each and _is_plain(walk, w, WEIGHT) and _is_plain(walk, w, GRADIENT):
        # The most common case needs no copies.
        weights = float_at(walk.addresses[w, WEIGHT] + 4 * start)
        gradients = float_at(walk.addresses[w, GRADIENT] + 4 * start)
        for i in range(count):
            keys[i] = _key(weights[i] * gradients[i])
        return keys
    first[:] = np.float32(1)
    for operand, power in ((WEIGHT, score.w), (GRADIENT, score.dw)):
        if power > 0:
            fill_operand(walk, w, operand, start, second)
        for _ in range(power):
            for i in range(count):
                first[i] *= second[i]
    for i in range(count):
        keys[i] = _key(first[i])
    return keys


@compiled
def _key(score: Any) -> Any:
    key = np.int32(np.float32(score).view(np.int32) & NO_KEY)
    return key if key <= _INFINITE else NO_KEY


@compiled
def fill_elements(walk: Any, w: int, start: int, inside: Any, elements: Any) -> None:
    """Write the element number at each position `start + inside[i]` of walk `w`."""
    sizes, strides, first = walk.sizes[w], walk.strides[w, ELEMENT], walk.firsts[w]
    if sizes.size == 1 and strides[0] == 1:
        first += start
        for i in range(inside.size):
            elements[i] = first + inside[i]
    else:
        for i in range(inside.size):
            elements[i] = first + offset_of(start + inside[i], sizes, strides)


@compiled
def philox(key: Any, element: int) -> Any:
    """Return Philox word 0 of an element, uint32."""
    number = np.uint64(element)
    c0, c1, c2, c3 = number & _LOW, number >> _HALF, _NONE, _NONE
    k0, k1 = np.uint64(key) & _LOW, np.uint64(key) >> _HALF
    for _ in range(ROUNDS):
        p0, p1 = _M0 * c0, _M1 * c2
        c0 = (p1 >> _HALF) ^ c1 ^ k0
        c2 = (p0 >> _HALF) ^ c3 ^ k1
        c1 = p1 & _LOW
        c3 = p0 & _LOW
        k0 = (k0 + _STEP0) & _LOW
        k1 = (k1 + _STEP1) & _LOW
    return np.uint32(c0)


@compiled
def gather(keys: Any, low: int, high: int, walk: Any, w: int, start: int, block: Block) -> int:
    """Write keys in [low, high) of a block at `start`, and their elements; return how many."""
    least, size = np.uint32(low), np.uint32(high - low)
    flags = block.flags
    for i in range(keys.size):
        flags[i] = np.uint32(np.uint32(keys[i]) - least) < size
    n = compact(flags, keys.size, block.inside)
    inside, some = block.inside[:n], block.keys[:n]
    for i in range(n):
        some[i] = keys[inside[i]]
    fill_elements(walk, w, start, inside, block.elements[:n])
    return n


@compiled
def compact(flags: Any, count: int, inside: Any) -> int:
    """Write where the first `count` flags are set into `inside`; return how many are.

    `flags` is uint8 [BLOCK], 0 or 1; those from `count` on are cleared.
    """
    flags[count:] = 0
    eights = flags.view(np.uint64)
    address = inside.ctypes.data
    n = 0
    # Without a branch, which would be guessed wrong most of the time where few are set.
    for eight in range((count + 7) // 8):
        pattern = np.uint64((eights[eight] * _PACK) >> _PACKED)
        first = np.uint64(8 * eight) * _FOUR_ONES
        store_bits(address + 2 * n, _PLACES[pattern, 0] + first)
        store_bits(address + 2 * n + 8, _PLACES[pattern, 1] + first)
        n += _SET[pattern]
    return n


@compiled
def fill_selected(
    thresholds: Thresholds, walk: Any, w: int, start: int, count: int, block: Block
) -> None:
    """Write into `block.chosen` which elements of a block of walk `w` are selected."""
    flags = block.chosen[:count]
    keys = fill_keys(thresholds.score, walk, w, start, count, block.buffers)
    last_key = thresholds.ends[w, 0]
    for i in range(flags.size):
        flags[i] = keys[i] < last_key
    if thresholds.ends[w, 1] < 0:
        return
    n = gather(keys, last_key, last_key + 1, walk, w, start, block)
    for i in range(n):
        block.words[i] = philox(thresholds.ties[w], block.elements[i])
    last_word, last_element = thresholds.ends[w, 1], thresholds.ends[w, 2]
    for i in range(n):
        word = np.int64(block.words[i])
        within = word == last_word and block.elements[i] <= last_element
        flags[block.inside[i]] = word < last_word or within
