"""Numba: the histograms by which `select` finds its thresholds.

The first pass reads every weight and gradient, counts the first digits of the keys, and keeps the
elements whose digit is near that of the threshold, which a small sample has told. The passes that
follow read only what was kept; where that does not do (a cap, many equal scores, a sample that
misled) they read the weights concerned again. Counts are exact either way.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastplastic.kernels.cpu.elements import (
    BLOCK,
    NO_KEY,
    Block,
    compiled,
    fill_keys,
    gather,
    kernel,
    new_block,
    philox,
)
from fastplastic.kernels.cpu.memory import next_task
from fastplastic.kernels.cpu.tasks import on_threads
from fastplastic.kernels.elements import Table, Walks, tasks
from fastplastic.kernels.scores import SCORES, Score
from fastplastic.kernels.selection import DIGITS, Query

# Elements that a task keeps at most: one in 16 of what it reads, and some.
_ROOM, _LEAST_ROOM = 16, 512
# Part of each task in the sample: its first 64th.
_SAMPLE = 64
_NUMBERS = ("key", "word", "element")
_KEY, _WORD = 0, 1
# Bits of a key to the right of its first digit, and digits above that of infinity: only NaN.
_TOP = 21
_DIGITS_OF_NAN = 0x3FD
# The highest bit of a key is 0.
_FIRST_DIGITS = DIGITS // 2
_TOP_SHIFT = np.uint32(_TOP)


class Kept(NamedTuple):
    """Elements that tasks keep for further passes.

    Attributes:
        ranges: int64 [n_tasks, 2], of which first digits those are: from, to before.
        counts: int64 [n_tasks], how many; -1 where there was no room for all.
        rooms: int64 [n_tasks + 1], where the room of each task begins and the last one ends.
        keys: int32 [room of all].
        elements: int64 [room of all].
    """

    ranges: Any
    counts: Any
    rooms: Any
    keys: Any
    elements: Any


class Digit(NamedTuple):
    """A `Query` as Numba takes it.

    Attributes:
        number: Place of what is counted in `_NUMBERS`.
        shift: Bits to the right of the digit.
        bits: Bits of the digit.
        prefixes: int64 per weight; -1 leaves it out.
        tops: int64 per weight, the first digit of the keys that matter.
        keys: int64 per weight.
        words: int64 per weight.
    """

    number: int
    shift: int
    bits: int
    prefixes: Any
    tops: Any
    keys: Any
    words: Any


class Histogram:
    """Answers the queries of the search on the host, and keeps elements for the next one."""

    def __init__(
        self, criterion: str, walk: Walks, ties: Any, count: int, caps: Sequence[int], size: int
    ) -> None:
        self._count = count
        self._size = size
        # Who holds a part of the elements cannot tell whether a sample has misled.
        self._apart = int(walk.counts.sum()) < size
        self._caps = np.array(caps, dtype=np.int64)
        self._score = SCORES[criterion]
        self._walk = walk
        self._ties = ties
        self._pieces = pieces = tasks(walk.counts, torch.get_num_threads())
        rooms = np.append(0, ((pieces[:, 2] - pieces[:, 1]) // _ROOM + _LEAST_ROOM).cumsum())
        self._kept = Kept(
            np.zeros((len(pieces), 2), dtype=np.int64),
            np.zeros(len(pieces), dtype=np.int64),
            rooms,
            np.empty(rooms[-1], dtype=np.int32),
            np.empty(rooms[-1], dtype=np.int64),
        )

    def __call__(self, query: Query) -> Tensor:
        """Count what the query asks for, in int64 [n_weights, DIGITS]."""
        return torch.from_numpy(self._counts(query))

    def _counts(self, query: Query) -> Table:
        if query.number == "key" and query.shift == _TOP:
            return self._all()
        digit = _digit(query)
        # To wake threads takes longer than to look at what was kept.
        most = 1 if self._has_kept(digit) else None
        counts, turn = np.zeros((len(self._pieces), DIGITS), dtype=np.int32), np.zeros(1, np.int64)
        shared = (self._walk, self._pieces, turn, self._ties, self._kept, counts)
        on_threads(_refine, self._score, digit, *shared, most=most)
        return self._fold(counts)

    def _all(self) -> Table:
        """Count the first digits of all keys, and keep elements near the threshold.

        Digits above the threshold may be counted as the highest one: they are not told apart where
        that saves time and all elements are here.
        """
        low, high = self._guess()
        self._kept.ranges[:] = low, high
        table = self._scan(self._pieces)
        if not self._apart and np.minimum(table[:, :high].sum(1), self._caps).sum() < self._count:
            # The sample has misled.
            self._kept.ranges[:] = 0
            table = self._scan(self._pieces)
        return table

    def _guess(self) -> tuple[int, int]:
        """Return from which first digit to before which the threshold lies by a sample."""
        sample = self._pieces.copy()
        sample[:, 2] = sample[:, 1] + -((sample[:, 1] - sample[:, 2]) // _SAMPLE)
        counts = self._scan(sample, most=1)[:, :_DIGITS_OF_NAN].sum(0)
        below = counts.cumsum() / max(1, counts.sum())
        share = self._count / max(1, self._size)
        slack = 0.02 * share + 0.001
        low = int(np.searchsorted(below, share - slack))
        high = min(int(np.searchsorted(below, share + slack)) + 1, _DIGITS_OF_NAN)
        return low, high

    def _scan(self, pieces: Table, most: int | None = None) -> Table:
        counts, turn = np.empty((len(pieces), DIGITS), dtype=np.int32), np.zeros(1, np.int64)
        shared = (self._walk, pieces, turn, self._kept, counts)
        on_threads(_scan, self._score, self._apart, *shared, most=most)
        table = self._fold(counts)
        table[:, _DIGITS_OF_NAN:] = 0
        return table

    def _has_kept(self, digit: Digit) -> bool:
        """Tell whether all elements that matter were kept."""
        walk = self._pieces[:, 0]
        top, ranges = digit.tops[walk], self._kept.ranges
        within = (ranges[:, 0] <= top) & (top < ranges[:, 1]) & (self._kept.counts >= 0)
        return bool((within | (digit.prefixes[walk] < 0)).all())

    def _fold(self, counts: Any) -> Table:
        """Add up the counts of the tasks of each weight, int64 [n_weights, DIGITS]."""
        table = np.zeros((len(self._ties), DIGITS), dtype=np.int64)
        _fold(counts, self._pieces, table)
        return table


def _digit(query: Query) -> Digit:
    known = query.shift + query.bits
    tops = query.prefixes >> (_TOP - known) if query.number == "key" else query.keys >> _TOP
    number = _NUMBERS.index(query.number)
    return Digit(number, query.shift, query.bits, query.prefixes, tops, query.keys, query.words)


@kernel
def _scan(
    score: Score, exact: bool, walk: Walks, pieces: Table, turn: Any, kept: Kept, counts: Any
) -> None:
    """Count the first digits of the keys of each task, int32 [n_tasks, DIGITS], and keep some."""
    block = new_block()
    # Four counters for one digit: else each increment waits for the one before.
    lanes = np.empty((4, _FIRST_DIGITS), dtype=np.int32)
    t = next_task(turn.ctypes.data)
    while t < len(pieces):
        _scan_task(score, exact, walk, pieces[t], kept, t, block, lanes)
        _add_lanes(lanes, counts[t])
        t = next_task(turn.ctypes.data)


@compiled
def _scan_task(
    score: Score, exact: bool, walk: Walks, piece: Any, kept: Kept, t: int, block: Block, lanes: Any
) -> None:
    w, start, stop = piece
    low, high = kept.ranges[t]
    lanes[:] = 0
    kept.counts[t] = 0
    for position in range(start, stop, BLOCK):
        n = min(BLOCK, stop - position)
        keys = fill_keys(score, walk, w, position, n, block.buffers)
        if low >= high:
            _count_first_digits(keys, lanes)
            continue
        found = gather(keys, 0, high << _TOP, walk, w, position, block)
        _count_first_digits(keys if exact else block.keys[:found], lanes)
        if not exact:
            lanes[0, _DIGITS_OF_NAN - 1] += _count_numbers(keys) - found
        _keep(kept, t, low << _TOP, block, found)


@compiled
def _count_numbers(keys: Any) -> Any:
    numbers = np.int32(0)
    for i in range(keys.size):
        numbers += np.int32(keys[i] != NO_KEY)
    return numbers


@compiled
def _count_first_digits(keys: Any, lanes: Any) -> None:
    whole = keys.size // 4 * 4
    for i in range(0, whole, 4):
        lanes[0, np.uint32(keys[i]) >> _TOP_SHIFT] += 1
        lanes[1, np.uint32(keys[i + 1]) >> _TOP_SHIFT] += 1
        lanes[2, np.uint32(keys[i + 2]) >> _TOP_SHIFT] += 1
        lanes[3, np.uint32(keys[i + 3]) >> _TOP_SHIFT] += 1
    for i in range(whole, keys.size):
        lanes[0, np.uint32(keys[i]) >> _TOP_SHIFT] += 1


@compiled
def _add_lanes(lanes: Any, counts: Any) -> None:
    counts[:] = 0
    for digit in range(_FIRST_DIGITS):
        counts[digit] = lanes[0, digit] + lanes[1, digit] + lanes[2, digit] + lanes[3, digit]


@compiled
def _keep(kept: Kept, t: int, low: int, block: Block, found: int) -> None:
    """Append what was found in a block and has at least the key `low` to what a task keeps."""
    n = kept.counts[t]
    first, end = kept.rooms[t] + n, kept.rooms[t + 1]
    if n < 0 or first + found > end:
        kept.counts[t] = -1
        return
    keys, elements = kept.keys[first:end], kept.elements[first:end]
    more = 0
    # Without a branch, as in `compact`.
    for i in range(found):
        keys[more] = block.keys[i]
        elements[more] = block.elements[i]
        more += block.keys[i] >= low
    kept.counts[t] = n + more


@compiled
def _fold(counts: Any, pieces: Table, table: Table) -> None:
    for t in range(len(pieces)):
        row, part = table[pieces[t, 0]], counts[t]
        for digit in range(DIGITS):
            row[digit] += part[digit]


@kernel
def _refine(
    score: Score, digit: Digit, walk: Walks, pieces: Table, turn: Any, ties: Any,
    kept: Kept, counts: Any,
) -> None:  # fmt: skip
    """Count a digit of what has the prefix in each task, int32 [n_tasks, DIGITS]."""
    block = new_block()
    t = next_task(turn.ctypes.data)
    while t < len(pieces):
        if digit.prefixes[pieces[t, 0]] >= 0:
            _refine_task(score, digit, walk, pieces[t], ties, kept, t, block, counts[t])
        t = next_task(turn.ctypes.data)


@compiled
def _refine_task(
    score: Score, digit: Digit, walk: Walks, piece: Any, ties: Any,
    kept: Kept, t: int, block: Block, counts: Any,
) -> None:  # fmt: skip
    w, start, stop = piece
    top = digit.tops[w]
    if kept.counts[t] >= 0 and kept.ranges[t, 0] <= top < kept.ranges[t, 1]:
        first, end = kept.rooms[t], kept.rooms[t] + kept.counts[t]
        _count(digit, w, ties[w], kept.keys[first:end], kept.elements[first:end], counts)
        return
    kept.counts[t] = 0
    kept.ranges[t, 0], kept.ranges[t, 1] = top, top + 1
    for position in range(start, stop, BLOCK):
        n = min(BLOCK, stop - position)
        keys = fill_keys(score, walk, w, position, n, block.buffers)
        found = gather(keys, top << _TOP, (top + 1) << _TOP, walk, w, position, block)
        _keep(kept, t, top << _TOP, block, found)
        _count(digit, w, ties[w], block.keys[:found], block.elements[:found], counts)


@compiled
def _count(digit: Digit, w: int, tie: Any, keys: Any, elements: Any, counts: Any) -> None:
    """Add the elements that the query asks for to the counts of their digits."""
    known, mask = digit.shift + digit.bits, (1 << digit.bits) - 1
    prefix = digit.prefixes[w]
    if digit.number == _KEY:
        for i in range(keys.size):
            if keys[i] >> known == prefix:
                counts[(keys[i] >> digit.shift) & mask] += 1
        return
    equal = elements[keys == digit.keys[w]]
    words = np.empty(equal.size, dtype=np.uint32)
    for i in range(equal.size):
        words[i] = philox(tie, equal[i])
    for i in range(equal.size):
        word = np.int64(words[i])
        rest = equal[i] if word == digit.words[w] else -1
        number = word if digit.number == _WORD else rest
        if number >> known == prefix:
            counts[(number >> digit.shift) & mask] += 1
