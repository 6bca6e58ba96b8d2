"""From a trial to what a person reads: pure functions that return rich renderables."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from fastplastic.cli.render import count, facts, percent, stacked, table_of

if TYPE_CHECKING:
    from fastplastic.trials import ArmResult, Comparison, Estimate, FineTuning, Trial

_BARS = "▁▂▃▄▅▆▇█"
_ALWAYS = ("arm", "curve", "end", "mean")
# Left out one after the other where a terminal is narrow, and how wide an arm's name has to be.
_LEAST = ("best", "reset", "cost", "mean", "steps", "to random", "curve")
_ARM, _GAP = 24, 3
_LEGEND = (
    "end, best, mean: accuracy on the test images at the end, at best, over the run, with half of "
    "the 95 % interval over seeds; curve: from the start to the end, all arms on one scale. to "
    "baseline, to random: paired difference of the accuracy at the end in points; * p < 0.05 after "
    "Holm's correction. steps: share of the updates after which the accuracy is that of the "
    "baseline's end, * likewise, against the baseline's own. reset: units or weights, "
    "mean over seeds. cost: profile, plan and re-initialisation as a share of the training time. "
    "Columns that have no room are left out: --json has all."
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
    *,
    width: int,
) -> RenderableType:
    """Return the table of the arms and the verdict; in narrow ones columns are left out."""
    parts: list[RenderableType] = [facts(header), _table(found, width)]
    parts.append(facts([("verdict", sentence) for sentence in found.verdict]))
    parts += [facts(written)] if written else []
    parts.append(Text(_LEGEND, style="dim"))
    return stacked(*parts)


def _table(found: "Trial", width: int) -> Table:
    rows = _columns(found)
    kept = [title for title, cells in rows.items() if title in _ALWAYS or any(cells)]
    for title in _LEAST:
        sizes = {name: max(map(len, (name, *rows[name]))) for name in kept}
        sizes["arm"] = min(sizes["arm"], _ARM)
        if sum(sizes.values()) + _GAP * (len(kept) - 1) <= width:
            break
        kept = [name for name in kept if name != title]
    taken = sum(sizes[name] for name in kept if name != "arm") + _GAP * (len(kept) - 1)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for title in kept:
        left = title in ("arm", "curve")
        table.add_column(
            title, justify="left" if left else "right", no_wrap=title != "arm", overflow="fold"
        )
    for number in range(len(found.arms)):
        cells = {title: rows[title][number] for title in kept}
        cells["arm"] = broken(cells["arm"], max(width - taken, _ARM))
        table.add_row(*map(Text, cells.values()))
    return table


def broken(name: str, width: int) -> str:
    """Return the name of an arm in lines of a width, broken behind ":" and "+"."""
    lines = [""]
    for part in re.findall(r"[^:+]+[:+]?", name):
        if lines[-1] and len(lines[-1] + part) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def _columns(found: "Trial") -> dict[str, list[str]]:
    points = [x for arm in found.arms for x in arm.curve]
    low, high = min(points), max(points)
    columns: dict[str, list[str]] = {}
    for arm in found.arms:
        tests = {test.against == "baseline": test for test in arm.final_tests}
        cells = {
            "arm": arm.name,
            "curve": sparkline(arm.curve, low, high),
            "end": _estimate(arm.final),
            "best": _estimate(arm.best),
            "mean": _estimate(arm.area),
            "to baseline": _difference(tests.get(True)),
            "to random": _difference(tests.get(False)),
            "steps": _steps(arm),
            "reset": f"{arm.count:,.0f}" if arm.count else "",
            "cost": "" if arm.cost is None else percent(arm.cost),
            "diverged": f"{arm.diverged} of {len(arm.seeds)}" if arm.diverged else "",
        }
        for title, cell in cells.items():
            columns.setdefault(title, []).append(cell)
    return columns


def _estimate(found: "Estimate") -> str:
    mean = f"{100 * found.mean:.1f}"
    if found.high is None:
        return mean
    half = 100 * (found.high - found.mean)
    return f"{mean} ±{half:.1f}" if half <= 100 else f"{mean} ±>100"


def _difference(test: "Comparison | None") -> str:
    if test is None:
        return ""
    return f"{100 * test.difference.mean:+.1f}{'*' if test.shown else ''}"


def _steps(arm: "ArmResult") -> str:
    if arm.steps_to_baseline is None:
        return "never"
    shown = any(test.against == "baseline" and test.shown for test in arm.saved_tests)
    return percent(arm.steps_to_baseline) + "*" * shown


def tuned(found: "FineTuning", header: Sequence[tuple[str, str]], written: str) -> RenderableType:
    """Return how the training went, and the profile before and after."""
    run = found.run
    curve = sparkline(run.accuracy, min(run.accuracy), max(run.accuracy))
    seconds = run.seconds
    parts = [key for key in seconds if key != "train"]
    spent = ", ".join(f"{key} {seconds[key]:.1f} s" for key in [*parts, "train"])
    titles = ["on the test images", "before", "after"]
    rows = [
        ["accuracy", percent(run.accuracy[0]), percent(run.accuracy[-1])],
        ["loss", _number(run.loss[0]), _number(run.loss[-1])],
    ]
    before, after = found.before.totals, found.after.totals
    for name in ("dead", "frozen", "dormant"):
        rows.append([f"{name} units", count(getattr(before, name)), count(getattr(after, name))])
    if found.untreated is not None:
        titles.insert(2, "re-initialised")
        rows[0].insert(1, percent(found.untreated["accuracy"]))
        rows[1].insert(1, _number(found.untreated["loss"]))
        for row in rows[2:]:
            row.insert(2, "")
    below = [("curve", curve), ("time", spent), ("file", written)]
    return stacked(facts(header), table_of(titles, rows), facts(below))


def _number(loss: float | None) -> str:
    return "not finite" if loss is None else f"{loss:.3f}"
