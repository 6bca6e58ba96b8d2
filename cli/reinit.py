"""`fastplastic reinit`: re-initialise, and write the weights to a new file."""

import shlex
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

from fastplastic.cli.options import DataOptions, ReinitOptions, arguments
from fastplastic.cli.plan import choose, measure_for, plan_fact, plan_view
from fastplastic.cli.profile import load
from fastplastic.cli.terminal import console, follow

if TYPE_CHECKING:
    from fastplastic import Plan, ReinitReport
    from fastplastic.models import LoadedModel


def _model_and_plan(
    options: ReinitOptions,
) -> tuple["LoadedModel", "Plan", tuple[tuple[str, str], ...]]:
    """Return the model, the plan from the file or a new one, and the facts for the header."""
    from fastplastic import Plan

    # Random weights are not worth re-initialising: they have to be asked for.
    pretrained = options.pretrained
    if pretrained is None and not options.checkpoint:
        pretrained = True
    if options.plan:
        plan = Plan.load(options.plan)
        loaded = load(options, pretrained=pretrained)
        return loaded, plan, (("model", options.model), ("weights", loaded.weights))
    measured = measure_for(options, pretrained=pretrained)
    return measured.loaded, choose(options, measured), measured.facts


def run(options: ReinitOptions) -> None:
    """Re-initialise units or single weights, and write the weights to a new file.

    Takes them from --plan, or profiles the model and plans on the spot with --ratio or
    --threshold. The file is safetensors and loads into the same timm model with strict=True.

    For example: fastplastic reinit resnet50 --plan plan.json -o resnet50-fresh.safetensors
    """
    options.check()
    from fastplastic import reinit_
    from fastplastic.checkpoint import save_state_dict

    loaded, plan, facts = _model_and_plan(options)
    report = reinit_(
        loaded.model, plan, init=options.init, outgoing=options.outgoing, seed=options.seed
    )
    if options.output and not options.dry_run:
        save_state_dict(options.output, loaded.model, options.force)
    if options.quiet:
        return
    from fastplastic.cli import render

    shown = (*facts, plan_fact(plan), *_written(options, plan, report))
    view = plan_view(plan, shown, report.notes)
    out = console(sys.stdout)
    out.print(render.plan(view))
    follow(out, "" if options.dry_run else _following(options))


def _written(
    options: ReinitOptions, plan: "Plan", report: "ReinitReport"
) -> tuple[tuple[str, str], ...]:
    elements = sum(written.elements for written in report.written)
    change = f"{elements:,} numbers in {len(report.written)} tensors"
    where = "nothing was written" if options.dry_run else str(options.output)
    outgoing = f", outgoing {report.outgoing}" if plan.granularity == "unit" else ""
    return (
        ("reset", f"{change}: init {report.init}{outgoing}, seed {report.seed}"),
        ("file", where),
    )


def _following(options: ReinitOptions) -> str:
    """Return the command to type next: a look at what was written."""
    written = replace(options, checkpoint=options.output, pretrained=None)
    return shlex.join(["fastplastic", "profile", *arguments(written, DataOptions)])
