"""Which units to re-initialise: scores of statistics, ordered on the host."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fastplastic.criteria import CRITERIA, Criterion, ScoredLayer
from fastplastic.errors import NothingToChooseError
from fastplastic.planning.counts import Pool, counts_by_ratio, counts_by_threshold, take
from fastplastic.planning.request import Choice, Request, criterion_among, matching, some_of
from fastplastic.randomness import unit_noise
from fastplastic.wiring import UnitLayer

if TYPE_CHECKING:
    from fastplastic.measure import LayerProfile, Profile

# Sums over weights, which are as finite as the weights are.
_SUMS = ("sum_abs_w", "sum_abs_w_out")
_WITHOUT_GRADIENT = ", or trained weights (random ones often begin with norms of zero)"


def choose_units(profile: "Profile", request: Request) -> Choice:
    """Choose units as `planning.plan` describes."""
    rule = CRITERIA[criterion_among(request.criterion, CRITERIA, "unit")]
    notes: list[str] = []
    layers = _chosen_layers(profile.layers, request)
    pools = _pools(profile, layers, rule, request, notes)
    if request.threshold is not None:
        limit = request.threshold if rule.candidate == "small" else -request.threshold
        counts = counts_by_threshold(pools, limit, notes)
    else:
        assert request.ratio is not None
        counts = counts_by_ratio(pools, request.ratio, request.scope, request.max_layer_fraction)
    units, scores = take(pools, counts)
    return Choice(
        eligible=sum(len(pool.units) for pool in pools),
        wiring=wiring_of(profile, units),
        units=units,
        scores=scores,
        notes=notes,
    )


def choose_units_like(profile: "Profile", request: Request, counts: Mapping[str, int]) -> Choice:
    """Choose as many units of each layer as `counts` says, by the criterion of the request."""
    rule = CRITERIA[request.criterion]
    pools = _pools(profile, _chosen_layers(profile.layers, request), rule, request, [])
    units, scores = take(pools, {pool.name: counts.get(pool.name, 0) for pool in pools})
    return Choice(
        eligible=sum(len(pool.units) for pool in pools),
        wiring=wiring_of(profile, units),
        units=units,
        scores=scores,
    )


def _chosen_layers(layers: Iterable["LayerProfile"], request: Request) -> list["LayerProfile"]:
    """Return the layers that may lose units; exclusion holds for coupled rows too."""
    layers = list(layers)
    names = [layer.name for layer in layers]
    tied = [other for layer in layers for other in layer.wiring.tied]
    included = matching(names, request.include or ["*"], "include", tied)
    excluded = matching(names, request.exclude, "exclude", tied)
    return [
        layer
        for layer in layers
        if not included.isdisjoint(layer.wiring.names)
        and excluded.isdisjoint(layer.wiring.tied)
        and excluded.isdisjoint({layer.name, *(member.name for member in layer.wiring.coupled)})
    ]


def scored_units(profile: "Profile", request: Request) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the score of each unit, and which may be chosen, of the layers with any of these.

    Returns:
        Layer name -> (scores, float64 [units], and bool [units]).

    Raises:
        InputError: No unit may be chosen.
    """
    rule = CRITERIA[criterion_among(request.criterion, CRITERIA, "unit")]
    found = _eligible(profile, _chosen_layers(profile.layers, request), rule, request, [])
    return {layer.name: (scores, eligible) for layer, scores, eligible in found}


def _pools(
    profile: "Profile",
    chosen: list["LayerProfile"],
    rule: Criterion,
    request: Request,
    notes: list[str],
) -> list[Pool]:
    return [
        _pool(layer, scores, eligible, rule, request)
        for layer, scores, eligible in _eligible(profile, chosen, rule, request, notes)
    ]


def _eligible(
    profile: "Profile",
    chosen: list["LayerProfile"],
    rule: Criterion,
    request: Request,
    notes: list[str],
) -> list[tuple["LayerProfile", Tensor, Tensor]]:
    found = []
    unknown: dict[str, int] = {}
    still: dict[str, int] = {}
    spoiled: dict[str, int] = {}
    for layer in chosen:
        scores = _unit_scores(profile, layer, rule, request.seed)
        hidden = layer.wiring.hidden
        if layer.wiring.names.isdisjoint(request.include):
            learning = _learning(profile, layer)
            if (hidden & ~learning).any():
                still[layer.name] = int((hidden & ~learning).sum())
            hidden = hidden & learning
        if hidden.any() and _spoiled(profile, layer, rule):
            spoiled[layer.name] = int(hidden.sum())
            continue
        eligible = hidden & scores.isfinite()
        if (hidden & ~eligible).any():
            unknown[layer.name] = int((hidden & ~eligible).sum())
        if eligible.any():
            found.append((layer, scores, eligible))
    lost = [_still_note(still)] * bool(still) + [_spoiled_note(spoiled)] * bool(spoiled)
    notes += lost
    if unknown:
        notes.append(_unknown_note(unknown, rule))
    if not found:
        if lost and not unknown:
            why = "; ".join(lost)
            raise NothingToChooseError(
                f"there is no unit to choose from, expected at least one: {why}"
            )
        raise NothingToChooseError(_nothing_eligible(chosen, unknown, rule))
    return found


