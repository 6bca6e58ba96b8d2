"""Make the runs that the results of a trial do not have yet, and keep each when it is finished."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from time import perf_counter

from fastplastic.trials.arms import Arm
from fastplastic.trials.engine import Engine, Made, Pending
from fastplastic.trials.results import Results, TrialRun


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
    engine: Engine,
    arms: Sequence[Arm],
    seeds: Sequence[int],
    results: Results,
    *,
    progress: Callable[[Progress], None] = lambda state: None,
    settle: Callable[[TrialRun], None] = lambda run: None,
) -> None:
    """Run what the results do not have yet.

    Args:
        engine: What makes the runs.
        arms: The baseline and the others.
        seeds: One run of every arm for each.
        results: Where finished runs are and go.
        progress: Told of every checkpoint.
        settle: Called with each run before it is kept.

    Raises:
        InputError: An arm cannot be done with this model; no run is kept then.
    """
    pending = missing_runs(arms, seeds, results)
    if pending:
        engine.run(pending, _Keeper(results, (arms, seeds), progress, settle))


def missing_runs(arms: Sequence[Arm], seeds: Sequence[int], results: Results) -> list[Pending]:
    """Return the runs that the results do not have, in the order in which they are to be made.

    The arms of a seed run one after another, and each seed begins with another arm, so that a
    machine that grows slower or a mistake that depends on the order favours none. The first run of
    the first seed tries first whether the model can give all arms.
    """
    found = [
        Pending(arm, seed)
        for seed, ordered in _schedule(arms, seeds)
        for arm in ordered
        if results.find(arm.name, seed) is None
    ]
    if found and found[0].seed == seeds[0]:
        found[0] = replace(found[0], check=tuple(arms))
    return found


def _schedule(arms: Sequence[Arm], seeds: Sequence[int]) -> Iterator[tuple[int, Sequence[Arm]]]:
    for number, seed in enumerate(seeds):
        first = number % len(arms)
        yield seed, [*arms[first:], *arms[:first]]


class _Keeper:
    """Keeps finished runs, and says how far the trial is and how long the rest may take.

    Args:
        results: Where they go.
        wanted: Arms and seeds of this trial: the file may hold others too.
        progress: Told of every checkpoint.
        settle: Called with each run before it is kept.
    """

    def __init__(
        self,
        results: Results,
        wanted: tuple[Sequence[Arm], Sequence[int]],
        progress: Callable[[Progress], None],
        settle: Callable[[TrialRun], None],
    ) -> None:
        self._results, self._progress, self._settle = results, progress, settle
        self._wanted = {(arm.name, seed) for arm in wanted[0] for seed in wanted[1]}
        self._begun, self._here = perf_counter(), 0

    def share(self, item: Pending, share: float) -> None:
        """Tell which share of a run is done."""
        self._progress(self._state(item.arm.name, item.seed, share))

    def finished(self, made: Made) -> None:
        """Keep a finished run, and tell of it."""
        try:
            if made.error is None:
                self._settle(made.run)
        finally:
            # Weights that cannot be kept do not cost the run.
            self._results.add(made.run)
        if made.error is not None:
            raise made.error
        self._here += 1
        state = self._state(made.run.arm, made.run.seed, 0.0)
        self._progress(replace(state, share=1.0, run=made.run))

    def _state(self, arm: str, seed: int, share: float) -> Progress:
        done = sum((run.arm, run.seed) in self._wanted for run in self._results.runs)
        total = len(self._wanted)
        work = self._here + share
        pace = (perf_counter() - self._begun) / work if work else None
        left = None if pace is None else pace * max(total - done - share, 0.0)
        return Progress(done, total, arm, seed, share, left)
