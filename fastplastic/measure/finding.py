"""What stands out in a profile, in sentences: the worst first, and of each kind where it begins."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from fastplastic.criteria import CRITERIA
from fastplastic.measure.record import LayerProfile, Profile

Severity = Literal["high", "medium", "low", "none"]

MOST = 5
# Shares of a layer's units from which on something is of medium and of high severity. No source
# gives such numbers: from a tenth on a layer stands out among those of pretrained networks, and
# with half of its units a layer has lost half of its width.
_MEDIUM, _HIGH = 0.1, 0.5
# With fewer samples, units that fire for some classes alone are taken for dead.
_FEW_SAMPLES = 64
# A rectifier is flat at half of the positions when all is well.
_HALF_FLAT = frozenset({"relu", "relu6", "hardtanh"})
_ORDER: tuple[Severity, ...] = ("high", "medium", "low", "none")


@dataclass(frozen=True)
class Finding:
    """One thing that stands out.

    Attributes:
        severity: "high", "medium", "low", or "none" where nothing was found.
        text: What it is, in one sentence.
        evidence: The figures that it is read from.
        action: What to do next.
    """

    severity: Severity
    text: str
    evidence: str
    action: str


def findings(profile: Profile) -> tuple[Finding, ...]:
    """Return what stands out in a profile, at most five, the most severe first; never nothing.

    A finding about units is of medium severity where they are a tenth of a layer or more, and of
    high severity from a half on: limits of the project's own choice.

    Args:
        profile: The profile.
    """
    checks = (_nonfinite, _dead, _frozen, _dormant, _saturated, _no_gradient, _unseen, _few_samples)
    found = [finding for check in checks for finding in check(profile)]
    found.sort(key=lambda finding: _ORDER.index(finding.severity))
    return tuple(found[:MOST]) or (_nothing(profile),)


def _nonfinite(profile: Profile) -> Iterator[Finding]:
    counts = [(layer, int((layer.stats["n_nonfinite_h"] > 0).sum())) for layer in profile]
    touched = [(layer, number) for layer, number in counts if number]
    if touched:
        first, _ = touched[0]
        units = sum(number for _, number in touched)
        yield Finding(
            "high",
            f"Activations are NaN or infinite from {first.name} on.",
            f"{units:,} units of {len(touched)} layers met NaN or infinity",
            f"look at the weights and the input of {first.name}; with float16 try bfloat16. "
            "Figures of the layers behind it say little",
        )


def _dead(profile: Profile) -> Iterator[Finding]:
    yield from _units(
        profile, "dead", lambda layer: layer.dead, "give the same value for every input"
    )


def _frozen(profile: Profile) -> Iterator[Finding]:
    yield from _units(
        profile,
        "frozen but not dead",
        lambda layer: layer.frozen & ~layer.dead,
        "pass no gradient on, as their activation function is flat wherever they were seen",
    )


def _dormant(profile: Profile) -> Iterator[Finding]:
    threshold = CRITERIA["dormant"].threshold
    yield from _units(
        profile,
        "dormant but not dead",
        lambda layer: layer.dormant & ~layer.dead & ~layer.frozen,
        f"hardly add anything, with a mean |h| of at most {threshold:g} of the layer's",
    )


def _units(
    profile: Profile, word: str, chosen: Callable[[LayerProfile], Tensor], meaning: str
) -> Iterator[Finding]:
    """Say of units of a sort where there are many, or that there are some."""
    of_layer = [(layer, chosen(layer)) for layer in profile]
    touched = [(layer, units) for layer, units in of_layer if bool(units.any())]
    if not touched:
        return
    shares = {layer.name: float(units.double().mean()) for layer, units in touched}
    striking = [layer for layer, _ in touched if shares[layer.name] >= _MEDIUM]
    total = sum(int(units.sum()) for _, units in touched)
    within = _resettable(profile)
    hidden = sum(int((units & within[layer.name]).sum()) for layer, units in touched)
    worst = max(shares, key=lambda name: shares[name])
    where = "Some units" if not striking else f"From {striking[0].name} on, units"
    severity: Severity = "low"
    if striking:
        severity = "high" if shares[worst] >= _HIGH else "medium"
    yield Finding(
        severity,
        f"{where} are {word}: they {meaning}.",
        f"{total:,} of {profile.totals.units:,} units in {_layers(touched)}; "
        f"most in {worst}, {shares[worst]:.0%}",
        _what_to_do(hidden, total),
    )


def _resettable(profile: Profile) -> dict[str, Tensor]:
    """Return which units of each layer are re-initialised, by themselves or with those of others.

    Returns:
        {layer name: bool [units]}.
    """
    found = {layer.name: layer.hidden.clone() for layer in profile}
    for layer in profile:
        for member in layer.wiring.coupled:
            rows = member.row_of_unit[layer.hidden]
            found[member.name][rows[rows >= 0]] = True
    return found


def _what_to_do(hidden: int, total: int) -> str:
    if not hidden:
        return "none of them can be re-initialised: the wiring of their layers says why"
    number = "all of them" if hidden == total else f"{hidden:,} of them"
    return f"re-initialising can reach {number}; a trial tells whether it helps on your task"


def _saturated(profile: Profile) -> Iterator[Finding]:
    limit = CRITERIA["saturated"].threshold
    assert limit is not None
    flat = {}
    for layer in profile:
        share = float(layer.saturated_fraction.nanmean())
        expected = limit if layer.activation in _HALF_FLAT else 0.5
        if share >= expected:
            flat[layer.name] = share
    if flat:
        worst = max(flat, key=lambda name: flat[name])
        yield Finding(
            "medium",
            f"From {next(iter(flat))} on, layers work where their activation functions are flat.",
            f"{_layers(flat)} of {len(profile)}; most in {worst}, {flat[worst]:.0%} of all "
            "positions",
            "little gradient passes there: see whether the inputs are scaled as the weights expect",
        )


def _no_gradient(profile: Profile) -> Iterator[Finding]:
    without = [layer for layer in profile if layer.no_gradient]
    # Without a backward pass there are none at all, and nobody expects any.
    if without and len(without) < len(profile):
        yield Finding(
            "medium",
            f"No gradient reaches the weights of {_layers(without)}, the first is "
            f"{without[0].name}.",
            f"{len(without)} of {len(profile)} layers have a gradient of exactly 0 or none",
            "they will not learn as they are: see whether they are frozen, or behind a weight of "
            "zero (zero_init_last and layer scale of untrained models)",
        )


def _unseen(profile: Profile) -> Iterator[Finding]:
    skipped = profile.coverage.skipped
    if skipped:
        name, reason = skipped[0]
        yield Finding(
            "low",
            f"{len(skipped)} of {profile.coverage.found} weight layers have no figures.",
            f"{name}: {reason}",
            "nothing is known of them, and nothing in them is re-initialised",
        )


def _few_samples(profile: Profile) -> Iterator[Finding]:
    if profile.samples < _FEW_SAMPLES and profile.totals.dead:
        yield Finding(
            "low",
            "Few samples were seen: units that fire for some inputs only look dead.",
            f"{profile.samples} samples",
            f"measure {_FEW_SAMPLES} or more before you count on it",
        )


def _nothing(profile: Profile) -> Finding:
    totals = profile.totals
    seen = sum(int(layer.measured.sum()) for layer in profile)
    units = f"{totals.units:,}" if seen == totals.units else f"{seen:,} of {totals.units:,}"
    return Finding(
        "none",
        "Nothing stands out: no unit that was measured is dead, frozen or dormant.",
        f"{units} units of {totals.layers} layers, {profile.samples} samples",
        "re-initialisation has nothing to restore by these figures",
    )


def _layers(layers: Sequence[object] | dict[str, float]) -> str:
    return f"{len(layers)} layer{'' if len(layers) == 1 else 's'}"
