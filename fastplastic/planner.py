"""Which units to re-initialise: a pure function from a profile to a plan. No model is seen here."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastplastic.criteria import CRITERIA, Criterion, Layer
from fastplastic.errors import InputError
from fastplastic.quotas import Pool, counts_by_ratio, counts_by_threshold, take
from fastplastic.randomness import unit_noise
from fastplastic.wiring import UnitLayer

if TYPE_CHECKING:
    from fastplastic.profile import LayerProfile, Profile

GRANULARITIES = ("unit",)
SCOPES = ("layer", "global")
_NAMES_IN_A_NOTE = 5
_WITHOUT_GRADIENT = ", or trained weights (random ones often begin with norms of zero)"


@dataclass(frozen=True, eq=False, repr=False)
class Plan:
    """Which units to re-initialise, and why. Made by `plan`, applied by `reinit_`.

    Attributes:
        units: Layer name -> the selected units, int64, ascending; no layer is empty.
        scores: Layer name -> the score of each selected unit, float64.
        wiring: Layer name -> how its units are wired, of every layer in `units` and of those whose
            rows are coupled to them.
        eligible: Number of units there were to choose from.
        criterion: Name in `criteria.CRITERIA`.
        ratio: Share of the eligible units that was asked for, or None.
        threshold: Score that was asked for, or None; one of the two is given.
        scope: Whether the ratio holds for each layer or for all together.
        granularity: "unit".
        max_layer_fraction: Largest share of the eligible units of any layer.
        seed: Seed of the ties and of the criterion `random`.
        fingerprint: Fingerprint of the model that was profiled.
        masks: Parameter name -> bool mask of single weights; empty for granularity "unit".
        notes: What a reader should know, one sentence each.
    """

    units: Mapping[str, Tensor]
    scores: Mapping[str, Tensor]
    wiring: Mapping[str, UnitLayer]
    eligible: int
    criterion: str
    ratio: float | None
    threshold: float | None
    scope: str
    granularity: str
    max_layer_fraction: float
    seed: int
    fingerprint: str
    masks: Mapping[str, Tensor] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        amount = f"ratio {self.ratio:g}" if self.ratio is not None else f"up to {self.threshold:g}"
        return (
            f"Plan({self.criterion}, {amount}: {self.count} of {self.eligible} units "
            f"in {len(self.units)} layers)"
        )

    @property
    def count(self) -> int:
        """Number of units selected."""
        return sum(len(units) for units in self.units.values())

    def save(self, path: str | Path, *, force: bool = False) -> None:
        """Write the plan as JSON that a person can read; an unfinished file never shows.

        Raises:
            FileError: The path cannot be written, or exists and `force` is false.
        """
        from fastplastic.plan_file import save_plan

        save_plan(self, path, force=force)

    @classmethod
    def load(cls, path: str | Path) -> "Plan":
        """Read a plan that `save` wrote, perhaps edited by hand since.

        Raises:
            FileError: The file is missing, not a plan, of another version, or inconsistent.
        """
        from fastplastic.plan_file import load_plan

        return load_plan(path)


def plan(
    profile: "Profile",
    *,
    criterion: str = "dormant",
    ratio: float | None = None,
    threshold: float | None = None,
    granularity: str = "unit",
    scope: str = "global",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    max_layer_fraction: float = 0.5,
    seed: int = 0,
) -> Plan:
    """Choose the units to re-initialise.

    Eligible are the hidden units of the chosen layers with a known score. A unit made by several
    rows is as healthy as its weakest row. Equal scores are ordered by a hash of (seed, layer name,
    unit), so the choice depends neither on the order of layers nor on which others are looked at.

    Args:
        profile: What `fastplastic.profile` or a `Monitor` measured.
        criterion: Name in `criteria.CRITERIA`; formulas and sources stand there.
        ratio: Select exactly floor(ratio * eligible units), in (0, 1].
        threshold: Select the units whose score is at most (for `frozen` and `saturated`: at least)
            this. Give either this or `ratio`.
        granularity: "unit", the only one of this version.
        scope: "global" compares the scores of all layers, "layer" takes the ratio of each layer
            (largest remainders get the units left over, so that the total is exact).
        include: Patterns (fnmatch) of layer names to choose from; empty for all.
        exclude: Patterns of layer names whose rows stay as they are.
        max_layer_fraction: Never more than floor(this * eligible units) of a layer, in (0, 1].
        seed: Any integer.

    Raises:
        InputError: An argument is unusable, nothing is eligible, or `max_layer_fraction` leaves
            too few units for `ratio`.
    """
    rule = _rule(criterion)
    _check_choices(granularity, scope, seed)
    _check_amounts(ratio, threshold, max_layer_fraction)
    notes: list[str] = []
    chosen = _chosen_layers(profile.layers, _patterns(include), _patterns(exclude))
    pools = _pools(profile, chosen, rule, max_layer_fraction, seed, notes)
    if threshold is not None:
        limit = threshold if rule.candidate == "small" else -threshold
        counts = counts_by_threshold(pools, limit, notes)
    else:
        assert ratio is not None
        counts = counts_by_ratio(pools, ratio, scope, max_layer_fraction)
    units, scores = take(pools, counts)
    if not units:
        notes.append("no unit is selected")
    return Plan(
        units=units,
        scores=scores,
        wiring=_wiring_of(profile, units),
        eligible=sum(len(pool.units) for pool in pools),
        criterion=criterion,
        ratio=None if ratio is None else float(ratio),
        threshold=None if threshold is None else float(threshold),
        scope=scope,
        granularity=granularity,
        max_layer_fraction=float(max_layer_fraction),
        seed=int(seed),
        fingerprint=profile.fingerprint,
        notes=tuple(notes),
    )


def _rule(criterion: str) -> Criterion:
    if criterion not in CRITERIA:
        raise InputError(
            f"criterion {criterion!r} is unknown, expected one of {', '.join(CRITERIA)}"
        )
    return CRITERIA[criterion]


def _check_choices(granularity: str, scope: str, seed: int) -> None:
    if granularity not in GRANULARITIES:
        raise InputError(
            f"granularity {granularity!r} is not supported in this version, expected 'unit'"
        )
    if scope not in SCOPES:
        raise InputError(f"scope {scope!r} is unknown, expected 'layer' or 'global'")
    if not isinstance(seed, Integral):
        raise InputError(f"seed {seed!r} is not usable, expected an integer")


def _check_amounts(ratio: float | None, threshold: float | None, max_layer_fraction: float) -> None:
    if (ratio is None) == (threshold is None):
        given = "neither" if ratio is None else "both"
        raise InputError(
            f"{given} of ratio and threshold given, expected exactly one: "
            "ratio says how many units, threshold from which score on"
        )
    if ratio is not None:
        _check_share("ratio", ratio)
    if threshold is not None and not (isinstance(threshold, Real) and math.isfinite(threshold)):
        raise InputError(f"threshold {threshold!r} is not usable, expected a finite number")
    _check_share("max_layer_fraction", max_layer_fraction)


def _check_share(name: str, value: float) -> None:
    # The comparison also refuses NaN.
    if not (isinstance(value, Real) and 0 < value <= 1):
        raise InputError(f"{name} {value!r} is out of range, expected more than 0 and at most 1")


def _patterns(patterns: Sequence[str]) -> tuple[str, ...]:
    # A single string is a sequence of its letters; it is meant as one pattern.
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


def _chosen_layers(
    layers: Iterable["LayerProfile"], include: tuple[str, ...], exclude: tuple[str, ...]
) -> list["LayerProfile"]:
    """Return the layers that may lose units; exclusion holds for coupled rows too."""
    layers = list(layers)
    names = [layer.name for layer in layers]
    if not names:
        raise InputError(
            "the profile has no layers, expected at least one: profile the model again"
        )
    included = _matching(names, include, "include") if include else set(names)
    excluded = _matching(names, exclude, "exclude")
    return [
        layer
        for layer in layers
        if layer.name in included
        and excluded.isdisjoint({layer.name, *(member.name for member in layer.wiring.coupled)})
    ]


def _matching(names: list[str], patterns: tuple[str, ...], option: str) -> set[str]:
    matched: set[str] = set()
    for pattern in patterns:
        hits = {name for name in names if fnmatchcase(name, pattern)}
        if not hits:
            near = get_close_matches(pattern, names, n=3, cutoff=0.3) or names[:3]
            raise InputError(
                f"{option} pattern {pattern!r} matches none of the {len(names)} layers, "
                f"expected a name or a pattern such as 'layer1.*'; near names: {', '.join(near)}"
            )
        matched |= hits
    return matched


def _pools(
    profile: "Profile",
    chosen: list["LayerProfile"],
    rule: Criterion,
    max_layer_fraction: float,
    seed: int,
    notes: list[str],
) -> list[Pool]:
    pools = []
    unknown: dict[str, int] = {}
    for layer in chosen:
        scores = _unit_scores(profile, layer, rule, seed)
        hidden = layer.wiring.hidden
        eligible = hidden & scores.isfinite()
        if (hidden & ~eligible).any():
            unknown[layer.name] = int((hidden & ~eligible).sum())
        if eligible.any():
            pools.append(_pool(layer, scores, eligible, rule, max_layer_fraction, seed))
    if unknown:
        notes.append(_unknown_note(unknown, rule))
    if not pools:
        raise InputError(_nothing_eligible(chosen, unknown, rule))
    return pools


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
    return rule.score(layer.stats, Layer(layer.name, layer.wiring.activations, seed))


def _pool(
    layer: "LayerProfile",
    scores: Tensor,
    eligible: Tensor,
    rule: Criterion,
    max_layer_fraction: float,
    seed: int,
) -> Pool:
    units = eligible.nonzero().flatten()
    scores = scores[units]
    return Pool.ordered(
        layer.name,
        units,
        scores,
        keys=scores if rule.candidate == "small" else -scores,
        ties=unit_noise(seed, "ties", layer.name, layer.n_units)[units],
        cap=math.floor(max_layer_fraction * len(units)),
    )


def _unknown_note(unknown: dict[str, int], rule: Criterion) -> str:
    shown = ", ".join(list(unknown)[:_NAMES_IN_A_NOTE])
    more = len(unknown) - _NAMES_IN_A_NOTE
    names = f"{shown} and {more} more" if more > 0 else shown
    return (
        f"{sum(unknown.values())} hidden units have no {rule.name} score and are left out "
        f"({rule.unknown}): {names}"
    )


def _nothing_eligible(
    chosen: list["LayerProfile"], unknown: dict[str, int], rule: Criterion
) -> str:
    if not unknown:
        return (
            f"none of the {len(chosen)} chosen layers has a hidden unit, expected at least one: "
            "choose other layers with include and exclude"
        )
    return (
        f"none of the {sum(unknown.values())} hidden units of the chosen layers has a "
        f"{rule.name} score ({rule.unknown}), expected at least one: take another criterion"
        f"{_WITHOUT_GRADIENT if rule.needs == 'gradients' else ''}"
    )


def _wiring_of(profile: "Profile", units: Mapping[str, Tensor]) -> dict[str, UnitLayer]:
    wiring: dict[str, UnitLayer] = {}
    for name in units:
        wiring[name] = profile[name].wiring
        for member in wiring[name].coupled:
            wiring[member.name] = profile[member.name].wiring
    return wiring
