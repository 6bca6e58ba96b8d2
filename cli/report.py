"""From profiles and plans to the values that `render` shows."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import fields

from torch import Tensor

from fastplastic.cli.render import LayerRow, MaskRow, PlanRow, PlanView, Report
from fastplastic.criteria import CRITERIA
from fastplastic.measure import LayerProfile, Profile, findings
from fastplastic.planning import Plan
from fastplastic.reinit import ReinitReport

# How the reason starts for rows that follow another layer's; which layer, the plan shows.
_TOGETHER = "re-initialised together with"


def report_of(profile: Profile, facts: tuple[tuple[str, str], ...]) -> Report:
    """Return what to show of a profile, under these facts."""
    weak = {layer.name: layer.dead | layer.frozen | layer.dormant for layer in profile.layers}
    members = {other.name for layer in profile.layers for other in layer.wiring.coupled}
    return Report(
        facts=facts,
        rows=tuple(_row(layer, weak, members) for layer in profile.layers),
        tau=_threshold("dormant"),
        saturated=_threshold("saturated"),
        found=profile.coverage.found,
        skipped=profile.coverage.skipped,
        fixed=_fixed(profile.layers),
        notes=profile.notes,
        findings=findings(profile),
        rank_rows=max((layer.ranks.rows for layer in profile.layers if layer.ranks), default=0),
    )


def _row(layer: LayerProfile, weak: Mapping[str, Tensor], members: set[str]) -> LayerRow:
    saturated = layer.saturated_fraction >= _threshold("saturated")
    columns = {field.name for field in fields(LayerRow)}
    values = layer.to_dict() | {"name": " = ".join((layer.name, *layer.wiring.tied))}
    return LayerRow(
        **{name: value for name, value in values.items() if name in columns},
        saturated=int(saturated.sum()),
        weak=int(_weak_units(layer, weak).sum()),
        fixed=not layer.hidden.any() and layer.name not in members,
        nonfinite=int((layer.stats["n_nonfinite_h"] > 0).sum()),
    )


def _weak_units(layer: LayerProfile, weak: Mapping[str, Tensor]) -> Tensor:
    """Return which hidden units are weak: one made by several rows is as weak as any of them."""
    units = weak[layer.name].clone()
    for member in layer.wiring.coupled:
        known = member.row_of_unit >= 0
        units[known] |= weak[member.name][member.row_of_unit[known]]
    return units & layer.hidden


def _threshold(criterion: str) -> float:
    threshold = CRITERIA[criterion].threshold
    assert threshold is not None
    return threshold


def _fixed(layers: Iterable[LayerProfile]) -> tuple[tuple[str, int, int], ...]:
    """Return (reason, units, layers) of units that cannot be re-initialised alone, most first."""
    units: Counter[str] = Counter()
    touched: Counter[str] = Counter()
    for layer in layers:
        reasons = Counter[str]()
        for reason, number in layer.wiring.reasons.items():
            together = reason.startswith(_TOGETHER)
            reasons[f"{_TOGETHER} those of another layer" if together else reason] += number
        units += reasons
        touched.update(reasons.keys())
    return tuple((reason, number, touched[reason]) for reason, number in units.most_common())


def plan_facts(plan: Plan, *, read: bool = False) -> tuple[tuple[str, str], ...]:
    """Return what a plan does and how healthy that is, as facts for the header.

    Args:
        plan: The plan.
        read: Whether it was read from a file, and the weights may be others by now.
    """
    amount = f"ratio {plan.ratio:g}" if plan.ratio is not None else f"threshold {plan.threshold:g}"
    share = f"{plan.count:,} of {plan.eligible:,} eligible {plan.granularity}s"
    what = f"{share}: {plan.criterion}, {amount}, {plan.scope}, seed {plan.seed}"
    if plan.beyond is None:
        return (("plan", what),)
    rule = CRITERIA[plan.criterion]
    side = "at most" if rule.candidate == "small" else "at least"
    weak = (
        f"{plan.beyond:,} of the {plan.count:,} chosen {'were' if read else 'are'} beyond the "
        f"threshold of {rule.name} ({side} {rule.threshold:g})"
    )
    weak += " when they were planned" * read
    return ("plan", what), ("weak", weak)


def reset_fact(report: ReinitReport, more: str = "") -> tuple[str, str]:
    """Return what was written, as a fact for the header; `more` is what was done besides."""
    weights = [written for written in report.written if written.kind != "optimizer state"]
    elements = sum(written.elements for written in weights)
    change = f"{elements:,} numbers in {len(weights)} tensors"
    outgoing = f", outgoing {report.outgoing}" if report.granularity == "unit" else ""
    return "reset", f"{change}: init {report.init}{outgoing}{more}, seed {report.seed}"


def plan_view(
    plan: Plan, facts: tuple[tuple[str, str], ...], notes: tuple[str, ...] = ()
) -> PlanView:
    """Return what to show of a plan, under these facts and with more notes."""
    units = tuple(
        PlanRow(
            name=name,
            units=plan.wiring[name].n_units,
            hidden=int(plan.wiring[name].hidden.sum()),
            chosen=len(units),
            lowest=float(plan.scores[name].min()),
            highest=float(plan.scores[name].max()),
        )
        for name, units in plan.units.items()
    )
    sizes, counts = plan.sizes, plan.counts
    masks = tuple(MaskRow(name, sizes[name], counts[name]) for name in plan.masks)
    return PlanView(facts, units, masks, (*plan.notes, *notes))
