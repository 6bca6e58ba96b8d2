"""`fastplastic finetune`: probe, profile, plan, re-initialise, train, and write the weights."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from fastplastic.cli.outputs import STDOUT, write_json
from fastplastic.cli.terminal import console, share_progress
from fastplastic.cli.training import learner
from fastplastic.cli.training_options import FinetuneOptions
from fastplastic.errors import FingerprintError, InputError

if TYPE_CHECKING:
    from fastplastic import FineTuning, Plan


def run(options: FinetuneOptions) -> None:
    """Fine-tune a model after re-initialising what no longer learns, and write the weights.

    Fits the head if it is new, profiles the model on training images, re-initialises what a plan or
    --ratio says, and trains. With neither, and no --arm, it takes the arm that fastplastic trial
    takes, dormant@0.3:zero+compensate+recalibrate. --no-reinit only trains, for a fair comparison;
    fastplastic trial makes such comparisons with several seeds.
    """
    options.check()
    from fastplastic.files import save_state_dict
    from fastplastic.trials import finetune

    options.settings()
    arm = options.treatment()
    plan = _plan(options)
    loaded = learner(options)
    splits = loaded.splits
    with share_progress(quiet=options.quiet) as told, _plan_of_this(options, splits.num_classes):
        tuned = finetune(
            loaded.model, splits.train, splits.test, arm=arm, plan=plan,
            settings=loaded.settings,
            plain=splits.plain, seed=options.seed, progress=told,
        )  # fmt: skip
    _check_finite(options, tuned)
    save_state_dict(
        options.output, loaded.model, options.force, dtypes=loaded.dtypes, metadata=loaded.metadata
    )
    if options.json:
        write_json(options.json, _report(options, tuned), force=options.force)
    if options.quiet or options.json == STDOUT:
        return
    from fastplastic.cli import trial_view

    out = console(sys.stdout)
    facts = (*loaded.facts, ("reinit", _reset(tuned, arm.name)), ("seed", str(options.seed)))
    out.print(trial_view.tuned(tuned, facts, str(options.output)))


def _check_finite(options: FinetuneOptions, tuned: "FineTuning") -> None:
    """Refuse to write weights that diverged: InputError."""
    if tuned.run.diverged_at is not None:
        raise InputError(
            f"--lr {options.lr:g}: the loss was not finite at update {tuned.run.diverged_at}, so "
            "nothing is written: take a smaller rate"
        )


@contextmanager
def _plan_of_this(options: FinetuneOptions, classes: int) -> Iterator[None]:
    """Say what a plan has to be made with to be one for this model."""
    try:
        yield
    except FingerprintError as error:
        raise FingerprintError(
            f"--plan {options.plan}: {error}: fastplastic plan {options.model} --num-classes "
            f"{classes} with the same --checkpoint"
        ) from error


def _plan(options: FinetuneOptions) -> "Plan | None":
    if options.plan is None:
        return None
    from fastplastic import Plan

    found = Plan.load(options.plan)
    if found.granularity == "weight":
        options.check_treatment("weight")
    return found


def _reset(tuned: "FineTuning", name: str) -> str:
    if tuned.plan is None:
        return "none (--no-reinit)"
    plan = tuned.plan
    return f"{name}: {plan.count:,} of {plan.eligible:,} eligible {plan.granularity}s"


def _report(options: FinetuneOptions, tuned: "FineTuning") -> dict[str, Any]:
    return {
        "schema_version": 1, "model": options.model, "run": asdict(tuned.run),
        "before": asdict(tuned.before.totals), "after": asdict(tuned.after.totals),
        "untreated": tuned.untreated,
    }  # fmt: skip
