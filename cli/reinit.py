"""`fastplastic reinit`: re-initialise, and write the weights to a new file."""

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from math import isfinite
from typing import TYPE_CHECKING, Any

from fastplastic.cli.agreement import agree
from fastplastic.cli.following import after_reinit
from fastplastic.cli.launch import is_first
from fastplastic.cli.options import ReinitOptions
from fastplastic.cli.reinit_folder import run_many_files
from fastplastic.cli.session import (
    choose,
    load,
    measure_for,
    precision,
    source_of,
    warn_of_left_out,
)
from fastplastic.cli.terminal import Counted, console, follow, progress

if TYPE_CHECKING:
    from torch import Tensor

    from fastplastic import Plan, ReinitReport
    from fastplastic.cli.reinit_output import WeightFile
    from fastplastic.sources import DataSource, LoadedModel


@dataclass(frozen=True, eq=False)
class _Job:
    """A model, a plan for it, what runs through it if anything does, and facts for the header."""

    loaded: "LoadedModel"
    plan: "Plan"
    source: "DataSource | None"
    facts: tuple[tuple[str, str], ...]


def _job(options: ReinitOptions) -> _Job:
    """Load the model, read the plan or make one."""
    from fastplastic import Plan

    # Random weights are not worth re-initialising: they have to be asked for.
    pretrained = options.pretrained
    if pretrained is None and not options.checkpoint:
        pretrained = True
    if not options.plan:
        measured = measure_for(options, pretrained=pretrained)
        plan = choose(options, measured)
        return _Job(measured.loaded, plan, measured.source, measured.facts)
    plan = Plan.load(options.plan)
    loaded = load(options, pretrained=pretrained)
    source = source_of(options, loaded) if options.needs_data else None
    agree(options, loaded, source)
    facts = [("model", options.model), ("weights", loaded.weights)]
    facts += [("head", loaded.head)] if loaded.head else []
    if source is not None:
        facts.append(("data", source.says))
    return _Job(loaded, plan, source, tuple(facts))


def _apply(options: ReinitOptions, job: _Job, file: "WeightFile") -> "ReinitReport":
    """Re-initialise the model, and measure the loss if its head is for these classes."""
    from torch.nn.functional import cross_entropy

    from fastplastic import reinit_

    known = job.source is not None and _has_its_head(job)
    batches: Iterable[Any] | None = job.source and job.source.whole
    if not (known or options.compensate or options.recalibrate):
        batches = None
    # Before, after, and with fresh norms in between.
    passes = 2 + options.recalibrate
    total = 0 if job.source is None else passes * len(job.source.whole)
    with precision(options), progress(total, quiet=options.quiet, text="measuring") as done:
        return reinit_(
            job.loaded.model, job.plan, init=options.init, outgoing=options.outgoing,
            compensate=options.compensate, recalibrate=options.recalibrate,
            batches=None if batches is None else Counted(batches, done),
            loss_fn=cross_entropy if known else _no_loss, seed=options.seed,
            copies=file.copies, optimizer=file.optimizer,
        )  # fmt: skip


def _has_its_head(job: _Job) -> bool:
    source = job.source
    return (
        source is not None
        and source.labelled
        and source.num_classes == job.loaded.model.num_classes
    )


def _no_loss(output: object, targets: object) -> "Tensor":
    """Stand in for the loss where the classes are others than those of the head."""
    import torch

    return torch.zeros(())


def run(options: ReinitOptions) -> None:
    """Re-initialise units or single weights, and write the weights to a new file.

    Takes them from --plan, or profiles the model and plans on the spot with --ratio or
    --threshold. A .safetensors file loads into the same model with strict=True. A .pth file keeps
    all else that a training checkpoint holds, such as its optimizer, to train on. Of a model
    hf:FOLDER, -o can also name a folder, which gets all that from_pretrained reads. Where
    --checkpoint is a folder of many files, so is what is written, file by file.
    """
    options.check()
    if options.many_files:
        return run_many_files(options)
    from fastplastic import alone
    from fastplastic.cli.reinit_output import WeightFile

    job = _job(options)
    if not is_first():
        return
    file = WeightFile(options, job.loaded)
    with alone():
        report = _apply(options, job, file)
    if options.plan and job.source is not None:
        warn_of_left_out(job.source)
    if not options.dry_run:
        file.write()
    if options.quiet:
        return
    from fastplastic.cli import render
    from fastplastic.cli.report import plan_facts, plan_view

    shown = (
        *job.facts,
        *plan_facts(job.plan, read=options.plan is not None),
        *_written(options, job, report, file),
    )
    view = plan_view(job.plan, shown, report.notes)
    out = console(sys.stdout)
    out.print(render.plan(view))
    follow(out, "" if options.dry_run else _following(options, job))


def _following(options: ReinitOptions, job: _Job) -> str:
    return after_reinit(options, trains=job.loaded.texts is None)


def _written(
    options: ReinitOptions, job: _Job, report: "ReinitReport", file: "WeightFile"
) -> tuple[tuple[str, str], ...]:
    from fastplastic.cli.report import reset_fact

    more = ", compensated" * options.compensate + ", recalibrated" * options.recalibrate
    return (
        reset_fact(report, more),
        *_loss(job, report),
        *(file.facts() if not options.dry_run else (("file", "nothing was written"),)),
    )


def _loss(job: _Job, report: "ReinitReport") -> tuple[tuple[str, str], ...]:
    if job.source is None:
        return (("loss", "not measured: pass --data"),)
    classes = job.source.num_classes
    if not _has_its_head(job):
        head = job.loaded.model.num_classes
        why = f"the model has {head} classes, the data {classes}"
        if not job.source.labelled:
            return (("loss", "not measured: the texts have no labels"),)
        return (("loss", f"not measured: {why}; it needs a head that was fitted to them"),)
    return (("loss", f"{_number(report.loss_before)} before, {_number(report.loss_after)} after"),)


def _number(loss: float | None) -> str:
    return f"{loss:.4g}" if loss is not None and isfinite(loss) else "not finite"
