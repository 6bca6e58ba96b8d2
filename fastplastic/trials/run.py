"""Run the arms of a trial for all seeds, interleaved, and keep every finished run."""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from time import perf_counter

from torch import nn

from fastplastic.trials.arms import BASELINE, Arm
from fastplastic.trials.loop import Training, evaluate, train
from fastplastic.trials.prepare import Prepared, Start
from fastplastic.trials.profile_figures import figures
from fastplastic.trials.results import Results, TrialRun
from fastplastic.trials.settings import TrainSettings
from fastplastic.trials.task import Task


@dataclass(frozen=True)
class Progress:
    """How far a trial is.

    Attributes:
        done: Runs that are finished.
        total: Runs of the whole trial.
        arm: Name of the arm that is running or has just finished.
        seed: Its seed.
        share: Share of its training that is done, 1 when it is finished.
        left: Seconds that the rest may take; None while nothing is known.
        run: What has just finished, or None.
    """

    done: int
    total: int
    arm: str
    seed: int
    share: float
    left: float | None
    run: TrialRun | None = None


def run_arms(
    task: Task,
    arms: Sequence[Arm],
    seeds: Sequence[int],
    settings: TrainSettings,
    results: Results,
    *,
    progress: Callable[[Progress], None] = lambda state: None,
    keep: Callable[[TrialRun, nn.Module], None] = lambda run, model: None,
) -> None:
    """Run what the results do not have yet.

    The arms of a seed run one after another, and each seed begins with another arm, so that a
    machine that grows slower or a mistake that depends on the order favours none.

    Args:
        task: Model and data.
        arms: The baseline and the others.
        seeds: One run of every arm for each.
        settings: The budget.
        results: Where finished runs are and go.
        progress: Told of every checkpoint.
        keep: Called with each finished run and its trained model, before the run is kept.

    Raises:
        InputError: An arm cannot be done with this model; before anything is trained.
    """
    wanted = {(arm.name, seed) for arm in arms for seed in seeds}
    clock = _Clock(wanted, results, progress)
    for seed, ordered in _schedule(arms, seeds):
        open_arms = [arm for arm in ordered if results.find(arm.name, seed) is None]
        if not open_arms:
            continue
        start = Start(task, settings, seed)
        if seed == seeds[0]:
            for arm in arms:
                start.check(arm)
        for arm in open_arms:
            run, model = _one(start, arm, settings, clock.of(arm, seed))
            try:
                keep(run, model)
            finally:
                # Weights that cannot be kept do not cost the run.
                results.add(run)
            clock.finished(run)


def _schedule(arms: Sequence[Arm], seeds: Sequence[int]) -> Iterator[tuple[int, Sequence[Arm]]]:
    for number, seed in enumerate(seeds):
        first = number % len(arms)
        yield seed, [*arms[first:], *arms[:first]]


def _one(
    start: Start, arm: Arm, settings: TrainSettings, tell: Callable[[float], None]
) -> tuple[TrialRun, nn.Module]:
    tell(0.0)
    prepared = start.prepare(arm)
    return train_prepared(start, prepared, arm, settings, tell), prepared.model


def train_prepared(
    start: Start,
    prepared: Prepared,
    arm: Arm,
    settings: TrainSettings,
    tell: Callable[[float], None],
) -> TrialRun:
    """Train a model that was treated, and return its run.

    Args:
        start: Where it comes from.
        prepared: The model.
        arm: What was done to it.
        settings: The budget.
        tell: Called with the share that is done, at every checkpoint.
    """
    curve = _Curve(start, settings, prepared, tell)
    curve.point(0)
    training = train(
        prepared.model, start.data.train, settings, seed=start.seed, hold=prepared.hold,
        checkpoint=curve.checkpoint,
    )  # fmt: skip
    if training.diverged_at is not None:
        curve.point(training.steps)
    return curve.run(arm, training)


class _Curve:
    """The points of one run as they come."""

    def __init__(
        self,
        start: Start,
        settings: TrainSettings,
        prepared: Prepared,
        tell: Callable[[float], None],
    ) -> None:
        self._start, self._settings, self._prepared, self._tell = start, settings, prepared, tell
        self._total = settings.epochs * len(start.data.train)
        self._steps: list[int] = []
        self._accuracy: list[float] = []
        self._loss: list[float | None] = []
        self._train_loss: list[float] = []

    def point(self, step: int) -> None:
        """Measure the test images."""
        point = evaluate(self._prepared.model, self._start.data.test, self._settings)
        self._steps.append(step)
        self._accuracy.append(point["accuracy"])
        self._loss.append(point["loss"])

    def checkpoint(self, step: int, loss: float) -> None:
        """Add a point after training."""
        self._train_loss.append(loss)
        self.point(step)
        self._tell(step / self._total)

    def run(self, arm: Arm, training: Training) -> TrialRun:
        """Return the finished run."""
        start, prepared = self._start, self._prepared
        validation = None
        if start.data.validation is not None:
            found = evaluate(prepared.model, start.data.validation, self._settings)
            validation = found["accuracy"]
        report = prepared.report
        return TrialRun(
            arm=arm.name,
            seed=start.seed,
            total=self._total,
            steps=self._steps,
            accuracy=self._accuracy,
            loss=self._loss,
            train_loss=self._train_loss,
            validation=validation,
            diverged_at=training.diverged_at,
            seconds={**start.begun, **prepared.seconds, "train": training.seconds},
            count=prepared.plan.count if prepared.plan else 0,
            layers=prepared.plan.counts if prepared.plan else {},
            reset_loss=[report.loss_before, report.loss_after] if report else [],
            notes=list(report.notes) if report else [],
            figures=figures(start.profile()) if arm.kind == BASELINE else {},
        )


class _Clock:
    """Says how far the trial is, and how long the rest may take."""

    def __init__(
        self,
        wanted: Collection[tuple[str, int]],
        results: Results,
        progress: Callable[[Progress], None],
    ) -> None:
        self._wanted, self._results, self._progress = wanted, results, progress
        self._begun, self._here = perf_counter(), 0

    def of(self, arm: Arm, seed: int) -> Callable[[float], None]:
        """Return what to tell of the share that is done of a run."""

        def tell(share: float) -> None:
            self._progress(self._state(arm.name, seed, share))

        return tell

    def finished(self, run: TrialRun) -> None:
        """Tell of a finished run."""
        self._here += 1
        self._progress(replace(self._state(run.arm, run.seed, 0.0), share=1.0, run=run))

    def _state(self, arm: str, seed: int, share: float) -> Progress:
        # The file may hold other arms and seeds too.
        done = sum((run.arm, run.seed) in self._wanted for run in self._results.runs)
        total = len(self._wanted)
        work = self._here + share
        pace = (perf_counter() - self._begun) / work if work else None
        left = None if pace is None else pace * max(total - done - share, 0.0)
        return Progress(done, total, arm, seed, share, left)
