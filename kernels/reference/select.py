"""Weight selection by a real sort of all scores: the oracle of every backend.

Where each of several processes holds a part of them, none can sort all: they are counted.
"""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastplastic.kernels.checks import Gradients, check_select, check_selection
from fastplastic.kernels.elements import Operands, counted_operands, operands_of
from fastplastic.kernels.philox import KEY_STEPS, MULTIPLIERS, ROUNDS, TIES, philox_key
from fastplastic.kernels.scores import SCORES
from fastplastic.kernels.selection import (
    DIGITS,
    Query,
    Reduce,
    Selection,
    Table,
    TotalHistogram,
    select_with,
    too_many,
)
from fastplastic.kernels.shards import Shards, WeightShard, sizes_of

_INFINITE = 0x7F800000


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
    """Choose the elements with the smallest scores; see `fastplastic.kernels.select`."""
    check_select(weights, gradients, names, count, criterion, caps, shards)
    operands = counted_operands(criterion, weights, gradients, shards)
    orders = _orders(operands, criterion, seed, names, shards)
    sizes, held = sizes_of(weights, shards), [order.shape[1] for order in orders]
    device = weights[0].device if len(weights) else torch.device("cpu")
    histogram = partial(_histogram, orders, device)
    total = TotalHistogram(histogram, names, sizes, held, reduce)
    if reduce is not None:
        return select_with(total, sizes, names, count, criterion=criterion, caps=caps, seed=seed)
    table = np.concatenate([np.zeros((4, 0), dtype=np.int64), *orders], axis=1)
    ends, counts, eligible = _sorted(table, len(names), count, caps)
    keys, words, elements = (tuple(column.tolist()) for column in ends.T)
    return Selection(
        criterion, int(seed), tuple(names), keys, words, elements,
        tuple(counts.tolist()), tuple(eligible.tolist()),
    )  # fmt: skip


def selection_masks(
    selection: Selection,
    weights: Sequence[Tensor],
    gradients: Gradients,
    *,
    shards: Shards = None,
) -> list[Tensor]:
    """Return which elements of each weight are selected; see `fastplastic.kernels`."""
    check_selection(selection, weights, gradients, shards)
    operands = operands_of(selection.criterion, weights, gradients)
    orders = _orders(operands, selection.criterion, selection.seed, selection.names, shards)
    pairs = enumerate(zip(weights, orders, strict=True))
    return [_mask(selection, i, order).reshape(w.shape).to(w.device) for i, (w, order) in pairs]


def elements_of(weight: Tensor, shard: WeightShard | None) -> Table:
    """Return the number of each element of a weight, or of a part of one, in row-major order."""
    if shard is None:
        return np.arange(weight.numel(), dtype=np.int64)
    return shard.elements(weight.shape)


def philox_words(key: int, elements: Table) -> NDArray[np.uint32]:
    """Return word 0 of elements."""
    element = elements.astype(np.uint64)
    low = np.uint64(0xFFFFFFFF)
    c0, c1, c2, c3 = element & low, element >> np.uint64(32), element * 0, element * 0
    k0, k1 = key & 0xFFFFFFFF, key >> 32
    for _ in range(ROUNDS):
        p0, p1 = np.uint64(MULTIPLIERS[0]) * c0, np.uint64(MULTIPLIERS[1]) * c2
        c0 = (p1 >> np.uint64(32)) ^ c1 ^ np.uint64(k0)
        c2 = (p0 >> np.uint64(32)) ^ c3 ^ np.uint64(k1)
        c1, c3 = p1 & low, p0 & low
        k0, k1 = (k0 + KEY_STEPS[0]) & 0xFFFFFFFF, (k1 + KEY_STEPS[1]) & 0xFFFFFFFF
    return c0.astype(np.uint32)


def _sorted(
    table: Table, n_weights: int, count: int, caps: Sequence[int] | None
) -> tuple[Table, Table, Table]:
    """Return the last key, word and element of each weight, how many are taken, and eligible."""
    table = table[:, table[0] <= _INFINITE]
    eligible = np.bincount(table[2], minlength=n_weights)
    key, word, weight, element = table[:, np.lexsort(table[::-1])]
    if caps is not None:
        within = _rank_in_own(weight, n_weights) < np.array(caps, dtype=np.int64)[weight]
        key, word, weight, element = (v[within] for v in (key, word, weight, element))
    if count > len(key):
        raise too_many(count, len(key), int(eligible.sum()))
    ends = np.full((n_weights, 3), [0, -1, -1], dtype=np.int64)
    # The last one of each weight stays.
    for column, values in enumerate((key, word, element)):
        ends[weight[:count], column] = values[:count]
    return ends, np.bincount(weight[:count], minlength=n_weights), eligible


def _histogram(orders: Sequence[Table], device: torch.device, query: Query) -> Tensor:
    """Count what a query asks for, int64 [n_weights, DIGITS] on the device of the weights."""
    table = np.zeros((len(orders), DIGITS), dtype=np.int64)
    for i, (key, word, _, element) in enumerate(orders):
        counted = key <= _INFINITE
        if query.number != "key":
            counted &= key == query.keys[i]
        if query.number == "element":
            counted &= word == query.words[i]
        number = {"key": key, "word": word, "element": element}[query.number][counted]
        own = number[number >> (query.shift + query.bits) == query.prefixes[i]]
        digits = (own >> query.shift) & ((1 << query.bits) - 1)
        table[i] = np.bincount(digits, minlength=DIGITS)
    return torch.from_numpy(table).to(device)


def _mask(selection: Selection, i: int, order: Table) -> Tensor:
    key, word, _, element = order
    last_key, last_word = selection.keys[i], selection.words[i]
    chosen = (key == last_key) & (word == last_word) & (element <= selection.elements[i])
    chosen |= (key == last_key) & (word < last_word)
    chosen |= key < last_key
    chosen &= key <= _INFINITE
    return torch.from_numpy(chosen)


def _orders(
    operands: Sequence[Operands], criterion: str, seed: int, names: Sequence[str], shards: Shards
) -> list[Table]:
    """Return key, word, weight number and element of all elements of each weight, int64 [4, n]."""
    parts = shards or [None] * len(operands)
    orders = []
    for i, ((weight, gradient, _), shard) in enumerate(zip(operands, parts, strict=True)):
        slope = None if gradient is None else gradient.detach().cpu()
        score = SCORES[criterion].of(weight.detach().cpu(), slope)
        # The sign is that of a NaN: 0 times infinity gives a negative one.
        key = score.reshape(-1).numpy().view(np.int32).astype(np.int64) & 0x7FFFFFFF
        element = elements_of(weight, shard)
        word = philox_words(philox_key(seed, TIES, names[i]), element)
        orders.append(np.stack([key, word.astype(np.int64), np.full_like(key, i), element]))
    return orders


def _rank_in_own(weight: Table, n_weights: int) -> Table:
    """Return how many elements of the same weight come before each."""
    rank = np.empty_like(weight)
    for i in range(n_weights):
        own = np.flatnonzero(weight == i)
        rank[own] = np.arange(len(own))
    return rank
