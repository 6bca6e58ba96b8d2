"""The public functions of this room: compare arms on a model, and fine-tune one."""

import copy
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from fastplastic.errors import InputError
from fastplastic.files import plain as plain_values
from fastplastic.measure import Profile
from fastplastic.model import check_built
from fastplastic.planning import Plan
from fastplastic.processes import all_processes
from fastplastic.reinit import ReinitReport
from fastplastic.trials.arms import BASELINE, Arm, parse_arm, with_controls
from fastplastic.trials.engine import Engine, InTurn, Keep, Trainer
from fastplastic.trials.loop import check_budget, evaluate, random_state_kept
from fastplastic.trials.missing import Progress, run_arms
from fastplastic.trials.outcome import outcome_of
from fastplastic.trials.prepare import Prepared, Start
from fastplastic.trials.record import Trial
from fastplastic.trials.results import Results, TrialRun
from fastplastic.trials.run import train_prepared
from fastplastic.trials.settings import TrainSettings
from fastplastic.trials.task import Task, TrialData, digest_of
from fastplastic.trials.together import Answer, divided

# What is tried where no arm is named: the setting that benchmarks/transfer tries on all networks.
DEFAULT_ARMS = ("dormant@0.3:zero+compensate+recalibrate",)


def trial(
    model: nn.Module,
    train: Any,
    test: Iterable[Any],
    *,
    arms: Sequence[Arm | str] = DEFAULT_ARMS,
    seeds: int | Sequence[int] = 3,
    settings: TrainSettings | None = None,
    plain: Iterable[Any] | None = None,
    validation: Iterable[Any] | None = None,
    fresh: Callable[[int], nn.Module] | None = None,
    results: str | Path | None = None,
    progress: Callable[[Progress], None] = lambda state: None,
) -> Trial:
    """Fine-tune a model in several arms under one budget and say which is better.

    Every arm starts from the same weights and the same head, and sees the same batches in the same
    order with the same augmentation; seeds differ in these, in fresh weights and in random choices.
    The model itself stays as it is. Probe, profile and plan see training images only; the test
    images are seen at the checkpoints of the curves and nothing is chosen by them. The global
    random states are put back.

    Where several processes of torch.distributed call it alike, the runs are divided among them, and
    each gets the whole trial; the first one writes `results` and tells of the progress.

    Args:
        model: The pretrained model, with a head for these classes, on the device to train on.
        train: A DataLoader or another iterable with a length that yields (images, labels); what it
            shuffles and augments is drawn from the global random state of torch, numpy or Python,
            or from the loader's own generator, which are seeded before each epoch.
        test: Yields (images, labels), each time the same.
        arms: Texts such as "dormant@0.3:zero+compensate", "swr@0.05", "recalibrate", "remove",
            "shrink-perturb" or "fresh", or `Arm`s; by default the mild setting that
            benchmarks/transfer tries on all networks. The baseline is always among them, and so
            is for each dose the control at random.
        seeds: How many, or which; with one there is no interval.
        settings: The budget; by default 5 epochs of AdamW at 1e-3.
        plain: Training images without augmentation, each time the same; by default `train`.
        validation: Images apart from both, by which `Trial.chosen` is chosen.
        fresh: Seed -> the same architecture with random weights, for the arm "fresh".
        results: A file of JSON lines to which every finished run is appended; with it, a trial that
            was broken off goes on where it was. Kept in memory only by default.
        progress: Told of every checkpoint.

    Raises:
        InputError: An argument is unusable, or an arm cannot be done with this model.
        ProcessError: Another process differs, failed or is gone.
        FileError: `results` has results of other settings or cannot be written.
    """
    chosen = with_controls(arms)
    numbers = check_seeds(seeds)
    settings = settings or TrainSettings()
    check_built(model)
    data = TrialData(train, test, train if plain is None else plain, validation)
    task = Task(
        model=lambda seed: copy.deepcopy(model),
        data=lambda seed: data,
        fresh=fresh,
        facts={"weights": digest_of(model), "batches": len(train)},
    )
    return run_trial(task, chosen, numbers, settings, results=results, progress=progress)


@dataclass(frozen=True, eq=False)
class FineTuning:
    """What `finetune` did to a model.

    Attributes:
        run: The curve and what each part took.
        plan: What was re-initialised, or None.
        report: How, or None.
        before: Profile of the model before, behind its fitted head.
        after: Profile of the trained model on the same images.
        untreated: {"accuracy": ..., "loss": ...} on the test images before anything was
            re-initialised; None where nothing was.
    """

    run: TrialRun
    plan: Plan | None
    report: ReinitReport | None
    before: Profile
    after: Profile
    untreated: Mapping[str, float] | None = None


