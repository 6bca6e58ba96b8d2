"""From a trial to what a person reads: pure functions that return rich renderables."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from fastplastic.cli.render import count, facts, percent, stacked, table_of

if TYPE_CHECKING:
    from fastplastic.trials import ArmResult, Comparison, Estimate, FineTuning, Trial

_BARS = "▁▂▃▄▅▆▇█"
_LEGEND = (
    "accuracy on the test images: at the end, the mean over the run, with half of the 95 % "
    "interval over seeds; curve: from the start to the end, all arms on one scale. to baseline, "
    "to random: paired difference of the accuracy at the end in points; * p < 0.05 after Holm's "
    "correction. steps: share of the updates after which the accuracy is that of the baseline's "
    "end. cost: profile, plan and re-initialisation as a share of the training time."
)


def sparkline(values: Sequence[float], low: float, high: float) -> str:
    """Return one bar for each value, on a scale from low to high."""
    span = (high - low) or 1.0
    last = len(_BARS) - 1
    return "".join(_BARS[round(last * min(max((x - low) / span, 0), 1))] for x in values)


def trial(
    found: "Trial",
    header: Sequence[tuple[str, str]],
    written: Sequence[tuple[str, str]] = (),
) -> RenderableType:
    """Return the table of the arms and the verdict."""
    points = [x for arm in found.arms for x in arm.curve]
    low, high = min(points), max(points)
    parts: list[RenderableType] = [facts(header), _table(found, low, high)]
    parts.append(facts([("verdict", sentence) for sentence in found.verdict]))
    parts += [facts(written)] if written else []
    parts.append(Text(_LEGEND, style="dim"))
    return stacked(*parts)


def _table(found: "Trial", low: float, high: float) -> Table:
    titles = (
        "arm", "curve", "end", "mean", "to baseline", "to random", "steps", "cost", "diverged",
    )  # fmt: skip
    rows = []
    for arm in found.arms:
        tests = {test.against == "baseline": test for test in arm.final_tests}
        rows.append(
            (
                arm.name, sparkline(arm.curve, low, high), _estimate(arm.final),
                _estimate(arm.area), _difference(tests.get(True)), _difference(tests.get(False)),
                _steps(arm), "" if arm.cost is None else percent(arm.cost),
                f"{arm.diverged} of {len(arm.seeds)}" if arm.diverged else "",
            )
        )  # fmt: skip
    kept = [i for i in range(len(titles)) if i < 4 or any(row[i] for row in rows)]
    return table_of([titles[i] for i in kept], [[row[i] for i in kept] for row in rows])


def _estimate(found: "Estimate") -> str:
    mean = f"{100 * found.mean:.1f}"
    return mean if found.high is None else f"{mean} ±{100 * (found.high - found.mean):.1f}"


def _difference(test: "Comparison | None") -> str:
    if test is None:
        return ""
    return f"{100 * test.difference.mean:+.1f}{'*' if test.shown else ''}"


def _steps(arm: "ArmResult") -> str:
    if arm.steps_to_baseline is None:
        return "never"
    return percent(arm.steps_to_baseline)


def tuned(found: "FineTuning", header: Sequence[tuple[str, str]], written: str) -> RenderableType:
    """Return how the training went, and the profile before and after."""
    run = found.run
    curve = sparkline(run.accuracy, min(run.accuracy), max(run.accuracy))
    seconds = run.seconds
    parts = [key for key in seconds if key != "train"]
    spent = ", ".join(f"{key} {seconds[key]:.1f} s" for key in [*parts, "train"])
    rows = [
        ("accuracy", f"{100 * run.accuracy[0]:.1f} %", f"{100 * run.accuracy[-1]:.1f} %"),
        ("loss", _number(run.loss[0]), _number(run.loss[-1])),
    ]
    before, after = found.before.totals, found.after.totals
    for name in ("dead", "frozen", "dormant"):
        pair = (count(getattr(before, name)), count(getattr(after, name)))
        rows.append((f"{name} units", *pair))
    below = [("curve", curve), ("time", spent), ("file", written)]
    return stacked(
        facts(header), table_of(("on the test images", "before", "after"), rows), facts(below)
    )


def _number(loss: float | None) -> str:
    return "not finite" if loss is None else f"{loss:.3f}"
