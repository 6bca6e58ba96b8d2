"""From a profile to the values that the page shows: no HTML here, and no numbers in the page."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from fastplastic.cli.page import charts, levels
from fastplastic.cli.page.origin import Origin
from fastplastic.cli.page.wiring_view import WiringView, wiring_view
from fastplastic.cli.render import LayerRow, Report, count, magnitude, number_of, percent

if TYPE_CHECKING:
    from fastplastic import LayerProfile, Profile

# How grave, what was found, by which numbers, what to do.
Finding = tuple[str, str, str, str]
UNKNOWN = -1


@dataclass(frozen=True)
class HeatCell:
    """A statistic of a layer: what is printed, what it is in full, and how dark it stands."""

    text: str
    title: str
    level: int


@dataclass(frozen=True)
class ScoreRow:
    """The dormant scores of one layer: the bars of its histogram and what they say in words.

    Attributes:
        low: Path of the bar of dormant units.
        rest: Path of the bars of the others.
        dormant: Number of dormant units; None where nothing was seen.
        numbers: The smallest score, the median and the largest.
    """

    low: str
    rest: str
    dormant: int | None
    numbers: tuple[float, ...]


@dataclass(frozen=True)
class TableColumn:
    """A column of the table: key of the JSON, or "weak"; its title; how its values are printed."""

    key: str
    title: str
    form: Callable[[Any], str] | None = None


@dataclass(frozen=True)
class TableCell:
    """What is printed, and the number itself as in the JSON; "" where it is text or not known.

    Attributes:
        text: What is printed.
        value: The number, by which rows are sorted.
        below: What is printed under it, in small letters.
    """

    text: str
    value: str
    below: str = ""


@dataclass(frozen=True)
class TableRow:
    """A layer of the table.

    Attributes:
        cells: Its cells.
        marked: Whether it is among the fewer that the table can be made to show: in a profile
            those with units, or rows that belong to units, that are dead, frozen or dormant.
    """

    cells: tuple[TableCell, ...]
    marked: bool


@dataclass(frozen=True)
class PageView:
    """All that stands in the page.

    Attributes:
        title: Name of the model.
        facts: (label, value) pairs of the header.
        names: Names of the layers in execution order; all rows of layers are in this order.
        findings: What is to be said first; the section is not there where there is nothing.
        heat: Cells of each layer under the titles of `HEAT`.
        scores: Dormant scores of each layer.
        wiring: How the layers are wired.
        columns: Columns of the table.
        rows: Rows of the table.
        report: What the terminal shows of the same profile.
        origin: How the page came about.
        circumstances: (label, value) pairs: under which the profile was made.
    """

    title: str
    facts: tuple[tuple[str, str], ...]
    names: tuple[str, ...]
    findings: tuple[Finding, ...]
    heat: tuple[tuple[HeatCell, ...], ...]
    scores: tuple[ScoreRow, ...]
    wiring: WiringView
    columns: tuple[TableColumn, ...]
    rows: tuple[TableRow, ...]
    report: Report
    origin: Origin
    circumstances: tuple[tuple[str, str], ...]


HEAT = ("dead", "frozen", "dormant", "saturated", "mean|g|")
_COLUMNS = (
    TableColumn("name", "layer"),
    TableColumn("kind", "kind"),
    TableColumn("activation", "act"),
    TableColumn("units", "units", count),
    TableColumn("hidden", "reset", count),
    TableColumn("weak", "weak", count),
    TableColumn("dead", "dead", count),
    TableColumn("frozen", "frozen", count),
    TableColumn("dormant", "dormant", count),
    TableColumn("saturated_fraction", "sat", percent),
    TableColumn("mean_abs_activation", "mean|h|", magnitude),
    TableColumn("mean_abs_gradient", "mean|g|", magnitude),
)
_RANKS = (
    TableColumn("effective_rank", "eff.rank", "{:,.1f}".format),
    TableColumn("srank", "srank", count),
    TableColumn("stable_rank", "stable", "{:,.1f}".format),
)


def page_view(
    profile: "Profile", title: str, report: Report, origin: Origin, findings: Sequence[Finding] = ()
) -> PageView:
    """Return what the page of a profile shows.

    Args:
        profile: The profile.
        title: Name of the model.
        report: What the terminal shows of the same profile.
        origin: How the profile came about.
        findings: (severity, text, evidence, action) of what is to be said first.
    """
    values = [layer.to_dict() for layer in profile.layers]
    usual = levels.usual_gradient(values)
    columns = (*_COLUMNS, *(_RANKS if any(row.ranks for row in report.rows) else ()))
    return PageView(
        title=title,
        facts=report.facts,
        names=tuple(row.name for row in report.rows),
        findings=tuple(findings),
        heat=tuple(_heat(row, usual) for row in values),
        scores=tuple(_scores(layer, report.tau) for layer in profile.layers),
        wiring=wiring_view(profile.layers),
        columns=columns,
        rows=tuple(map(_row_maker(columns), values, report.rows)),
        report=report,
        origin=origin,
        circumstances=_circumstances(profile, origin),
    )


def _heat(values: Mapping[str, Any], usual: float) -> tuple[HeatCell, ...]:
    shares = (_share(values, key) for key in ("dead", "frozen", "dormant"))
    return (*shares, _saturated(values["saturated_fraction"]), _gradient(values, usual))


def _share(values: Mapping[str, Any], key: str) -> HeatCell:
    number, units = values[key], values["units"]
    if number is None:
        return HeatCell("-", "not measured", UNKNOWN)
    title = f"{count(number)} of {count(units)} units {key}"
    return HeatCell(percent(number / units), title, levels.share_level(number / units))


def _saturated(share: float | None) -> HeatCell:
    if share is None:
        return HeatCell("-", "not measured", UNKNOWN)
    title = f"flat at {percent(share)} of the positions"
    return HeatCell(percent(share), title, levels.saturated_level(share))


def _gradient(values: Mapping[str, Any], usual: float) -> HeatCell:
    size = values["mean_abs_gradient"]
    if size is None:
        return HeatCell("-", "not measured", UNKNOWN)
    title = f"{magnitude(size)}; median of the layers: {magnitude(usual)}"
    return HeatCell(magnitude(size), title, levels.gradient_level(size, usual))


def _scores(layer: "LayerProfile", tau: float) -> ScoreRow:
    # Of what nothing was seen there is NaN, which is not itself.
    known = [score for score in layer.dormant_score.tolist() if score == score]
    if not known:
        return ScoreRow("", "", None, ())
    low, rest = charts.histogram(known, tau)
    dormant = sum(score <= tau for score in known)
    return ScoreRow(low, rest, dormant, (min(known), median(known), max(known)))


def _row_maker(
    columns: Sequence[TableColumn],
) -> Callable[[Mapping[str, Any], LayerRow], TableRow]:
    def row(values: Mapping[str, Any], shown: LayerRow) -> TableRow:
        found = {**values, **values.get("ranks", {}), "units": values["units"]}
        found |= {"name": shown.name, "weak": shown.weak}
        cells = tuple(_cell(found.get(column.key), column.form) for column in columns)
        return TableRow(cells, bool(shown.dead or shown.frozen or shown.dormant or shown.weak))

    return row


def _cell(value: Any, form: Callable[[Any], str] | None) -> TableCell:
    if form is None:
        return TableCell(str(value), "")
    if value is None:
        return TableCell("-", "")
    return TableCell(form(value), json.dumps(value))


def _circumstances(profile: "Profile", origin: Origin) -> tuple[tuple[str, str], ...]:
    samples = number_of(profile.samples, "sample")
    batches = f"{count(profile.batches)} batch{'es' * (profile.batches != 1)}"
    return (
        *origin.versions,
        ("seed", str(profile.seed)),
        ("data", f"sha256 {origin.digest}" if origin.digest else "not read to the end"),
        ("samples", f"{samples} in {batches}"),
        ("device", f"{profile.device}, statistics by {profile.backend}"),
        ("dtype", profile.dtype),
        ("mode", profile.mode),
        ("model", f"fingerprint {profile.fingerprint} of names, shapes and dtypes"),
    )
