"""How many units (or weights) each layer gives: thresholds, exact counts and the cap of a layer."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastplastic.errors import InputError

# Not tensors: on arrays as small as these, waking torch's threads takes longer than the work.
Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class Pool:
    """The eligible units of one layer, those to re-initialise first in front.

    Attributes:
        name: Name of the layer.
        units: int64 [eligible].
        scores: float64 [eligible].
        keys: float64 [eligible], ascending: a small key makes a unit a candidate.
        ties: float64 [eligible], ascending among equal keys.
        cap: Largest number of units that may be taken.
    """

    name: str
    units: Array
    scores: Array
    keys: Array
    ties: Array
    cap: int

    @classmethod
    def ordered(
        cls, name: str, units: Array, scores: Array, *, keys: Array, ties: Array, cap: int
    ) -> "Pool":
        """Return the pool of these units, which may stand in any order."""
        order = _order(keys, ties)
        return cls(name, units[order], scores[order], keys[order], ties[order], cap)


def counts_by_threshold(pools: Sequence[Pool], limit: float, notes: list[str]) -> Mapping[str, int]:
    """Return the number of units per layer whose key is at most `limit`, capped with a note."""
    counts = {}
    for pool in pools:
        passing = int((pool.keys <= limit).sum())
        counts[pool.name] = min(passing, pool.cap)
        if passing > pool.cap:
            notes.append(
                f"{pool.name}: {passing} of {len(pool.units)} eligible units pass the threshold, "
                f"max_layer_fraction allows {pool.cap}: the most extreme are taken"
            )
    return counts


def counts_by_ratio(
    pools: Sequence[Pool], ratio: float, scope: str, max_layer_fraction: float
) -> Mapping[str, int]:
    """Return the number of units per layer, together exactly floor(ratio * eligible).

    Args:
        pools: At least one.
        ratio: In (0, 1].
        scope: "global" or "layer", as for `planning.plan`.
        max_layer_fraction: What made the caps; for the error text.

    Raises:
        InputError: The caps leave too few units.
    """
    sizes = {pool.name: len(pool.units) for pool in pools}
    caps = {pool.name: pool.cap for pool in pools}
    wanted = wanted_of(sizes, caps, ratio, max_layer_fraction, "units")
    if scope == "global":
        return _global_counts(pools, wanted)
    # The tie of its first unit is fixed by the seed and the layer's name, so it orders layers too.
    return shares(sizes, caps, {pool.name: float(pool.ties[0]) for pool in pools}, ratio)


def wanted_of(
    sizes: Mapping[str, int],
    caps: Mapping[str, int],
    ratio: float,
    max_layer_fraction: float,
    what: str,
) -> int:
    """Return floor(ratio * eligible); InputError when the caps leave too few.

    Args:
        sizes: Number of eligible units (or weights) of each layer.
        caps: Most to take of each.
        ratio: In (0, 1].
        max_layer_fraction: What made the caps.
        what: What is counted, for the error text.
    """
    eligible, room = sum(sizes.values()), sum(caps.values())
    wanted = math.floor(ratio * eligible)
    if wanted > room:
        raise InputError(
            f"ratio {ratio:g} asks for {wanted} of {eligible} eligible {what}, but "
            f"max_layer_fraction {max_layer_fraction:g} allows {room}: "
            "lower the ratio or raise max_layer_fraction"
        )
    return wanted


def shares(
    sizes: Mapping[str, int], caps: Mapping[str, int], ties: Mapping[str, float], ratio: float
) -> dict[str, int]:
    """Return the count of each layer, together floor(ratio * eligible), by largest remainder.

    A layer at its cap passes its turn on; equal remainders are ordered by `ties`.
    """
    # Exact products: rounded ones could add up to more than is wanted.
    exact = {name: Fraction(ratio) * size for name, size in sizes.items()}
    counts = {name: min(math.floor(product), caps[name]) for name, product in exact.items()}
    for _ in range(math.floor(ratio * sum(sizes.values())) - sum(counts.values())):
        open_layers = [name for name in counts if counts[name] < caps[name]]
        best = max(open_layers, key=lambda name: (exact[name] - counts[name], ties[name]))
        counts[best] += 1
    return counts


def take(
    pools: Sequence[Pool], counts: Mapping[str, int]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return units and scores per layer with a count above 0, units ascending."""
    units: dict[str, Tensor] = {}
    scores: dict[str, Tensor] = {}
    for pool in pools:
        count = counts[pool.name]
        if count:
            order = np.argsort(pool.units[:count])
            units[pool.name] = torch.from_numpy(pool.units[:count][order])
            scores[pool.name] = torch.from_numpy(pool.scores[:count][order])
    return units, scores


def _order(keys: Array, ties: Array) -> Array:
    order = np.argsort(keys)
    if (np.diff(keys[order]) == 0).any():
        order = np.lexsort((ties, keys))
    return order


def _global_counts(pools: Sequence[Pool], wanted: int) -> dict[str, int]:
    # The first `cap` of each layer are all that can be taken of it.
    keys = np.concatenate([pool.keys[: pool.cap] for pool in pools])
    ties = np.concatenate([pool.ties[: pool.cap] for pool in pools])
    owner = np.repeat(np.arange(len(pools)), [pool.cap for pool in pools])
    if 0 < wanted < len(keys):
        # What is larger than the last one wanted need not be ordered.
        near = np.flatnonzero(keys <= np.partition(keys, wanted - 1)[wanted - 1])
        keys, ties, owner = keys[near], ties[near], owner[near]
    taken = np.bincount(owner[_order(keys, ties)[:wanted]], minlength=len(pools)).tolist()
    return {pool.name: count for pool, count in zip(pools, taken, strict=True)}
