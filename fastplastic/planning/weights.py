"""Which single weights to re-initialise: scores of weights and gradients, chosen by `select`."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastplastic.criteria import WEIGHT_CRITERIA, WeightCriterion
from fastplastic.errors import InputError, NothingToChooseError
from fastplastic.kernels import select, selection_masks
from fastplastic.model import Weights
from fastplastic.planning.counts import shares, wanted_of
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
        weights: Their values.
        gradients: Their mean gradients; None where the criterion reads none.
    """

    names: Sequence[str]
    weights: Sequence[Tensor]
    gradients: Sequence[Tensor] | None

    def only(self, names: Mapping[str, int]) -> "_WeightPool":
        """Return the pool of some of its weights."""
        kept = [i for i, name in enumerate(self.names) if name in names]
        gradients = self.gradients
        return _WeightPool(
            [self.names[i] for i in kept],
            [self.weights[i] for i in kept],
            None if gradients is None else [gradients[i] for i in kept],
        )


def choose_weights(profile: "Profile", request: Request) -> Choice:
    """Choose single weights as `planning.plan` describes."""
    rule = WEIGHT_CRITERIA[criterion_among(request.criterion, WEIGHT_CRITERIA, "weight")]
    weights, gradients = _kept(profile)
    left: dict[str, list[str]] = {}
    layers = _candidates(profile, weights, request, left)
    if rule.needs == "gradients":
        layers = _with_gradient(layers, profile, gradients, left)
    pool = _pool(layers, weights, gradients if rule.needs == "gradients" else None)
    notes = [rule.warning] if rule.warning else []
    notes += [f"not chosen from, {why}: {some_of(names)}" for why, names in left.items()]
    if not pool.names:
        why = "; ".join(notes) or "none is chosen"
        raise NothingToChooseError(
            f"there is no weight to choose from ({why}), expected at least one: "
            "change include, exclude or the criterion"
        )
    if request.threshold is None:
        eligible, masks = _by_ratio(pool, request)
    else:
        eligible, masks = _by_threshold(pool, rule, request, notes)
    # The weights were sorted; a reader expects the order of the layers.
    masks = {name: masks[name] for name in layers if name in masks}
    return Choice(eligible=eligible, wiring=_bare(layers, masks), masks=masks, notes=notes)


def choose_weights_like(profile: "Profile", request: Request, counts: Mapping[str, int]) -> Choice:
    """Choose as many elements of each parameter as `counts` says, at random."""
    weights, _ = _kept(profile)
    layers = _candidates(profile, weights, request, {})
    # At random: the gradients are not read.
    pool = _pool(layers, weights, None).only(counts)
    masks = _masks(pool, sum(counts.values()), counts, request)
    return Choice(
        eligible=sum(_eligible(pool, request).values()), wiring=_bare(layers, masks), masks=masks
    )


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
) -> dict[str, UnitLayer | None]:
    """Return the parameters that have a gradient other than 0."""
    found = {}
    for name, layer in layers.items():
        if layer is None:
            known = name in gradients and bool(gradients[name].any())
        else:
            known = name in gradients and not profile[layer.name].no_gradient
        if known:
            found[name] = layer
        else:
            left.setdefault(_NO_GRADIENT, []).append(name)
    return found


def _pool(
    layers: Mapping[str, UnitLayer | None],
    weights: Weights,
    gradients: Mapping[str, Tensor] | None,
) -> _WeightPool:
    names = sorted(layers)
    devices = {str(weights[name].device): name for name in names}
    if len(devices) > 1:
        raise InputError(
            f"the weights are on {len(devices)} devices ({', '.join(devices)}), expected one: "
            "choose those of one device with include"
        )
    slopes = None if gradients is None else [gradients[name] for name in names]
    return _WeightPool(names, [weights[name] for name in names], slopes)


def _by_ratio(pool: _WeightPool, request: Request) -> tuple[int, dict[str, Tensor]]:
    """Return how many weights are eligible, and the masks of exactly floor(ratio * eligible)."""
    assert request.ratio is not None
    sizes = _eligible(pool, request)
    caps = {name: math.floor(request.max_layer_fraction * size) for name, size in sizes.items()}
    wanted = wanted_of(sizes, caps, request.ratio, request.max_layer_fraction, "weights")
    if request.scope == "layer":
        noise = {name: float(unit_noise(request.seed, "layer ties", name, 1)) for name in sizes}
        # Together these are all that is wanted: each weight gives what its cap allows.
        caps = shares(sizes, caps, noise, request.ratio)
    return sum(sizes.values()), _masks(pool, wanted, caps, request)


def _eligible(pool: _WeightPool, request: Request) -> dict[str, int]:
    """Return how many elements of each weight have a score that is not NaN."""
    # Nothing is taken: one pass that counts.
    found = select(
        pool.weights, pool.gradients, pool.names, 0, criterion=request.criterion, seed=request.seed
    )
    return dict(zip(pool.names, found.eligible, strict=True))


def _masks(
    pool: _WeightPool, wanted: int, caps: Mapping[str, int], request: Request
) -> dict[str, Tensor]:
    """Return the masks of the weights with the smallest scores, of those that have any."""
    selection = select(
        pool.weights,
        pool.gradients,
        pool.names,
        wanted,
        criterion=request.criterion,
        caps=[caps[name] for name in pool.names],
        seed=request.seed,
    )
    masks = selection_masks(selection, pool.weights, pool.gradients)
    return {
        name: mask.cpu()
        for name, mask, count in zip(pool.names, masks, selection.counts, strict=True)
        if count
    }


def _by_threshold(
    pool: _WeightPool, rule: WeightCriterion, request: Request, notes: list[str]
) -> tuple[int, dict[str, Tensor]]:
    """Return how many weights are eligible, and the masks of those up to threshold * mean score."""
    assert request.threshold is not None
    if rule.name == "random":
        raise InputError(
            f"threshold {request.threshold:g} means nothing for random weights, expected a ratio"
        )
    sizes = _eligible(pool, request)
    masks = {}
    over: dict[str, int] = {}
    slopes = pool.weights if pool.gradients is None else pool.gradients
    for name, weight, slope in zip(pool.names, pool.weights, slopes, strict=True):
        scores = rule.formula(weight, slope)
        passing = scores <= request.threshold * _mean(scores)
        count, cap = int(passing.sum()), math.floor(request.max_layer_fraction * sizes[name])
        if count > cap:
            over[name] = cap
            notes.append(
                f"{name}: {count} of {sizes[name]} weights pass the threshold, "
                f"max_layer_fraction allows {cap}: the smallest are taken"
            )
        elif count:
            masks[name] = passing.cpu()
    masks |= _masks(pool.only(over), sum(over.values()), over, request)
    return sum(sizes.values()), masks


def _mean(scores: Tensor) -> float:
    """Return the mean of the finite scores; NaN, which nothing is below, without any."""
    finite = scores.isfinite()
    if not finite.all():
        scores = scores[finite]
    return float(scores.mean(dtype=torch.float64))


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
