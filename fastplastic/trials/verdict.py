"""The verdict of a trial in plain words: what is shown, and what could not have been seen."""

from collections.abc import Mapping, Sequence

from fastplastic.trials.arms import BASELINE
from fastplastic.trials.record import ArmResult
from fastplastic.trials.statistics import Comparison

# A baseline may end so far below its beginning by chance.
_NOISE = 0.01


def verdict_of(arms: Sequence[ArmResult]) -> tuple[str, ...]:
    """Return one sentence or two for every arm that re-initialises."""
    by_name = {arm.name: arm for arm in arms}
    return tuple(_sentence(arm, by_name) for arm in arms if arm.kind == "reinit")


def notes_of(arms: Sequence[ArmResult]) -> tuple[str, ...]:
    """Return what makes the comparison a poor one."""
    lost = next((_lost(arm) for arm in arms if arm.name == BASELINE), 0.0)
    if lost <= _NOISE:
        return ()
    return (
        f"the baseline ends {100 * lost:.1f} points below where it began, so that a gain over it "
        "says little: take a smaller learning rate or another budget",
    )


def _lost(arm: ArmResult) -> float:
    """Return how far an arm ends below its beginning."""
    return arm.curve[0] - arm.curve[-1]


def _sentence(arm: ArmResult, by_name: Mapping[str, ArmResult]) -> str:
    tests = {test.against == BASELINE: test for test in arm.final_tests}
    against = tests.get(True)
    if against is None:
        return f"{arm.name}: there is no baseline to compare with"
    text = f"{arm.name}: {_compared(against, 'the baseline')}"
    text += _sooner(arm)
    diverged = f"; it diverged in {arm.diverged} of {len(arm.seeds)} runs" if arm.diverged else ""
    control = tests.get(False)
    if control is not None and (against.shown > 0 or control.shown):
        text += f"; {_controlled(control)}"
    return text + diverged + _alternatives(arm, by_name)


def _compared(test: Comparison, other: str) -> str:
    seeds = f"{test.difference.n} seed{'s' * (test.difference.n != 1)}"
    if test.difference.n < 2:
        gain = _points(test.difference.mean)
        return f"{gain} points against {other} with one seed, which says nothing: take more seeds"
    if test.p is None:
        same = _points(test.difference.mean)
        return (
            f"no difference to {other} shown (the same {same} points in all {seeds}, which leaves "
            "nothing to test: take more seeds or more test images)"
        )
    if test.shown:
        word = "better" if test.shown > 0 else "worse"
        return f"{word} than {other} by {_gain(test)}, {seeds}"
    assert test.detectable is not None
    unseen = f"an effect under {100 * test.detectable:.1f} points would hardly have been seen"
    if test.detectable > 1:
        unseen = "too few to show any: take more"
    found = test.difference
    if found.low is not None and found.high is not None and found.low * found.high > 0:
        unseen += "; the interval is of this comparison alone, p of all of them"
    return f"no difference to {other} shown ({_gain(test)}, {seeds}; {unseen})"


def _controlled(test: Comparison) -> str:
    if test.shown > 0:
        return f"better than as many at random by {_gain(test)}"
    if test.shown < 0:
        return f"as many at random do better by {100 * -test.difference.mean:.1f} points"
    return f"whether the choice does better than as many at random is not shown ({_gain(test)})"


def _sooner(arm: ArmResult) -> str:
    """Say after which share of the updates the arm is where the baseline ends, if that is shown."""
    shown = [test for test in arm.saved_tests if test.against == BASELINE and test.shown > 0]
    if not shown or arm.steps_to_baseline is None:
        return ""
    share = f"{100 * arm.steps_to_baseline:.0f} % of the updates"
    p = shown[0].corrected
    return f"; where the baseline ends it is after {share}" + (f" (p {_p(p)})" if p else "")


def _alternatives(arm: ArmResult, by_name: Mapping[str, ArmResult]) -> str:
    """Say whether something simpler does as well."""
    simpler = {f"remove:{arm.name}": "removing the same", "recalibrate": "recalibrating alone"}
    found = [
        text
        for name, text in simpler.items()
        if name in by_name and by_name[name].final.mean >= arm.final.mean
    ]
    return f"; {' and '.join(found)} did as well" if found else ""


def _gain(test: Comparison) -> str:
    found = test.difference
    interval = ""
    if found.low is not None and found.high is not None:
        interval = f" (95 % interval {_points(found.low)} to {_points(found.high)}"
        p = test.corrected
        interval += ")" if p is None else f", p {_p(p)} after Holm)"
    return f"{_points(found.mean)} points{interval}"


def _points(share: float) -> str:
    return f"{100 * share:+.1f}"


def _p(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"= {p:.2g}"
