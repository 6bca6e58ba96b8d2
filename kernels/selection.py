"""The part of `select` that is the same on every device: which histograms, and what they mean.

Elements are ordered by (key, word, weight number, element). The search goes digit by digit, from
the highest (see `Digits`): those of the keys, those of the tie words among elements whose key is
the threshold, and, only where equal words are cut in two, digits of the element among those. Every
weight has its own prefix: one that meets its cap is searched by itself from then on. A weight is
left out of further passes as soon as everything or nothing of its bin is taken.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

DIGITS = 2048
Number = Literal["key", "word", "element"]
Table = NDArray[np.int64]

_NUMBERS: tuple[Literal["key", "word"], ...] = ("key", "word")


class Digits(NamedTuple):
    """How numbers are cut into digits, from the highest: (shift, bits) of each.

    Attributes:
        key: Digits of a key. Its highest bit is 0.
        word: Digits of a word.
        element: Bits of every digit of an element.
    """

    key: tuple[tuple[int, int], ...]
    word: tuple[tuple[int, int], ...]
    element: int


ELEVEN_BITS = Digits(((21, 11), (10, 11), (0, 10)), ((21, 11), (10, 11), (0, 10)), 11)
EIGHT_BITS = Digits(((23, 8), (15, 8), (7, 8), (0, 7)), ((24, 8), (16, 8), (8, 8), (0, 8)), 8)


@dataclass(frozen=True)
class Selection:
    """Which elements `select` chose, as one threshold per weight.

    Element e of weight i is selected iff (key, word, e) <= (keys[i], words[i], elements[i]) in
    lexical order, and its score is not NaN. The key is the bit pattern of its float32 score, the
    word is Philox word 0 of (seed, "ties", names[i]) at e.

    Attributes:
        criterion: Name of the score.
        seed: Seed of the tie words.
        names: Name of each weight.
        keys: Threshold of the keys, in [0, 2^31].
        words: Threshold of the words where the key is the threshold, in [-1, 2^32).
        elements: Threshold of the elements where key and word are the thresholds, -1 or more.
        counts: Number of elements selected in each weight.
        eligible: Number of elements in each weight whose score is not NaN.
    """

    criterion: str
    seed: int
    names: tuple[str, ...]
    keys: tuple[int, ...]
    words: tuple[int, ...]
    elements: tuple[int, ...]
    counts: tuple[int, ...]
    eligible: tuple[int, ...]

    @property
    def count(self) -> int:
        """Return the number of elements selected."""
        return sum(self.counts)


@dataclass(frozen=True, eq=False)
class Query:
    """What one histogram is asked for.

    Counted are, in each weight i with prefixes[i] >= 0, the elements that are eligible, have
    number >> (shift + bits) == prefixes[i], and, for "word" and "element", also key == keys[i],
    and for "element" word == words[i]. `number` is the key, the word or the element itself; the
    bin of the histogram is its digit (number >> shift) & (2^bits - 1).

    Attributes:
        number: "key", "word" or "element".
        shift: Bits to the right of the digit.
        bits: Bits of the digit.
        prefixes: int64 per weight; -1 leaves it out.
        keys: int64 per weight.
        words: int64 per weight.
    """

    number: Number
    shift: int
    bits: int
    prefixes: Table
    keys: Table
    words: Table


# Returns int64 [n_weights, 2^bits or more]; rows of weights that are left out are not read.
Histogram = Callable[[Query], Tensor]
# Adds up an int64 table over all processes, in place or returned.
Reduce = Callable[[Tensor], object]

_FREE, _OWN, _DONE = 0, 1, 2


class TotalHistogram:
    """A histogram over all processes, and a check that it is one of whole weights.

    Every process asks for the same, and decides by the same sums: none waits for another in vain.

    Args:
        histogram: Counts what this process holds.
        names: Name of each weight.
        sizes: Number of elements of each whole weight.
        held: How many of them are counted here.
        reduce: Adds up a table over all processes; None where there is one.
    """

    def __init__(
        self,
        histogram: Histogram,
        names: Sequence[str],
        sizes: Sequence[int],
        held: Sequence[int] | Table,
        reduce: Reduce | None,
    ) -> None:
        self._histogram = histogram
        self._names = names
        self._sizes = np.array(sizes, dtype=np.int64)
        self._held: Table | None = np.array(held, dtype=np.int64)
        self._reduce = reduce
        if reduce is None:
            self._check_held(self._held)
            self._held = None

    def __call__(self, query: Query) -> Table:
        """Count what the query asks for."""
        counts = self._histogram(query)
        if self._held is None:
            return self._sum(counts)
        # Once, in one more column: a reduction of its own would take as long as that of all.
        held = torch.from_numpy(self._held).to(counts.device)
        table = self._sum(torch.cat([counts, held[:, None]], dim=1))
        self._held = None
        self._check_held(table[:, -1])
        return table[:, :-1]

    def _sum(self, counts: Tensor) -> Table:
        total = counts if self._reduce is None else self._reduce(counts)
        if total is None:
            total = counts
        if not isinstance(total, Tensor) or total.shape != counts.shape:
            raise ValueError(
                f"reduce returned {_in_words(total)}, expected None or a tensor "
                f"{tuple(counts.shape)} with the sums over all processes"
            )
        table: Table = total.cpu().numpy()
        return table

    def _check_held(self, held: Table) -> None:
        for i in np.flatnonzero(held != self._sizes)[:1]:
            raise ValueError(
                f"{held[i]} elements of {self._names[i]} are counted, expected each of its "
                f"{self._sizes[i]} once: pass the shards of all processes, reduce over all of "
                "them, and counted=False to all but one that hold the same"
            )


def _in_words(value: object) -> str:
    return f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)


def select_with(
    histogram: Callable[[Query], Table],
    sizes: Sequence[int],
    names: Sequence[str],
    count: int,
    *,
    criterion: str,
    caps: Sequence[int] | None,
    seed: int,
    digits: Digits = ELEVEN_BITS,
) -> Selection:
    """Find the thresholds of the `count` smallest scores with the histograms of a backend.

    Args:
        histogram: Counts what a `Query` asks for in whole weights.
        sizes: Number of elements of each weight.
        names: As in `select`, like the arguments that follow; they have passed `check_select`.
        count: See there.
        criterion: See there.
        caps: See there.
        seed: See there.
        digits: What the histograms count; the same elements are selected with any.

    Raises:
        ValueError: `count` is more than the caps and the eligible elements allow.
    """
    if count and not sizes:
        raise too_many(count, 0, 0)
    search = _Search(sizes, count, caps)
    for number in _NUMBERS:
        for shift, bits in digits.key if number == "key" else digits.word:
            search.descend(histogram, number, shift, bits)
    search.share_equal_words()
    for shift in reversed(range(0, max(sizes, default=0).bit_length(), digits.element)):
        search.descend(histogram, "element", shift, digits.element)
    return Selection(
        criterion,
        int(seed),
        tuple(names),
        tuple(search.keys.tolist()),
        tuple(search.words.tolist()),
        tuple(search.elements.tolist()),
        tuple(search.counts.tolist()),
        tuple(search.eligible.tolist()),
    )


class _Search:
    """How far the search has come in each weight.

    A weight is free while it shares the prefix and the count with others, on its own once its
    rest of cap alone decides, and done when its thresholds are final.
    """

    def __init__(self, sizes: Sequence[int], count: int, caps: Sequence[int] | None) -> None:
        n = len(sizes)
        self.eligible = np.zeros(n, dtype=np.int64)
        self.checked = False
        # How many are still to be taken: by all free weights together, at most by each weight.
        self.remaining = int(count)
        self.caps = np.array(sizes if caps is None else caps, dtype=np.int64)
        self.state = np.full(n, _FREE)
        # The digits known of the present number, and how many elements share them.
        self.number: Number = "key"
        self.prefixes = np.zeros(n, dtype=np.int64)
        self.bins = np.zeros(n, dtype=np.int64)
        self.keys = np.zeros(n, dtype=np.int64)
        self.words = np.full(n, -1, dtype=np.int64)
        self.elements = np.full(n, -1, dtype=np.int64)
        self.counts = np.zeros(n, dtype=np.int64)

    def descend(
        self, histogram: Callable[[Query], Table], number: Number, shift: int, bits: int
    ) -> None:
        """Find one more digit in every weight that is not done."""
        active = np.flatnonzero(self.state != _DONE)
        if not len(active):
            return
        if number != self.number:
            self._end(active, self.prefixes[active])
            self.prefixes[active] = 0
            self.number = number
        prefixes = np.where(self.state == _DONE, -1, self.prefixes)
        query = Query(number, shift, bits, prefixes, self.keys, self.words)
        cumulative = histogram(query)[active, : 1 << bits].cumsum(1)
        if not self.checked:
            self._check_count(cumulative[:, -1])
        self._take(active, cumulative, self._digits(active, cumulative), bits)
        self._finish(active, shift)

    def share_equal_words(self) -> None:
        """Give elements with equal key and word to the free weights in their order."""
        active = np.flatnonzero(self.state != _DONE)
        free = active[self.state[active] == _FREE]
        most = np.minimum(self.bins[free], self.caps[free])
        before = most.cumsum() - most
        self.caps[free] = np.clip(self.remaining - before, 0, most)
        self.state[free] = _OWN
        self._finish(active, 0)

    def _check_count(self, eligible: Table) -> None:
        self.checked = True
        self.eligible = eligible.copy()
        allowed = int(np.minimum(eligible, self.caps).sum())
        if self.remaining > allowed:
            raise too_many(self.remaining, allowed, int(eligible.sum()))

    def _digits(self, active: Table, cumulative: Table) -> Table:
        """Return the digit of each active weight; who meets its cap below goes on by itself."""
        caps = self.caps[active]
        free = self.state[active] == _FREE
        digit = _common_digit(cumulative[free], caps[free], self.remaining)
        below = cumulative[:, digit - 1] if digit else np.zeros_like(caps)
        capped = free & (below >= caps)
        self.remaining -= int(caps[capped].sum())
        self.state[active[capped]] = _OWN
        digits = np.full(len(active), digit)
        own = np.flatnonzero(self.state[active] == _OWN)
        digits[own] = (cumulative[own] < caps[own, None]).sum(1)
        return digits

    def _take(self, active: Table, cumulative: Table, digits: Table, bits: int) -> None:
        """Take what lies below the digits and look at what shares them."""
        each = np.arange(len(active))
        below = np.where(digits > 0, cumulative[each, digits - 1], 0)
        self.counts[active] += below
        self.caps[active] -= below
        self.remaining -= int(below[self.state[active] == _FREE].sum())
        self.prefixes[active] = (self.prefixes[active] << bits) | digits
        self.bins[active] = cumulative[each, digits] - below

    def _finish(self, active: Table, shift: int) -> None:
        """End the search where all or none of the elements with the prefix are taken."""
        free = active[self.state[active] == _FREE]
        most = np.minimum(self.bins[free], self.caps[free])
        if self.remaining in (0, most.sum()):
            self.caps[free] = most if self.remaining else 0
            self.state[free] = _OWN
        bins, caps = self.bins[active], self.caps[active]
        nothing = (bins == 0) | (caps == 0)
        whole = (caps >= bins) & (self.state[active] == _OWN) & ~nothing
        done = active[whole | nothing]
        self.counts[active[whole]] += bins[whole]
        # The first number that is not taken, and no word: "less than".
        ends = (self.prefixes[active] + whole) << shift
        self._end(done, ends[whole | nothing], before=1)
        self.state[done] = _DONE

    def _end(self, weights: Table, numbers: Table, before: int = 0) -> None:
        """Store the threshold of the present number."""
        if self.number == "key":
            self.keys[weights] = numbers
        elif self.number == "word":
            self.words[weights] = numbers
        else:
            self.elements[weights] = numbers - before


def too_many(count: int, allowed: int, eligible: int) -> ValueError:
    """Return the error for a count that cannot be met."""
    return ValueError(
        f"count is {count}, expected at most {allowed}: {eligible} elements have a score that is "
        f"not NaN, and the caps let {allowed} of them be selected"
    )


def _common_digit(cumulative: Table, caps: Table, remaining: int) -> int:
    """Return the first digit up to which the free weights hold what remains, within caps."""
    if not len(cumulative):
        return 0
    met = cumulative[:, -1] > caps
    held = cumulative[~met].sum(0) + np.minimum(cumulative[met], caps[met, None]).sum(0)
    return int(np.searchsorted(held, remaining))
