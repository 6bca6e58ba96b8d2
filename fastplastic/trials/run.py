"""One run of a trial: the training of a model that was treated, measured as it goes."""

from collections.abc import Callable

from fastplastic.trials.arms import BASELINE, Arm
from fastplastic.trials.loop import Training, evaluate, train
from fastplastic.trials.prepare import Prepared, Start
from fastplastic.trials.profile_figures import figures
from fastplastic.trials.results import TrialRun
from fastplastic.trials.settings import TrainSettings


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
