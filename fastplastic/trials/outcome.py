"""From finished runs to what they show: curves, means with intervals, paired tests, a verdict."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np

from fastplastic.trials.arms import BASELINE, Arm, control_name
from fastplastic.trials.record import ArmResult, Trial
from fastplastic.trials.results import TrialRun
from fastplastic.trials.statistics import Comparison, compare, estimate, holm
from fastplastic.trials.verdict import notes_of, verdict_of

_NEVER = math.inf
# The figures that are tested, each a field `NAME_tests` of the result.
_TESTED = ("final", "best", "area", "saved")


def outcome_of(arms: Sequence[Arm], runs: Sequence[TrialRun], settings: Mapping[str, Any]) -> Trial:
    """Return what finished runs of some arms show; arms and seeds without a run are left out."""
    by_arm = {arm.name: [run for run in runs if run.arm == arm.name] for arm in arms}
    present = [arm for arm in arms if by_arm[arm.name]]
    results = [_result(arm, by_arm) for arm in present]
    results = _corrected(results)
    known = [arm for arm in results if arm.validation is not None and arm.diverged == 0]
    # The first of equals, so that the baseline wins ties.
    chosen = max(known, key=lambda arm: arm.validation or 0.0).name if known else None
    kept = tuple(run for arm in present for run in by_arm[arm.name])
    verdict, notes = verdict_of(results), notes_of(results)
    return Trial(tuple(results), kept, settings, verdict, chosen, notes)


def _result(arm: Arm, by_arm: Mapping[str, Sequence[TrialRun]]) -> ArmResult:
    runs = by_arm[arm.name]
    others = [BASELINE] * (arm.name != BASELINE)
    control = control_name(arm)
    others += [control] if control and by_arm.get(control) else []
    curves = np.array([_whole(run) for run in runs])
    losses = np.mean([_padded(run, run.loss) for run in runs], axis=0).tolist()
    goals = {run.seed: run.accuracy[-1] for run in by_arm.get(BASELINE, ())}
    shares = [_share(run, goals[run.seed]) for run in runs if run.seed in goals]
    middle = float(np.median(shares)) if shares else math.nan
    values = _figures(goals)
    figures: dict[str, Any] = {}
    for figure in _TESTED:
        found = values[figure]
        known = [run for run in runs if figure != "saved" or run.seed in goals]
        figures[figure] = estimate([found(run) for run in known]) if known else None
        figures[f"{figure}_tests"] = _tests(known, others, by_arm, found)
    checked = [run.validation for run in runs if run.validation is not None]
    return ArmResult(
        name=arm.name,
        kind=arm.kind,
        seeds=tuple(run.seed for run in runs),
        diverged=sum(run.diverged_at is not None for run in runs),
        steps=tuple(_steps(runs)),
        curve=tuple(curves.mean(axis=0).tolist()),
        loss_curve=tuple(x if math.isfinite(x) else None for x in losses),
        steps_to_baseline=middle if math.isfinite(middle) else None,
        reached=sum(share < _NEVER for share in shares),
        validation=float(np.mean(checked)) if checked else None,
        cost=_cost(runs),
        count=float(np.mean([run.count for run in runs])),
        **figures,
    )


def _figures(goals: Mapping[int, float]) -> dict[str, Callable[[TrialRun], float]]:
    """Return what the figures of a run are computed by, larger ones the better."""
    return {
        "final": final_of,
        "best": lambda run: max(run.accuracy),
        "area": area_of,
        "saved": lambda run: 1.0 - min(1.0, _share(run, goals[run.seed])),
    }


def _tests(
    runs: Sequence[TrialRun],
    others: Sequence[str],
    by_arm: Mapping[str, Sequence[TrialRun]],
    figure: Callable[[TrialRun], float],
) -> tuple[Comparison, ...]:
    found = []
    seeds = {run.seed for run in runs}
    for name in others:
        theirs = {run.seed: figure(run) for run in by_arm.get(name, ()) if run.seed in seeds}
        both = [run for run in runs if run.seed in theirs]
        if both:
            ours = [figure(run) for run in both]
            found.append(compare(name, ours, [theirs[run.seed] for run in both]))
    return tuple(found)


def _corrected(results: Sequence[ArmResult]) -> list[ArmResult]:
    """Correct the tests of each figure over arms of a kind that are compared with the same.

    Arms that re-initialise are the question of a trial; controls are there to explain the answer,
    and more of them must not make it less certain.
    """
    fields = [f"{figure}_tests" for figure in _TESTED]
    corrected = [{field: _correct(arm, field, results) for field in fields} for arm in results]
    return [
        replace(arm, **tests)  # type: ignore[arg-type]
        for arm, tests in zip(results, corrected, strict=True)
    ]


def _correct(arm: ArmResult, field: str, results: Sequence[ArmResult]) -> tuple[Comparison, ...]:
    own: Sequence[Comparison] = getattr(arm, field)
    corrected = []
    for test in own:
        ps = {
            other.name: theirs.p
            for other in results
            for theirs in getattr(other, field)
            if (other.kind == "reinit") == (arm.kind == "reinit")
            and (theirs.against == BASELINE) == (test.against == BASELINE)
        }
        corrected.append(replace(test, corrected=holm(ps)[arm.name]))
    return tuple(corrected)


def final_of(run: TrialRun) -> float:
    """Return the accuracy at the end."""
    return run.accuracy[-1]


def area_of(run: TrialRun) -> float:
    """Return the mean accuracy over the run, by the trapezoidal rule over the updates."""
    whole = _whole(run)
    steps = np.array(_marks(run), dtype=float)
    span = steps[-1] - steps[0]
    return float(np.trapezoid(whole, steps) / span) if span else whole[-1]


def _marks(run: TrialRun) -> list[int]:
    """Return the updates of a whole curve; of a run that diverged the last point goes on."""
    return run.steps if run.steps[-1] == run.total else [*run.steps, run.total]


def _whole(run: TrialRun) -> list[float]:
    return [*run.accuracy, *[run.accuracy[-1]] * (len(_marks(run)) - len(run.steps))]


def _steps(runs: Sequence[TrialRun]) -> list[int]:
    return max((_marks(run) for run in runs), key=len)


def _padded(run: TrialRun, values: Sequence[float | None]) -> list[float]:
    known = [math.nan if value is None else value for value in values]
    return [*known, *[known[-1]] * (len(_marks(run)) - len(known))]


def _share(run: TrialRun, goal: float) -> float:
    """Return the share of the updates after which the accuracy is first at the goal."""
    points = list(zip(run.steps, run.accuracy, strict=True))
    if points[0][1] >= goal:
        return 0.0
    for (begin, low), (end, high) in pairwise(points):
        if high >= goal:
            return (begin + (end - begin) * (goal - low) / (high - low)) / run.total
    return _NEVER


def _cost(runs: Sequence[TrialRun]) -> float | None:
    """Return the mean share of profile, plan and re-initialisation in the training time."""
    parts = ("profile", "plan", "reinit")
    treated = [run for run in runs if "plan" in run.seconds and run.seconds.get("train")]
    if not treated:
        return None
    costs = [sum(run.seconds.get(part, 0.0) for part in parts) for run in treated]
    return float(np.mean([c / r.seconds["train"] for c, r in zip(costs, treated, strict=True)]))
