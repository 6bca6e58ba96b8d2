"""The report of `fastplastic profile`: what stands out, bars for each stage, then the details."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fastplastic.cli.render import (
    LayerRow,
    Report,
    count,
    facts,
    layer_table,
    legend,
    magnitude,
    number_of,
    percent,
    rows_to_show,
    stacked,
    summary,
)

_STYLES = {"high": "bold red", "medium": "yellow", "low": "cyan", "none": "green"}
# More stages than this are shown several to a line.
_MOST_STAGES = 20
_LONGEST_BAR, _SHORTEST_BAR, _LONGEST_NAME = 12, 4, 28
_WORDS = (
    "Bars: share of the units that are dead or dormant, mean share of positions where the "
    "activation function is flat (sat), mean|g| on a logarithmic scale. --layers shows each layer."
)


def _share_of(number: int | None, row: LayerRow) -> float | None:
    return None if number is None else number / row.units


# What --sort takes: shares of the layer, where the table has counts of units.
_SORTED_BY: dict[str, Callable[[LayerRow], float | None]] = {
    "units": lambda row: row.units,
    "reset": lambda row: row.hidden / row.units,
    "dead": lambda row: _share_of(row.dead, row),
    "frozen": lambda row: _share_of(row.frozen, row),
    "dormant": lambda row: _share_of(row.dormant, row),
    "sat": lambda row: row.saturated_fraction,
    "h": lambda row: row.mean_abs_activation,
    "g": lambda row: row.mean_abs_gradient,
}


@dataclass(frozen=True)
class Shown:
    """How much of a report is shown.

    Attributes:
        layers: Whether the table of layers is.
        sort: The column by which it is sorted, the largest first; None for the network's order.
        top: How many of its rows are shown at most; None for as many as tell something.
        plain: Whether only ASCII can be printed.
    """

    layers: bool = False
    sort: str | None = None
    top: int | None = None
    plain: bool = False


@dataclass(frozen=True)
class Stage:
    """Layers that belong together, with what their units have in common; None where unknown."""

    name: str
    units: int
    dead: float | None
    dormant: float | None
    saturated: float | None
    gradient: float | None


# The last makes room first.
_BARS: dict[str, Callable[[Stage], float | None]] = {
    "dead": lambda stage: stage.dead,
    "dormant": lambda stage: stage.dormant,
    "sat": lambda stage: stage.saturated,
    "mean|g|": lambda stage: stage.gradient,
}


def report(report: Report, width: int, shown: Shown, advice: str = "") -> RenderableType:
    """Return the whole report, for so many characters a line."""
    parts: list[RenderableType] = [findings(report)]
    parts += [facts([("advice", advice)])] if advice else []
    stages = stages_of(report.rows)
    if stages:
        words = Text(_WORDS, style="dim")
        parts.append(Group(stage_table(stages, width, plain=shown.plain), words))
    parts.append(facts(report.facts))
    if shown.layers:
        parts.append(_layers(report, width, shown))
    parts += [summary(report, where=shown.layers), legend(report)]
    return stacked(*parts)


def findings(report: Report) -> Table:
    """Return what stands out: how severe it is in words, what it is, its figures, what to do."""
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in report.findings:
        label = "good" if finding.severity == "none" else finding.severity
        action = (f"-> {finding.action}", "italic")
        words = Text.assemble((finding.text, "bold"), f"\n{finding.evidence}\n", action)
        table.add_row(Text(label, style=_STYLES[finding.severity]), words)
    return table


def stage_of(name: str) -> str:
    """Return the stage of a layer: its name up to the first part that ends with a digit.

    `layer4.2.conv1` is in layer4, `blocks.3.attn.qkv` in blocks.3, and `head.fc` in head.
    """
    parts = name.split(".")
    for index, part in enumerate(parts):
        if part[-1:].isdigit():
            return ".".join(parts[: index + 1])
    return parts[0]


def stages_of(rows: Sequence[LayerRow]) -> tuple[Stage, ...]:
    """Return the stages of a network in its order, neighbours together where there are many."""
    groups = [(name, list(own)) for name, own in groupby(rows, lambda row: stage_of(row.name))]
    size = math.ceil(len(groups) / _MOST_STAGES)
    stages = []
    for start in range(0, len(groups), max(size, 1)):
        part = groups[start : start + size]
        first, last = part[0][0], part[-1][0]
        name = first if len(part) == 1 else f"{first} to {last}"
        stages.append(_stage(name, [row for _, own in part for row in own]))
    return tuple(stages)


def _stage(name: str, rows: Sequence[LayerRow]) -> Stage:
    def mean(value: Callable[[LayerRow], float | None]) -> float | None:
        """Return the mean over the units of those layers of which it is known."""
        known = [(number, row.units) for row in rows if (number := value(row)) is not None]
        units = sum(weight for _, weight in known)
        return sum(number * weight for number, weight in known) / units if units else None

    return Stage(
        name=name,
        units=sum(row.units for row in rows),
        dead=mean(lambda row: _share_of(row.dead, row)),
        dormant=mean(lambda row: _share_of(row.dormant, row)),
        saturated=mean(lambda row: row.saturated_fraction),
        gradient=mean(lambda row: row.mean_abs_gradient),
    )


def stage_table(stages: Sequence[Stage], width: int, *, plain: bool) -> Table:
    """Return bars of what is wrong in each stage, as long and as many as the width allows."""
    names = min(max(len(stage.name) for stage in stages), _LONGEST_NAME)
    kept = list(_BARS)
    # Name, number of units, and the figure behind each bar.
    while (room := width - names - 9 - 11 * len(kept)) < 0 and len(kept) > 1:
        kept.pop()
    length = min(_LONGEST_BAR, room // len(kept))
    length = length if length >= _SHORTEST_BAR else 0
    gradients = [stage.gradient for stage in stages if stage.gradient]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column("stage", overflow="fold", max_width=_LONGEST_NAME)
    table.add_column("units", justify="right", no_wrap=True)
    for title in kept:
        table.add_column(title, no_wrap=True)
    for stage in stages:
        cells = (_cell(stage, title, gradients, length, plain) for title in kept)
        table.add_row(Text(stage.name), count(stage.units), *cells)
    return table


def _cell(stage: Stage, title: str, gradients: Sequence[float], length: int, plain: bool) -> Text:
    value = _BARS[title](stage)
    if title == "mean|g|":
        return _bar(_on_scale(value, gradients), magnitude(value), length, plain)
    weak = 0.0 if title == "sat" or value is None else value
    style = "red" if weak >= 0.5 else "yellow" if weak >= 0.1 else ""
    return _bar(value, percent(value), length, plain, style)


def _on_scale(value: float | None, values: Sequence[float]) -> float | None:
    """Return where a value is among others on a logarithmic scale: 1 for the largest."""
    if not value or math.isnan(value):
        return None if value is None else 0.0
    low, high = math.log10(min(values)), math.log10(max(values))
    # The smallest still has a bar: it is not nothing.
    return 0.1 + 0.9 * (math.log10(value) - low) / (high - low) if high > low else 1.0


def _bar(share: float | None, figure: str, length: int, plain: bool, style: str = "") -> Text:
    full, empty = ("#", ".") if plain else ("█", "░")
    known = 0.0 if share is None or math.isnan(share) else share
    # What is there at all is seen, where there is room for a bar.
    filled = min(max(round(known * length), 1 if known > 0 else 0), length)
    bar = full * filled + empty * (length - filled)
    return Text.assemble((bar, style), " " if length else "", f"{figure:>8}")


def _layers(report: Report, width: int, shown: Shown) -> Group:
    rows = rows_to_show(report.rows) if shown.top is None and not shown.sort else report.rows
    if shown.sort:
        key = _SORTED_BY[shown.sort]
        # Among equals the network's order is kept; what is unknown comes last.
        rows = sorted(rows, key=lambda row: math.inf if (v := key(row)) is None else -v)
    rows = rows[: shown.top]
    left_out = len(report.rows) - len(rows)
    table: list[RenderableType] = [layer_table(rows, width)] if rows else []
    if left_out:
        text = f"{number_of(left_out, 'layer')} not shown: --json FILE has all of them"
        table.append(Text(text, style="italic"))
    return Group(*table)
