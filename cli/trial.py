"""`fastplastic trial`: fine-tune in several arms side by side, and say which is better."""

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from fastplastic.cli.engine_options import on_ray
from fastplastic.cli.following import tuned_file
from fastplastic.cli.outputs import STDOUT, write_json
from fastplastic.cli.parsing import arguments
from fastplastic.cli.plot import draw, require_matplotlib
from fastplastic.cli.terminal import console, follow, run_progress, warn
from fastplastic.cli.training import Learner, learner
from fastplastic.cli.training_options import TrainingOptions, TrialOptions
from fastplastic.cli.trial_weights import KeptWeights
from fastplastic.errors import InputError

if TYPE_CHECKING:
    from fastplastic.trials import Arm, Engine, Task, Trainer, Trial

# Labels and values of the header.
Facts = tuple[tuple[str, str], ...]


def run(options: TrialOptions) -> None:
    """Fine-tune a model in several arms under one budget, and say which is better.

    The baseline, what you name with --arm (by default dormant@0.3:zero+compensate+recalibrate), and
    for each dose as many units at random: each with several seeds, the same batches in the same
    order, and nothing chosen by the test images. Every finished run is kept in a file, so that the
    same command goes on after an interruption.

    Runs are made one after the other, or several at once: by Ray (--engine ray), or by the
    processes of torchrun, which divide them.
    """
    options.check()
    if options.plot:
        require_matplotlib()
    from fastplastic.processes import all_processes
    from fastplastic.trials import DEFAULT_ARMS, run_trial, with_controls

    options.settings()
    arms = with_controls(options.arm or DEFAULT_ARMS, **options.common())
    seeds = range(options.seed, options.seed + options.seeds)
    loaded, engine, where = _placed(options)
    kept, processes = KeptWeights(options.output, options.results_file), all_processes()
    with run_progress(quiet=options.quiet) as told, _resumable(options):
        trial = run_trial(
            _task(options, loaded), arms, seeds, loaded.settings, engine=engine,
            results=options.results_file, progress=told, keep=partial(kept.keep, loaded),
            settle=kept.settle,
        )  # fmt: skip
    if processes is not None and processes.rank:
        # The first one says and writes it.
        return
    for note in trial.notes:
        warn(note)
    kept.write(trial, force=options.force)
    if options.json:
        write_json(options.json, trial.to_dict(), force=options.force)
    if options.plot:
        draw(trial, options.plot, force=options.force)
    if options.quiet or options.json == STDOUT:
        return
    from fastplastic.cli import trial_view

    out = console(sys.stdout)
    results = ("results", str(options.results_file))
    facts = (*loaded.facts, *where, ("seeds", _seeds(options)), results)
    out.print(trial_view.trial(trial, facts, kept.said(trial), width=out.width))
    follow(out, _following(options, trial, arms))


def _placed(options: TrialOptions) -> "tuple[Learner, Engine | None, Facts]":
    """Return model and data, what makes the runs if not this process, and what is said of it."""
    from fastplastic.processes import all_processes

    processes = all_processes()
    if options.engine == "local":
        where = (
            () if processes is None else (("runs", f"divided among {processes.size} processes"),)
        )
        return _learner(options), None, where
    if processes is not None:
        raise InputError(
            f"--engine ray in {processes.size} processes: Ray starts those of the runs itself: "
            "start the command without torchrun"
        )
    from fastplastic.trials import OnRay, require_ray

    require_ray()
    device, needs = on_ray(options, options.device)
    there = replace(options, device=device)
    # Here nothing is trained: GPUs are left to the runs.
    loaded = _learner(replace(options, device="cpu"), place=f"{device} by Ray")
    facts = {**loaded.settings.to_dict(), **_task(options, loaded).facts}
    work = partial(trainer, there)
    engine = OnRay(work, facts, needs, address=options.address, warn=warn)
    return loaded, engine, (("runs", f"by Ray, {engine.place}: {needs} each"),)


def trainer(options: TrialOptions) -> "Trainer":
    """Return what makes the runs of a trial in a process that has nothing but the options."""
    from fastplastic.trials import Trainer

    loaded, kept = _learner(options), KeptWeights(options.output, options.results_file)
    return Trainer(_task(options, loaded), loaded.settings, partial(kept.keep, loaded))


def _learner(options: TrialOptions, *, place: str = "") -> Learner:
    from fastplastic.processes import alone

    share = options.choose_split if options.output else 0.0
    # Every run is made with all of the data.
    with alone():
        return learner(options, validation_share=share, place=place)


def _seeds(options: TrialOptions) -> str:
    first, last = options.seed, options.seed + options.seeds - 1
    if options.seeds == 1:
        return f"{first}: one seed gives no interval and shows nothing; take 3 or more"
    return f"{first} to {last}"


def _task(options: TrialOptions, loaded: Learner) -> "Task":
    from fastplastic.trials import Task, TrialData

    splits = loaded.splits
    data = TrialData(splits.train, splits.test, splits.plain, splits.validation)
    facts = {
        "model": options.model, "weights": loaded.digest, "data": options.data,
        "sizes": dict(splits.sizes), "images": splits.digest, "batch_size": options.batch_size,
        "augmentation": asdict(options.splits().augmentation), "model_kwargs": loaded.keywords,
        "layers": options.common(),
    }  # fmt: skip
    return Task(
        model=lambda seed: loaded.copy(), data=lambda seed: data, fresh=loaded.fresh,
        facts=facts,
    )  # fmt: skip


@contextmanager
def _resumable(options: TrialOptions) -> Iterator[None]:
    """Say how to go on when the trial is broken off."""
    try:
        yield
    except KeyboardInterrupt:
        lines = options.results_file.read_text().count("\n") if options.results_file.exists() else 0
        done = max(lines - 1, 0)
        warn(
            f"{done} finished run{'s' * (done != 1)} kept in {options.results_file}: the same "
            "command goes on from there"
        )
        raise


def _following(options: TrialOptions, trial: "Trial", arms: "tuple[Arm, ...]") -> str:
    """Return the command to type next: fine-tuning with what was shown to be better, or without."""
    again = replace(options, force=False)
    line: list[Any] = ["fastplastic", "finetune", *arguments(again, TrainingOptions)]
    better = [
        arm
        for arm in trial.arms
        if arm.kind == "reinit" and arm.final_tests and arm.final_tests[0].shown > 0
    ]
    if better:
        best = max(better, key=lambda arm: arm.final.mean)
        line += ["--arm", best.name]
    else:
        line += ["--no-reinit"]
    return shlex.join([*line, "-o", tuned_file(options.model)])
