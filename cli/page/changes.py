"""From a comparison to the values that its page shows: no HTML here, no numbers in the page."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

from fastplastic.cli import compare_view
from fastplastic.cli.compare_view import Line, points, signed, total_lines
from fastplastic.cli.gates import said
from fastplastic.cli.page.origin import Origin
from fastplastic.cli.page.tracks import Decades, Track, track
from fastplastic.cli.page.view import TableCell, TableColumn, TableRow
from fastplastic.cli.render import count, magnitude, percent
from fastplastic.comparison import (
    MEANS,
    SHARES,
    ComparedProfile,
    FigureChange,
    GateResult,
    LayerChange,
    ProfileComparison,
)

# What is drawn: where a mean activation stands says little.
DRAWN = (*SHARES, "mean_abs_gradient")


@dataclass(frozen=True)
class Circumstance:
    """Something that a profile was made under, in every profile.

    Attributes:
        label: What it is.
        values: What it was, in the order of the profiles.
        differs: Whether it was not the same in all.
    """

    label: str
    values: tuple[str, ...]
    differs: bool


@dataclass(frozen=True)
class ChangesView:
    """All that stands in the page of a comparison.

    Attributes:
        title: The models that are compared.
        labels: A for the first profile, B for the second, and so on.
        circumstances: What each was made under.
        notes: Why the figures may differ though the weights do not.
        verdicts: (label, text) of the conditions of --fail-if.
        totals: The figures of the models as a whole.
        titles: Titles of the tracks, with the ends of their scales.
        names: Names of the layers that all profiles have, in the order of the first.
        tracks: The tracks of each of these layers, under the titles.
        columns: Columns of the table.
        rows: Rows of the table, of the same layers.
        unmatched: (in which profiles, names) of the other layers.
        command: What was typed.
        versions: Versions of the program and of Python.
    """

    title: str
    labels: tuple[str, ...]
    circumstances: tuple[Circumstance, ...]
    notes: tuple[str, ...]
    verdicts: tuple[tuple[str, str], ...]
    totals: tuple[Line, ...]
    titles: tuple[tuple[str, str, str], ...]
    names: tuple[str, ...]
    tracks: tuple[tuple[Track, ...], ...]
    columns: tuple[TableColumn, ...]
    rows: tuple[TableRow, ...]
    unmatched: tuple[tuple[str, str], ...]
    command: str
    versions: tuple[tuple[str, str], ...]


def changes_view(
    found: ProfileComparison, results: Sequence[GateResult], origin: Origin
) -> ChangesView:
    """Return what the page of a comparison shows.

    Args:
        found: The comparison.
        results: What became of the conditions of --fail-if.
        origin: How the comparison came about.
    """
    gradients = Decades.of(x for layer in found for x in layer.mean_abs_gradient.values)
    return ChangesView(
        title=" and ".join(dict.fromkeys(own.model or "unnamed" for own in found.profiles)),
        labels=tuple(own.label for own in found.profiles),
        circumstances=tuple(_circumstances(found.profiles)),
        notes=found.notes,
        verdicts=tuple(said(results)),
        totals=tuple(total_lines(found)),
        titles=tuple(_titles(gradients)),
        names=tuple(layer.name for layer in found),
        tracks=tuple(tuple(_tracks(layer, gradients)) for layer in found),
        columns=tuple(_columns()),
        rows=tuple(map(_row, found)),
        unmatched=tuple(compare_view.unmatched(found, every=True)),
        command=origin.command,
        # The libraries between them measured nothing here.
        versions=(origin.versions[0], origin.versions[-1]),
    )


def _circumstances(profiles: Sequence[ComparedProfile]) -> Iterator[Circumstance]:
    """Yield what is known of each profile; the names of files are expected to differ."""
    rows = [asdict(own) for own in profiles]
    for key in rows[0]:
        values = tuple("not named" if row[key] is None else str(row[key]) for row in rows)
        if key != "label" and any(row[key] is not None for row in rows):
            differs = key != "name" and len(set(values)) > 1
            label = "file" if key == "name" else key.replace("_", " ")
            yield Circumstance(label, values, differs)


def _short(metric: str) -> str:
    return compare_view.SHORT.get(metric, metric)


def _titles(gradients: Decades) -> Iterator[tuple[str, str, str]]:
    for metric in DRAWN:
        ends = ("0", "100 %") if metric in SHARES else (f"1e{gradients.low}", f"1e{gradients.high}")
        yield _short(metric), *ends


def _figure(layer: LayerChange, metric: str) -> FigureChange:
    figure: FigureChange = getattr(layer, metric)
    return figure


def _tracks(layer: LayerChange, gradients: Decades) -> Iterator[Track]:
    for metric in DRAWN:
        values = _figure(layer, metric).values
        places = values if metric in SHARES else [x and gradients.place(x) for x in values]
        yield track(places, f"{_short(metric)}: {_course(metric, values)}")


def _course(metric: str, values: Sequence[float | None]) -> str:
    """Return a figure over the profiles: once where it is the same in all as it is printed."""
    form: Callable[[float | None], str] = percent if metric in SHARES else magnitude
    texts = tuple(map(form, values))
    return texts[0] if len(set(texts)) == 1 else " → ".join(texts)


def _columns() -> Iterator[TableColumn]:
    yield TableColumn("name", "layer")
    yield TableColumn("units", "units", count)
    yield TableColumn("most", "largest", points)
    for metric in (*SHARES, *MEANS):
        yield TableColumn(metric, _short(metric), points if metric in SHARES else signed)


def _row(layer: LayerChange) -> TableRow:
    units = " → ".join(map(count, dict.fromkeys(layer.units)))
    most = layer.size[0]
    cells = [
        TableCell(layer.name, ""),
        TableCell(units, json.dumps(layer.units[-1])),
        TableCell(points(most).lstrip("+"), json.dumps(most)),
    ]
    for metric in (*SHARES, *MEANS):
        figure = _figure(layer, metric)
        form = points if metric in SHARES else signed
        value = "" if figure.change is None else json.dumps(figure.change)
        cells.append(TableCell(form(figure.change), value, _course(metric, figure.values)))
    return TableRow(tuple(cells), max(layer.size) >= compare_view.VISIBLE)
