"""`fastplastic plan`: choose what to re-initialise, and write it down."""

import shlex
import sys
from typing import TYPE_CHECKING

from fastplastic.cli.following import fresh_output
from fastplastic.cli.launch import is_first
from fastplastic.cli.options import DataOptions, PlanOptions
from fastplastic.cli.parsing import arguments
from fastplastic.cli.session import Measured, choose, measure_for
from fastplastic.cli.terminal import console, follow

if TYPE_CHECKING:
    from fastplastic import Plan


def _following(options: PlanOptions, measured: Measured, plan: "Plan") -> str:
    """Return the command to type next; "" where `reinit` would have nothing to work on."""
    accidental = measured.loaded.weights == "random" and options.pretrained is None
    if not plan.count or accidental:
        return ""
    program = ["fastplastic"]
    fresh = fresh_output(options.model)
    if options.output:
        applied = ["reinit", *arguments(options, DataOptions), "--plan", str(options.output)]
        return shlex.join([*program, *applied, *fresh])
    name = "plan.json" if plan.granularity == "unit" else "plan.safetensors"
    return shlex.join([*program, "plan", *arguments(options, PlanOptions), "-o", name])


def run(options: PlanOptions) -> None:
    """Choose the units or weights to re-initialise; look at them before anything is changed.

    Profiles the model, ranks what can be re-initialised, and shows how much would be taken from
    which layer. With -o the plan is written to a file for `reinit --plan`.
    """
    options.check()
    measured = measure_for(options, pretrained=options.pretrained)
    plan = choose(options, measured)
    if not is_first():
        return
    if options.output:
        plan.save(options.output, force=options.force)
    if options.quiet:
        return
    from fastplastic.cli import render
    from fastplastic.cli.report import plan_facts, plan_view

    view = plan_view(plan, (*measured.facts, *plan_facts(plan)))
    out = console(sys.stdout)
    out.print(render.plan(view))
    follow(out, _following(options, measured, plan))