def finetune(
    model: nn.Module,
    train: Any,
    test: Iterable[Any],
    *,
    arm: Arm | str = DEFAULT_ARMS[0],
    plan: Plan | None = None,
    settings: TrainSettings | None = None,
    plain: Iterable[Any] | None = None,
    seed: int = 0,
    progress: Callable[[float], None] = lambda share: None,
) -> FineTuning:
    """Probe, profile, plan, re-initialise and train a model in place: one arm of a `trial`.

    Args:
        model: The pretrained model, with a head for these classes, on the device to train on.
        train: As for `trial`.
        test: As for `trial`.
        arm: A dose such as "dormant@0.3:zero+compensate", or "baseline" for none; by default that
            of `trial`. Where plasticity is lost, "dormant@0.6:fresh+shrink=0.5+max=1" did better in
            benchmarks/transfer, and harm where it is not.
        plan: A plan for this model to take instead of making one; the arm says how it is applied.
        settings: The budget.
        plain: As for `trial`.
        seed: Of all draws.
        progress: Told which share of the training is done.

    Raises:
        InputError: An argument is unusable, or the arm cannot be done with this model.
        FileError: The plan does not fit the model.
    """
    chosen = arm if isinstance(arm, Arm) else parse_arm(arm)
    if chosen.kind not in (BASELINE, "reinit"):
        raise InputError(f"arm {chosen.name}: expected a dose or {BASELINE}: see trial for others")
    if (together := all_processes()) is not None:
        raise InputError(
            f"finetune in one of {together.size} processes: it trains in one alone, expected that "
            "to be said: with fastplastic.alone()"
        )
    settings = settings or TrainSettings()
    check_budget(settings)
    check_built(model)
    data = TrialData(train, test, train if plain is None else plain)
    task = Task(lambda seed: model, lambda seed: data)
    with random_state_kept():
        start = Start(task, settings, seed)
        before, prepared, untreated = start.profile(), Prepared(model), None
        if chosen.dose is not None:
            untreated = evaluate(model, start.data.test, settings)
            prepared = start.treat(chosen, plan)
        run = train_prepared(start, prepared, chosen, settings, progress)
        after = start.profile_again()
    return FineTuning(run, prepared.plan, prepared.report, before, after, untreated)


def run_trial(
    task: Task,
    arms: Sequence[Arm],
    seeds: Sequence[int],
    settings: TrainSettings,
    *,
    engine: Engine | None = None,
    results: str | Path | None = None,
    progress: Callable[[Progress], None] = lambda state: None,
    keep: Keep = lambda run, model: None,
    settle: Callable[[TrialRun], None] = lambda run: None,
) -> Trial:
    """Run a task of which model and data may depend on the seed; see `trial`.

    Args:
        task: Model and data.
        arms: The baseline and the others.
        seeds: One run of every arm for each.
        settings: The budget.
        engine: What makes the runs; by default one after the other in this process.
        results: As for `trial`.
        progress: As for `trial`.
        keep: Called with each run that is made here and its trained model.
        settle: Called with each run, wherever it was made, before it is kept.
    """
    check_budget(settings)
    told = {**settings.to_dict(), **task.facts}

    def lead(chosen: Engine) -> Answer:
        store = Results(None if results is None else Path(results), told)
        with store.locked():
            run_arms(chosen, arms, seeds, store, progress=progress, settle=settle)
        # In the order of the seeds, whichever run ended first.
        own = (run for run in store.runs if run.seed in seeds)
        return sorted(own, key=lambda run: seeds.index(run.seed)), store.note

    trainer, together = Trainer(task, settings, keep), all_processes()
    with random_state_kept():
        if engine is not None or together is None:
            runs, note = lead(engine or InTurn(trainer))
        else:
            asked = {"the arms": [arm.name for arm in arms], "the seeds": list(seeds), **told}
            facts = {name: json.dumps(plain_values(value)) for name, value in asked.items()}
            runs, note = divided(together, facts, trainer, lead)
    found = outcome_of(arms, runs, told)
    return replace(found, notes=(note, *found.notes)) if note else found


def check_seeds(seeds: int | Sequence[int]) -> tuple[int, ...]:
    """Return the seeds as numbers; InputError when there is none or one twice."""
    numbers = tuple(range(seeds)) if isinstance(seeds, int) else tuple(seeds)
    if not numbers or len(set(numbers)) < len(numbers):
        raise InputError(f"seeds {seeds!r}: expected one or more, each once: correct them")
    return numbers
