"""Where the runs of a trial are made: an engine takes those that are missing, and tells of each.

The one here makes them in this process, one after the other. Others make several at once; whichever
it is, a run has the same numbers, and they are told of in the order in which they end.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from torch import nn

from fastplastic.processes import alone
from fastplastic.trials.arms import Arm
from fastplastic.trials.prepare import Start
from fastplastic.trials.results import TrialRun
from fastplastic.trials.run import train_prepared
from fastplastic.trials.settings import TrainSettings
from fastplastic.trials.task import Task

Keep = Callable[[TrialRun, nn.Module], None]


@dataclass(frozen=True)
class Pending:
    """A run that is to be made.

    Attributes:
        arm: What is done to the model.
        seed: The seed.
        check: Arms that are tried first, whether this model can give them at all.
    """

    arm: Arm
    seed: int
    check: tuple[Arm, ...] = ()


@dataclass(frozen=True)
class Made:
    """A run that is finished.

    Attributes:
        run: The run.
        error: Why its weights could not be kept; None where all is well.
    """

    run: TrialRun
    error: BaseException | None = None


class Listener(Protocol):
    """Who is told of runs; whatever it raises ends the trial."""

    def share(self, item: Pending, share: float) -> None:
        """Hear which share of the training of a run is done."""

    def finished(self, made: Made) -> None:
        """Hear of a finished run."""


class Engine(Protocol):
    """What makes the runs of a trial."""

    def run(self, pending: Sequence[Pending], listener: Listener) -> None:
        """Make runs, and tell of each when it is finished, in the thread that called."""


@dataclass(eq=False)
class Trainer:
    """Makes runs in this process. Those of one seed after another share where they start from.

    Attributes:
        task: Model and data.
        settings: The budget.
        keep: Called with each finished run and its trained model.
    """

    task: Task
    settings: TrainSettings
    keep: Keep = lambda run, model: None
    _start: Start | None = None

    def make(self, item: Pending, tell: Callable[[float], None]) -> Made:
        """Make a run, by this process alone.

        Args:
            item: Which.
            tell: Called with the share of the training that is done, at every checkpoint.

        Raises:
            InputError: The arm, or one that is tried first, cannot be done with this model.
        """
        with alone():
            start = self._started(item.seed)
            for arm in item.check:
                start.check(arm)
            tell(0.0)
            prepared = start.prepare(item.arm)
            run = train_prepared(start, prepared, item.arm, self.settings, tell)
            try:
                self.keep(run, prepared.model)
            # Weights that cannot be kept do not cost the run.
            except BaseException as error:
                return Made(run, error)
        return Made(run)

    def _started(self, seed: int) -> Start:
        if self._start is None or self._start.seed != seed:
            # The old one goes before there is room for two.
            self._start = None
            self._start = Start(self.task, self.settings, seed)
        return self._start


@dataclass(frozen=True, eq=False)
class InTurn:
    """The engine that makes one run after the other in this process.

    Attributes:
        trainer: What makes them.
    """

    trainer: Trainer

    def run(self, pending: Sequence[Pending], listener: Listener) -> None:
        """Make runs, as any `Engine` does."""
        for item in pending:
            listener.finished(self.trainer.make(item, partial(listener.share, item)))
