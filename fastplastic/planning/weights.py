"""Which single weights to re-initialise: scores of weights and gradients, chosen by `select`."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastplastic.criteria import WEIGHT_CRITERIA, WeightCriterion
from fastplastic.errors import InputError, NothingToChooseError
from fastplastic.kernels import select, selection_masks
from fastplastic.model import Part, Weights
from fastplastic.planning.counts import shares, wanted_of
from fastplastic.planning.holders import Holders
from fastplastic.planning.means import mean_of, sums_of
from fastplastic.planning.request import Choice, Request, criterion_among, matching, some_of
from fastplastic.randomness import unit_noise
from fastplastic.wiring import UnitLayer

if TYPE_CHECKING:
    from fastplastic.measure import Profile

_HEAD = "as it makes the output (include '*' and its name to take it too)"
_TRANSFORMED = "as it is transformed before use"
_NOT_KEPT = "as the profile does not hold it (computed, shared, or lent for the loss)"
_STILL = "as it does not learn (requires_grad=False; include its full name to take it)"
_NO_GRADIENT = "as no gradient reaches it"


@dataclass(frozen=True, eq=False)
class _WeightPool:
    """The weights to choose from, sorted by name so that their order does not matter.

    Attributes:
        names: Name of each parameter.
        weights: Their values; of those that are cut, the part of this process.
        gradients: Their mean gradients; None where the criterion reads none.
        holders: Who holds the weights.
    """

    names: Sequence[str]
    weights: Sequence[Tensor]
    gradients: Sequence[Tensor] | None
    holders: Holders

    @property
    def parts(self) -> list[Part]:
        """Which part of each weight this process holds."""
        return [self.holders.part(*own) for own in zip(self.names, self.weights, strict=True)]

    def only(self, names: Mapping[str, int]) -> "_WeightPool":
        """Return the pool of some of its weights."""
        kept = [i for i, name in enumerate(self.names) if name in names]
        gradients = self.gradients
        return _WeightPool(
            [self.names[i] for i in kept],
            [self.weights[i] for i in kept],
            None if gradients is None else [gradients[i] for i in kept],
            self.holders,
        )


@dataclass(frozen=True, eq=False)
class _Taken:
    """What is taken of the weights.

    Attributes:
        masks: Parameter name -> mask of what this process holds, of those that give any.
        counts: Parameter name -> how many are taken in all processes, of the same.
    """

    masks: Mapping[str, Tensor]
    counts: Mapping[str, int]

    def choice(
        self, layers: Mapping[str, UnitLayer | None], pool: _WeightPool, eligible: int,
        notes: Sequence[str] = (),
    ) -> Choice:  # fmt: skip
        """Return the choice, with the parameters in the order of the layers."""
        masks = {name: self.masks[name] for name in layers if name in self.masks}
        known = pool.holders.parts
        parts = {name: known[name] for name in masks if name in known}
        return Choice(
            eligible=eligible, wiring=_bare(layers, masks), masks=masks, notes=notes, parts=parts,
            part_counts={name: self.counts[name] for name in parts},
        )  # fmt: skip


def choose_weights(profile: "Profile", request: Request, holders: Holders) -> Choice:
    """Choose single weights as `planning.plan` describes."""
    rule = WEIGHT_CRITERIA[criterion_among(request.criterion, WEIGHT_CRITERIA, "weight")]
    left: dict[str, list[str]] = {}
    weights, gradients = _kept(profile)
    layers = _candidates(profile, weights, request, left)
    holders.compare("the list of weights to choose from", list(layers))
    if rule.needs == "gradients":
        layers = _with_gradient(layers, profile, gradients, left, holders)
    pool = _pool(layers, weights, gradients if rule.needs == "gradients" else None, holders)
    notes = [rule.warning] if rule.warning else []
    notes += [f"not chosen from, {why}: {some_of(names)}" for why, names in left.items()]
    if not pool.names:
        why = "; ".join(notes) or "none is chosen"
        raise NothingToChooseError(
            f"there is no weight to choose from ({why}), expected at least one: "
            "change include, exclude or the criterion"
        )
    sizes = _eligible(pool, request)
    if request.threshold is None:
        taken = _by_ratio(pool, request, sizes)
    else:
        taken = _by_threshold(pool, rule, request, sizes, notes)
    return taken.choice(layers, pool, sum(sizes.values()), notes)


def choose_weights_like(
    profile: "Profile", request: Request, counts: Mapping[str, int], holders: Holders
) -> Choice:
    """Choose as many elements of each parameter as `counts` says, at random."""
    weights, _ = _kept(profile)
    layers = _candidates(profile, weights, request, {})
    entries = [f"{name} {counts[name]}" for name in layers if name in counts]
    holders.compare("the list of weights to take", entries)
    # At random: the gradients are not read.
    pool = _pool(layers, weights, None, holders).only(counts)
    eligible = sum(_eligible(pool, request).values())
    taken = _taken(pool, sum(counts.values()), counts, request)
    return taken.choice(layers, pool, eligible)


def _kept(profile: "Profile") -> tuple[Weights, Mapping[str, Tensor]]:
    if profile.weights is None or profile.gradients is None:
        raise InputError(
            "the profile holds no mean gradients of weights, expected them for granularity "
            "'weight': profile with gradients=True"
        )
    profile.weights.check()
    return profile.weights, profile.gradients


def _candidates(
    profile: "Profile", weights: Weights, request: Request, left: dict[str, list[str]]
) -> dict[str, UnitLayer | None]:
    """Return the parameters to choose from, each with its layer; None for what is of no layer.

    Biases, norms, embeddings and the like are taken by their full name only, and so is the head.
    """
    layers = {layer.wiring.weight: layer.wiring for layer in profile.layers}
    others = [name for name in request.include if name in weights and name not in layers]
    names = [layer.name for layer in layers.values()]
    usual = [pattern for pattern in request.include if pattern not in others]
    tied = [other for layer in layers.values() for other in layer.tied]
    included = matching(names, usual or ["*"] * (not others), "include", [*layers, *tied])
    excluded = matching(names, request.exclude, "exclude", [*layers, *others, *tied])
    found: dict[str, UnitLayer | None] = {name: None for name in others if name not in excluded}
    for weight, layer in layers.items():
        both = {weight, *layer.names}
        if not both & included or both & excluded:
            continue
        reason = _reason(layer, weights, named=bool(both & set(request.include)))
        if reason:
            left.setdefault(reason, []).append(weight)
        else:
            found[weight] = layer
    return found


def _reason(layer: UnitLayer, weights: Weights, *, named: bool) -> str:
    """Return why the weights of a layer cannot be chosen; "" when they can."""
    if layer.transformed:
        return _TRANSFORMED
    if layer.weight not in weights:
        return _NOT_KEPT
    if layer.weight in layer.without_grad and not named:
        return _STILL
    return _HEAD if layer.head and not named else ""


def _with_gradient(
    layers: Mapping[str, UnitLayer | None],
    profile: "Profile",
    gradients: Mapping[str, Tensor],
    left: dict[str, list[str]],
    holders: Holders,
) -> dict[str, UnitLayer | None]:
    """Return the parameters that have a gradient other than 0."""
    reached = torch.zeros(len(layers), dtype=torch.int64)
    for i, (name, layer) in enumerate(layers.items()):
        if name in gradients:
            own = gradients[name].any() if layer is None else not profile[layer.name].no_gradient
            reached[i] = int(own)
    found = {}
    for (name, layer), known in zip(layers.items(), holders.add(reached).tolist(), strict=True):
        if known:
            found[name] = layer
        else:
            left.setdefault(_NO_GRADIENT, []).append(name)
    return found


def _pool(
    layers: Mapping[str, UnitLayer | None],
    weights: Weights,
    gradients: Mapping[str, Tensor] | None,
    holders: Holders,
) -> _WeightPool:
    names = sorted(layers)
    devices = {str(weights[name].device): name for name in names}
    if len(devices) > 1:
        raise InputError(
            f"the weights are on {len(devices)} devices ({', '.join(devices)}), expected one: "
            "choose those of one device with include"
        )
    slopes = None if gradients is None else [gradients[name] for name in names]
    return _WeightPool(names, [weights[name] for name in names], slopes, holders)


def _by_ratio(pool: _WeightPool, request: Request, sizes: Mapping[str, int]) -> _Taken:
    """Take exactly floor(ratio * eligible), of so many eligible ones of each weight."""
    assert request.ratio is not None
    caps = {name: math.floor(request.max_layer_fraction * size) for name, size in sizes.items()}
    wanted = wanted_of(sizes, caps, request.ratio, request.max_layer_fraction, "weights")
    if request.scope == "layer":
        noise = {name: float(unit_noise(request.seed, "layer ties", name, 1)) for name in sizes}
        # Together these are all that is wanted: each weight gives what its cap allows.
        caps = shares(sizes, caps, noise, request.ratio)
    return _taken(pool, wanted, caps, request)


def _eligible(pool: _WeightPool, request: Request) -> dict[str, int]:
    """Return how many elements of each weight have a score that is not NaN."""
    # Nothing is taken: one pass that counts what is held here.
    found = select(
        pool.weights, pool.gradients, pool.names, 0, criterion=request.criterion, seed=request.seed
    )
    return _totals(pool, found.eligible)


def _totals(pool: _WeightPool, counts: Sequence[int]) -> dict[str, int]:
    """Return the sums over all processes of what each has counted in its part of the weights."""
    own = [count * part.first for count, part in zip(counts, pool.parts, strict=True)]
    totals = pool.holders.add(torch.tensor(own, dtype=torch.int64))
    return dict(zip(pool.names, totals.tolist(), strict=True))


def _taken(pool: _WeightPool, wanted: int, caps: Mapping[str, int], request: Request) -> _Taken:
    """Take the weights with the smallest scores."""
    together = pool.holders.together is not None
    shards = [part.shard for part in pool.parts] if together else None
    selection = select(
        pool.weights,
        pool.gradients,
        pool.names,
        wanted,
        criterion=request.criterion,
        caps=[caps[name] for name in pool.names],
        seed=request.seed,
        shards=shards,
        reduce=pool.holders.add if together else None,
    )
    masks = selection_masks(selection, pool.weights, pool.gradients, shards=shards)
    found = zip(pool.names, masks, selection.counts, strict=True)
    return _some(found)


def _some(found: Iterable[tuple[str, Tensor, int]]) -> _Taken:
    """Return what is taken of those weights of which any is."""
    given = [(name, mask.cpu(), count) for name, mask, count in found if count]
    masks = {name: mask for name, mask, _ in given}
    return _Taken(masks, {name: count for name, _, count in given})


def _by_threshold(
    pool: _WeightPool,
    rule: WeightCriterion,
    request: Request,
    sizes: Mapping[str, int],
    notes: list[str],
) -> _Taken:
    """Take the weights up to threshold * mean score of their tensor, the smallest ones of each."""
    assert request.threshold is not None
    if rule.name == "random":
        raise InputError(
            f"threshold {request.threshold:g} means nothing for random weights, expected a ratio"
        )
    limits = [request.threshold * mean for mean in _means(pool, rule)]
    scored = zip(_scores(pool, rule), limits, strict=True)
    passing = [(scores <= limit).cpu() for scores, limit in scored]
    counts = _totals(pool, [int(mask.count_nonzero()) for mask in passing])
    over: dict[str, int] = {}
    for name, count in counts.items():
        cap = math.floor(request.max_layer_fraction * sizes[name])
        if count > cap:
            over[name] = cap
            notes.append(
                f"{name}: {count} of {sizes[name]} weights pass the threshold, "
                f"max_layer_fraction allows {cap}: the smallest are taken"
            )
    capped = _taken(pool.only(over), sum(over.values()), over, request)
    masks = dict(zip(pool.names, passing, strict=True))
    below = _some((name, masks[name], n) for name, n in counts.items() if name not in over)
    return _Taken({**below.masks, **capped.masks}, {**below.counts, **capped.counts})


def _scores(pool: _WeightPool, rule: WeightCriterion) -> Iterator[Tensor]:
    """Yield the scores of what this process holds of each weight."""
    slopes = pool.weights if pool.gradients is None else pool.gradients
    for weight, slope in zip(pool.weights, slopes, strict=True):
        yield rule.formula(weight, slope)


def _means(pool: _WeightPool, rule: WeightCriterion) -> list[float]:
    """Return the mean of the finite scores of each whole weight."""
    scores = zip(_scores(pool, rule), pool.parts, strict=True)
    sums = torch.stack([sums_of(own).cpu() * part.first for own, part in scores])
    return [mean_of(row) for row in pool.holders.add(sums)]


def _bare(
    layers: Mapping[str, UnitLayer | None], masks: Mapping[str, Tensor]
) -> dict[str, UnitLayer]:
    """Return the layers of the masks, as far as single weights are concerned."""
    return {
        layer.name: replace(
            layer, norms=(), coupled=(), consumers=(), z_sites=(), g_sites=(), reasons={},
            hidden=torch.zeros(layer.n_units, dtype=torch.bool),
        )
        for name, layer in layers.items()
        if layer is not None and name in masks
    }  # fmt: skip
