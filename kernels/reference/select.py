"""Weight selection by a real sort of all scores: the oracle of every backend."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastplastic.kernels.checks import Gradients, check_select, check_selection
from fastplastic.kernels.philox import KEY_STEPS, MULTIPLIERS, ROUNDS, TIES, philox_key
from fastplastic.kernels.scores import SCORES
from fastplastic.kernels.selection import Selection, Table, too_many

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
) -> Selection:
    """Choose the elements with the smallest scores; see `fastplastic.kernels.select`."""
    check_select(weights, gradients, names, count, criterion, caps)
    orders = [
        np.stack(_order(weights, gradients, criterion, seed, name, i))
        for i, name in enumerate(names)
    ]
    table = np.concatenate([np.zeros((4, 0), dtype=np.int64), *orders], axis=1)
    table = table[:, table[0] <= _INFINITE]
    eligible = np.bincount(table[2], minlength=len(names))
    key, word, weight, element = table[:, np.lexsort(table[::-1])]
    if caps is not None:
        within = _rank_in_own(weight, len(names)) < np.array(caps, dtype=np.int64)[weight]
        key, word, weight, element = (v[within] for v in (key, word, weight, element))
    if count > len(key):
        raise too_many(count, len(key), int(eligible.sum()))
    ends = np.full((len(names), 3), [0, -1, -1], dtype=np.int64)
    # The last one of each weight stays.
    for column, values in enumerate((key, word, element)):
        ends[weight[:count], column] = values[:count]
    counts = np.bincount(weight[:count], minlength=len(names))
    keys, words, elements = (tuple(column.tolist()) for column in ends.T)
    return Selection(
        criterion, int(seed), tuple(names), keys, words, elements,
        tuple(counts.tolist()), tuple(eligible.tolist()),
    )  # fmt: skip


def selection_masks(
    selection: Selection, weights: Sequence[Tensor], gradients: Gradients
) -> list[Tensor]:
    """Return which elements of each weight are selected; see `fastplastic.kernels`."""
    check_selection(selection, weights, gradients)
    return [_mask(selection, weights, gradients, i) for i in range(len(weights))]


def philox_words(key: int, n: int) -> NDArray[np.uint32]:
    """Return word 0 of the elements 0 to n - 1."""
    element = np.arange(n, dtype=np.uint64)
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


def _mask(selection: Selection, weights: Sequence[Tensor], gradients: Gradients, i: int) -> Tensor:
    key, word, _, element = _order(
        weights, gradients, selection.criterion, selection.seed, selection.names[i], i
    )
    last_key, last_word = selection.keys[i], selection.words[i]
    chosen = (key == last_key) & (word == last_word) & (element <= selection.elements[i])
    chosen |= (key == last_key) & (word < last_word)
    chosen |= key < last_key
    chosen &= key <= _INFINITE
    return torch.from_numpy(chosen).reshape(weights[i].shape).to(weights[i].device)


def _order(
    weights: Sequence[Tensor], gradients: Gradients, criterion: str, seed: int, name: str, i: int
) -> tuple[Table, Table, Table, Table]:
    """Return key, word, weight number and element of every element of a weight."""
    gradient = None if gradients is None else gradients[i]
    slope = None if gradient is None else gradient.detach().cpu()
    score = SCORES[criterion].of(weights[i].detach().cpu(), slope)
    n = score.numel()
    # The sign is that of a NaN: 0 times infinity gives a negative one.
    key = score.reshape(n).numpy().view(np.int32).astype(np.int64) & 0x7FFFFFFF
    word = philox_words(philox_key(seed, TIES, name), n).astype(np.int64)
    return key, word, np.full(n, i, dtype=np.int64), np.arange(n, dtype=np.int64)


def _rank_in_own(weight: Table, n_weights: int) -> Table:
    """Return how many elements of the same weight come before each."""
    rank = np.empty_like(weight)
    for i in range(n_weights):
        own = np.flatnonzero(weight == i)
        rank[own] = np.arange(len(own))
    return rank