def _spoiled(profile: "Profile", layer: "LayerProfile", rule: Criterion) -> bool:
    """Tell whether the figures of a layer, or of rows coupled to it, are not all finite."""
    rows = ["n_nonfinite_h"]
    if rule.needs == "gradients":
        rows += ["n_nonfinite_g", "n_nonfinite_dw", "n_nonfinite_dw_out"]
    layers = [layer, *(profile[member.name] for member in layer.wiring.coupled)]
    return any(
        any(bool(own.stats[row].any()) for row in rows)
        or not bool(torch.stack([own.stats[row] for row in _SUMS]).isfinite().all())
        for own in layers
    )


def _spoiled_note(spoiled: dict[str, int]) -> str:
    return (
        f"{sum(spoiled.values())} hidden units are left out, as NaN or infinity was seen in their "
        f"layers (activations, gradients or weights), so scores are unknown: {some_of(spoiled)}"
    )


def _learning(profile: "Profile", layer: "LayerProfile") -> Tensor:
    """Return which units are made by weights that learn, and read by such alone."""
    wiring = layer.wiring
    learning = torch.full((wiring.n_units,), wiring.weight not in wiring.without_grad)
    for consumer in wiring.consumers:
        if consumer.weight in wiring.without_grad:
            read = consumer.unit_of_column
            learning[read[read >= 0]] = False
    for member in wiring.coupled:
        other = profile[member.name].wiring
        if other.without_grad:
            rows = member.row_of_unit
            known = rows >= 0
            learning[known] &= _learning(profile, profile[member.name])[rows[known]]
    return learning


def _still_note(still: dict[str, int]) -> str:
    return (
        f"{sum(still.values())} hidden units are made or read by weights that do not learn "
        "(requires_grad=False) and are left out: to take them, include the full names of their "
        f"layers, or let the weights learn: {some_of(still)}"
    )


def _unit_scores(profile: "Profile", layer: "LayerProfile", rule: Criterion, seed: int) -> Tensor:
    """Return the score of each unit, the most extreme one over the rows that make it."""
    scores = _own_scores(layer, rule, seed)
    if rule.needs == "nothing":
        # The minimum of several random numbers would prefer units with many rows.
        return scores
    extreme = torch.fmin if rule.candidate == "small" else torch.fmax
    for member in layer.wiring.coupled:
        of_rows = _own_scores(profile[member.name], rule, seed)
        known = member.row_of_unit >= 0
        of_units = torch.full_like(scores, torch.nan)
        of_units[known] = of_rows[member.row_of_unit[known]]
        scores = extreme(scores, of_units)
    return scores


def _own_scores(layer: "LayerProfile", rule: Criterion, seed: int) -> Tensor:
    return rule.score(layer.stats, ScoredLayer(layer.name, layer.wiring.activations, seed))


def _pool(
    layer: "LayerProfile", scores: Tensor, eligible: Tensor, rule: Criterion, request: Request
) -> Pool:
    units = np.flatnonzero(eligible.numpy())
    own = scores.numpy()[units]
    return Pool.ordered(
        layer.name,
        units,
        own,
        keys=own if rule.candidate == "small" else -own,
        ties=unit_noise(request.seed, "ties", layer.name, layer.n_units).numpy()[units],
        cap=math.floor(request.max_layer_fraction * len(units)),
    )


def _unknown_note(unknown: dict[str, int], rule: Criterion) -> str:
    return (
        f"{sum(unknown.values())} hidden units have no {rule.name} score and are left out "
        f"({rule.unknown}): {some_of(unknown)}"
    )


def _nothing_eligible(
    chosen: list["LayerProfile"], unknown: dict[str, int], rule: Criterion
) -> str:
    if not unknown:
        reasons = Counter[str]()
        for layer in chosen:
            reasons.update(layer.wiring.reasons)
        why = f" (mostly: {reasons.most_common(1)[0][0]})" if reasons else ""
        return (
            f"none of the {len(chosen)} chosen layers has a hidden unit{why}, expected at least "
            "one: choose other layers with include and exclude, or single weights"
        )
    return (
        f"none of the {sum(unknown.values())} hidden units of the chosen layers has a "
        f"{rule.name} score ({rule.unknown}), expected at least one: take another criterion"
        f"{_WITHOUT_GRADIENT if rule.needs == 'gradients' else ''}"
    )


def wiring_of(profile: "Profile", units: Mapping[str, Tensor]) -> dict[str, UnitLayer]:
    """Return the wiring of the layers of units, and of those coupled to them."""
    wiring: dict[str, UnitLayer] = {}
    for name in units:
        wiring[name] = profile[name].wiring
        for member in wiring[name].coupled:
            wiring[member.name] = profile[member.name].wiring
    return wiring
