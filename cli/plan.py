"""`fastplastic plan`: choose what to re-initialise, and write it down."""

import shlex
import sys
from typing import TYPE_CHECKING

from fastplastic.cli.options import DataOptions, PlanOptions, SelectOptions, arguments
from fastplastic.cli.profile import Measured, measure
from fastplastic.cli.terminal import console, follow

if TYPE_CHECKING:
    from fastplastic import Plan
    from fastplastic.cli.render import PlanView


def measure_for(options: SelectOptions, *, pretrained: bool | None) -> Measured:
    """Measure what the granularity needs."""
    return measure(options, pretrained=pretrained, gradients=options.granularity == "weight")


def choose(options: SelectOptions, measured: Measured) -> "Plan":
    """Return the plan that the options ask for; InputError when the model cannot fulfil it."""
    import fastplastic

    return fastplastic.plan(
        measured.profile,
        criterion=options.criterion,
        ratio=options.ratio,
        threshold=options.threshold,
        granularity=options.granularity,
        scope=options.scope,
        include=options.include,
        exclude=options.exclude,
        max_layer_fraction=options.max_layer_fraction,
        seed=options.seed,
    )


def plan_fact(plan: "Plan") -> tuple[str, str]:
    """Return what a plan does, as a fact for the header."""
    amount = f"ratio {plan.ratio:g}" if plan.ratio is not None else f"threshold {plan.threshold:g}"
    share = f"{plan.count:,} of {plan.eligible:,} eligible {plan.granularity}s"
    return "plan", f"{share}: {plan.criterion}, {amount}, {plan.scope}, seed {plan.seed}"


def plan_view(
    plan: "Plan", facts: tuple[tuple[str, str], ...], notes: tuple[str, ...] = ()
) -> "PlanView":
    """Return what to show of a plan, under these facts and with more notes."""
    from fastplastic.cli.render import MaskRow, PlanRow, PlanView

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
    counts = plan.counts
    masks = tuple(MaskRow(name, mask.numel(), counts[name]) for name, mask in plan.masks.items())
    return PlanView(facts, units, masks, (*plan.notes, *notes))


def _following(options: PlanOptions, measured: Measured, plan: "Plan") -> str:
    """Return the command to type next; "" where `reinit` would have nothing to work on."""
    accidental = measured.loaded.weights == "random" and options.pretrained is None
    if not plan.count or accidental:
        return ""
    program = ["fastplastic"]
    fresh = ["-o", f"{options.model.rpartition('/')[2]}-fresh.safetensors"]
    if options.output:
        applied = ["reinit", *arguments(options, DataOptions), "--plan", str(options.output)]
        return shlex.join([*program, *applied, *fresh])
    name = "plan.json" if plan.granularity == "unit" else "plan.safetensors"
    return shlex.join([*program, "plan", *arguments(options, PlanOptions), "-o", name])


def run(options: PlanOptions) -> None:
    """Choose the units or weights to re-initialise; look at them before anything is changed.

    Profiles the model, ranks what can be re-initialised, and shows how much would be taken from
    which layer. With -o the plan is written to a file for `reinit --plan`.

    For example: fastplastic plan resnet50 --data DIR --ratio 0.05 -o plan.json

    Of single weights: fastplastic plan resnet50 --data DIR --granularity weight --ratio 0.05 -o
    plan.safetensors
    """
    options.check()
    measured = measure_for(options, pretrained=options.pretrained)
    plan = choose(options, measured)
    if options.output:
        plan.save(options.output, force=options.force)
    if options.quiet:
        return
    from fastplastic.cli import render

    view = plan_view(plan, (*measured.facts, plan_fact(plan)))
    out = console(sys.stdout)
    out.print(render.plan(view))
    follow(out, _following(options, measured, plan))
