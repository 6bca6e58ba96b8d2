"""From a comparison to what a person reads: pure functions that return rich renderables."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from fastplastic.cli.gates import said
from fastplastic.cli.render import count, facts, magnitude, number_of, percent, stacked
from fastplastic.comparison import (
    MEANS,
    SHARES,
    ComparedProfile,
    FigureChange,
    GateResult,
    LayerChange,
    ProfileComparison,
    TotalChange,
)

# Longer layer names are folded rather than pushing other columns out; a column needs this between.
_FOLD, _GAP = 32, 3
# Half of the last digit shown: what changed less looks the same.
VISIBLE = 0.0005
_NAMES = 8
SHORT = {"saturated": "sat", "mean_abs_activation": "mean|h|", "mean_abs_gradient": "mean|g|"}
_LEGEND = (
    "Shares of units, of those that were measured; totals are over all layers of a profile. "
    "change: {last} minus {first}, for shares in percentage points. dead: never changes. frozen: "
    "its activation function is flat at every position. dormant: mean|h| at most a small part of "
    "the layer's mean (ReDo). sat: share of positions where the activation function is flat. "
    "h: activation, g: its gradient. Columns that have no room are left out: --json has all."
)


@dataclass(frozen=True)
class Line:
    """A line of a table: what it is about, the figure in every profile, the change.

    Attributes:
        grew: More or fewer units are weak: 1, -1, or 0 where it says nothing.
    """

    about: str
    units: str
    figure: str
    values: tuple[str, ...]
    change: str
    grew: int = 0


def comparison(
    found: ProfileComparison, results: Sequence[GateResult], *, width: int, top: int | None
) -> RenderableType:
    """Return the whole report of `fastplastic compare`; of all layers where `top` is None."""
    shown = _layers_to_show(found, top)
    lines = [line for layer in shown for line in _layer_lines(layer)]
    labels = [profile.label for profile in found.profiles]
    header = [(own.label, _source(own)) for own in found.profiles]
    header += [("note", note) for note in found.notes]
    parts: list[RenderableType] = [facts(header)]
    parts.append(_table("in all", list(total_lines(found)), labels, width))
    parts += [_table("layer", lines, labels, width)] if lines else []
    rest = [*_remarks(found, shown), *unmatched(found, every=top is None), *said(results)]
    parts += [facts(rest)] if rest else []
    parts.append(Text(_LEGEND.format(first=labels[0], last=labels[-1]), style="dim"))
    return stacked(*parts)


def _source(own: ComparedProfile) -> str:
    samples = f"{number_of(own.samples, 'sample')}, seed {own.seed}"
    where = f"{own.mode}, {own.dtype} on {own.device}"
    parts = (
        own.model or "a model without a name",
        f"weights {own.weights or 'not named'}",
        f"data {own.data or 'not named'}",
        samples,
        where,
    )
    return f"{own.name}: {'; '.join(parts)}" if own.name else "; ".join(parts)


def _layers_to_show(found: ProfileComparison, top: int | None) -> Sequence[LayerChange]:
    ordered = found.most_changed()
    if top is None:
        return ordered
    return [layer for layer in ordered[:top] if max(layer.size) >= VISIBLE]


def _layer_lines(layer: LayerChange) -> Iterator[Line]:
    """Yield a line for each share that changed, or one that says that none did."""
    about, units = layer.name, "/".join(map(count, dict.fromkeys(layer.units)))
    for metric in SHARES:
        figure: FigureChange = getattr(layer, metric)
        if _differs(figure):
            yield _line(about, units, metric, figure)
            # Its name stands in the first line of a layer only.
            about = units = ""
    if about:
        yield Line(about, units, "none", ("",) * len(layer.units), "")


def _differs(figure: FigureChange) -> bool:
    known = [value for value in figure.values if value is not None]
    if 0 < len(known) < len(figure.values):
        return True
    return bool(known) and max(known) - min(known) >= VISIBLE


def total_lines(found: ProfileComparison) -> Iterator[Line]:
    """Yield a line for each figure of the models as a whole."""
    totals = found.totals
    numbers = {"layers": [own.layers for own in found.profiles], "units": totals.units}
    for name, values in numbers.items():
        change = values[-1] - values[0]
        yield Line(name, "", "", tuple(map(count, values)), f"{change:+,}" if change else "0")
    for metric in (*SHARES, *MEANS):
        yield _line(SHORT.get(metric, metric), "", metric, _figure(totals, metric))


def _figure(own: TotalChange, metric: str) -> FigureChange:
    figure: FigureChange = getattr(own, metric)
    return figure


def _line(about: str, units: str, metric: str, figure: FigureChange) -> Line:
    share = metric in SHARES
    shown: Callable[[float | None], str] = percent if share else magnitude
    change = points(figure.change) if share else signed(figure.change)
    # Saturation alone is normal in ReLU networks.
    grew = (figure.change or 0.0) if metric in SHARES and metric != "saturated" else 0.0
    values = tuple(map(shown, figure.values))
    return Line(about, units, SHORT.get(metric, metric), values, change, (grew > 0) - (grew < 0))


def points(change: float | None) -> str:
    """Format a difference of shares in percentage points: +1.2, and +<0.1 for hardly any."""
    if change is None:
        return "-"
    if 0 < abs(change) < VISIBLE:
        return "+<0.1" if change > 0 else "-<0.1"
    return f"{100 * change:+.1f}" if change else "0.0"


def signed(change: float | None) -> str:
    """Format a difference of means, with its sign."""
    return "-" if change is None else f"{change:+.3g}" if change else "0"


def _table(title: str, lines: Sequence[Line], labels: Sequence[str], width: int) -> Table:
    layers = title == "layer"
    columns: dict[str, Callable[[Line], str]] = {title: lambda line: line.about}
    if layers:
        columns |= {"units": lambda line: line.units, "share": lambda line: line.figure}
    for place, label in enumerate(labels):
        columns[label] = _value_at(place)
    columns["change"] = lambda line: line.change
    # The profiles between the first and the last make room, the earliest first.
    _make_room(columns, lines, ["units", *labels[1:-1]], width)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for name in columns:
        left = name in (title, "share")
        table.add_column(
            name, justify="left" if left else "right", no_wrap=name != title, overflow="fold"
        )
    for line in lines:
        style = {1: "yellow", -1: "green", 0: ""}[line.grew]
        table.add_row(*(Text(cell(line)) for cell in columns.values()), style=style)
    return table


def _value_at(place: int) -> Callable[[Line], str]:
    return lambda line: line.values[place]


def _make_room(
    columns: dict[str, Callable[[Line], str]],
    lines: Sequence[Line],
    droppable: Sequence[str],
    width: int,
) -> None:
    """Take out columns, in this order, until the others fit; long layer names are folded."""
    sizes = {
        name: max([len(name), *(len(cell(line)) for line in lines)])
        for name, cell in columns.items()
    }
    first = next(iter(columns))
    sizes[first] = min(sizes[first], _FOLD)
    for name in droppable:
        if sum(sizes[kept] + _GAP for kept in columns) - _GAP <= width:
            return
        columns.pop(name, None)


def _remarks(found: ProfileComparison, shown: Sequence[LayerChange]) -> list[tuple[str, str]]:
    left = [layer for layer in found.layers if layer not in shown]
    changed = sum(max(layer.size) >= VISIBLE for layer in left)
    parts = []
    if changed:
        parts.append(f"{number_of(changed, 'layer')} more changed, --layers shows all")
    if len(left) > changed:
        same = number_of(len(left) - changed, "layer")
        parts.append(f"{same} changed by less than 0.05 points")
    return [("not shown", "; ".join(parts))] if parts else []


def unmatched(found: ProfileComparison, *, every: bool) -> list[tuple[str, str]]:
    """Return which layers are only in some profiles."""
    groups: dict[str, list[str]] = {}
    for layer in found.unmatched:
        groups.setdefault(" and ".join(layer.only_in), []).append(layer.name)
    return [(f"only in {labels}", _some(names, every)) for labels, names in groups.items()]


def _some(names: Sequence[str], every: bool) -> str:
    more = 0 if every else len(names) - _NAMES
    if more <= 0:
        return ", ".join(names)
    return f"{', '.join(names[:_NAMES])} and {more} more"
