"""From values to what a person reads: pure functions that return rich renderables."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import starmap
from typing import TYPE_CHECKING

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from fastplastic.measure import Finding

# Above this many layers the table shows only those with something to tell, at most this many.
LONG_TABLE = 100
_ROWS_OF_A_LONG_TABLE = 40
_WORST = 4
# Longer layer names are folded rather than pushing other columns out.
_FOLD = 32
_LEGEND = (
    "unit: one output channel of a layer. reset: units that can be re-initialised. "
    "dead: never changes. frozen: its activation function is flat at every position. "
    "dormant: mean|h| at most {tau:g} of the layer's mean (ReDo). "
    "sat: share of positions where the activation function is flat "
    "(about half is normal for ReLU); saturated: at {saturated:.0%} of them or more. "
    "weak: dead, frozen or dormant. h: activation, g: its gradient."
)
_RANK_LEGEND = (
    "s: singular values of h [positions, units] on up to {rows:,} positions drawn at random. "
    "eff.rank: exp(-sum p ln p) with p = s / sum s. srank: how many of the largest s make 99% of "
    "sum s. stable: sum s^2 / max s^2. All are at most the smaller of positions and units."
)


@dataclass(frozen=True)
class LayerRow:
    """One layer of a profile: counts of units and floats, None where nothing is known.

    Attributes:
        saturated: Units whose activation function is flat at nearly all positions.
        weak: Hidden units that are dead, frozen or dormant, in this layer or in the rows of others
            that belong to them.
        fixed: No unit of the layer can be re-initialised, not even together with another layer's.
        nonfinite: Units that met NaN or infinity.
        ranks: The numbers of `diagnostics.Ranks`, where they were measured.
    """

    name: str
    kind: str
    activation: str
    units: int
    hidden: int
    dead: int | None
    frozen: int | None
    dormant: int | None
    saturated: int
    saturated_fraction: float | None
    mean_abs_activation: float | None
    mean_abs_gradient: float | None
    weak: int = 0
    fixed: bool = False
    nonfinite: int = 0
    ranks: Mapping[str, float] | None = None


@dataclass(frozen=True)
class Report:
    """What `fastplastic profile` shows.

    Attributes:
        facts: (label, value) pairs of the header.
        rows: The layers in execution order.
        tau: Score from which down a unit is dormant.
        saturated: Share of flat positions from which on a unit is saturated.
        found: Number of weight layers in the model.
        skipped: (layer name, reason) of those without numbers.
        fixed: (reason, units, layers) of units that cannot be re-initialised by themselves.
        notes: Remarks of the profile.
        rank_rows: The largest number of positions that ranks are from; 0 where there are none.
        findings: What stands out, the worst first.
    """

    facts: tuple[tuple[str, str], ...]
    rows: tuple[LayerRow, ...]
    tau: float
    saturated: float
    found: int
    skipped: tuple[tuple[str, str], ...]
    fixed: tuple[tuple[str, int, int], ...]
    notes: tuple[str, ...] = ()
    rank_rows: int = 0
    findings: tuple["Finding", ...] = ()


def count(number: int) -> str:
    """Format a count: 26,560."""
    return f"{number:,}"


def percent(share: float | None) -> str:
    """Format a share: 0.8 %, and <0.1 % for what is not quite nothing."""
    if share is None or math.isnan(share):
        return "-"
    return "<0.1 %" if 0 < share < 0.001 else f"{100 * share:.1f} %"


def magnitude(value: float | None) -> str:
    """Format a positive number of any size in at most 8 characters."""
    return "-" if value is None or math.isnan(value) else f"{value:.3g}"


def number_of(amount: int, noun: str) -> str:
    """Format a count with its noun: 1 layer, 3 layers."""
    return f"{count(amount)} {noun}{'' if amount == 1 else 's'}"


def facts(pairs: Iterable[tuple[str, str]]) -> Table:
    """Return labels and values in two columns."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for label, value in pairs:
        table.add_row(Text(label), Text(value))
    return table


@dataclass(frozen=True)
class _Column:
    title: str
    cell: Callable[[LayerRow], str]
    number: bool = True
    # Columns that do not fit are left out in this order; 0 stays.
    drop: int = 0


_COLUMNS = (
    _Column("layer", lambda row: row.name, number=False),
    _Column("kind", lambda row: row.kind, number=False, drop=1),
    _Column("act", lambda row: row.activation, number=False, drop=4),
    _Column("units", lambda row: count(row.units)),
    _Column("reset", lambda row: count(row.hidden), drop=6),
    _Column("dead", lambda row: _few(row.dead)),
    _Column("frozen", lambda row: _few(row.frozen), drop=5),
    _Column("dormant", lambda row: _few(row.dormant)),
    _Column("sat", lambda row: percent(row.saturated_fraction)),
    _Column("mean|h|", lambda row: magnitude(row.mean_abs_activation), drop=3),
    _Column("mean|g|", lambda row: magnitude(row.mean_abs_gradient), drop=2),
)
# Asked for by name, so that all other columns that can go make room first.
_RANK_COLUMNS = (
    _Column("eff.rank", lambda row: _rank(row, "effective_rank", ",.1f"), drop=9),
    _Column("srank", lambda row: _rank(row, "srank", ",d"), drop=8),
    _Column("stable", lambda row: _rank(row, "stable_rank", ",.1f"), drop=7),
)


def _few(number: int | None) -> str:
    # Nothing is shown as nothing: the eye finds the layers that have some.
    return "-" if number is None else count(number) if number else "."


def _rank(row: LayerRow, name: str, form: str) -> str:
    return "-" if row.ranks is None else format(row.ranks[name], form)


def _columns_that_fit(rows: Sequence[LayerRow], width: int) -> list[_Column]:
    """Leave out the least important columns until the table fits, long layer names folded."""
    kept = [*_COLUMNS, *(_RANK_COLUMNS if any(row.ranks for row in rows) else ())]

    def needed(column: _Column) -> int:
        widest = max([len(column.title), *(len(column.cell(row)) for row in rows)])
        # A column has a space on both sides, and one between it and the next.
        return (min(widest, _FOLD) if column is _COLUMNS[0] else widest) + 3

    while sum(map(needed, kept)) > width and any(column.drop for column in kept):
        kept.remove(min((column for column in kept if column.drop), key=lambda column: column.drop))
    return kept


def layer_table(rows: Sequence[LayerRow], width: int) -> Table:
    """Return one line per layer, with as many columns as fit into `width` characters."""
    columns = _columns_that_fit(rows, width)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in columns:
        table.add_column(
            column.title,
            justify="right" if column.number else "left",
            no_wrap=column.number,
            overflow="fold",
        )
    for row in rows:
        style = "yellow" if row.dead or row.frozen or row.dormant else ""
        table.add_row(*(Text(column.cell(row)) for column in columns), style=style)
    return table


def _weakness(row: LayerRow) -> float:
    return max(row.dead or 0, row.frozen or 0, row.dormant or 0) / row.units


def rows_to_show(rows: Sequence[LayerRow]) -> Sequence[LayerRow]:
    """Of a long table keep the layers with the largest share of weak units, in their order."""
    if len(rows) <= LONG_TABLE:
        return rows
    telling = [row for row in rows if row.dead or row.frozen or row.dormant or row.nonfinite]
    worst = sorted(telling, key=_weakness, reverse=True)
    kept = {id(row) for row in worst[:_ROWS_OF_A_LONG_TABLE]}
    return [row for row in rows if id(row) in kept]


def _where(rows: Sequence[LayerRow], number: Callable[[LayerRow], int | None]) -> str:
    """Say how many units there are of a sort, and which layers have the largest share of them."""

    def of(row: LayerRow) -> int:
        return number(row) or 0

    total, units = sum(map(of, rows)), sum(row.units for row in rows)
    # First those where something can be done about it.
    touched = [row for row in rows if of(row)]
    touched.sort(key=lambda row: (row.fixed, -of(row) / row.units))
    if not touched:
        return "none"
    worst = ", ".join(
        f"{row.name} {count(of(row))} of {count(row.units)} ({percent(of(row) / row.units)})"
        for row in touched[:_WORST]
    )
    layers = number_of(len(touched), "layer")
    found = f"{count(total)} of {count(units)} units ({percent(total / units)}) in {layers}"
    order = ", resettable ones first" if not all(row.fixed for row in touched) else ""
    return f"{found}{order}: {worst}"


def _resettable(rows: Sequence[LayerRow]) -> str:
    hidden, units = sum(row.hidden for row in rows), sum(row.units for row in rows)
    weak = sum(row.weak for row in rows)
    share = percent(hidden / units)
    return f"{count(hidden)} of {count(units)} units ({share}); {count(weak)} of them are weak"


def _coverage(report: Report) -> str:
    # There are rows, too, of layers without figures of activations.
    measured = report.found - len(report.skipped)
    text = f"{measured} of {number_of(report.found, 'weight layer')} measured"
    return "; ".join([text, *starmap("{} skipped: {}".format, report.skipped)])


def _fixed(report: Report) -> str:
    return "; ".join(
        f"{number_of(units, 'unit')} in {number_of(layers, 'layer')}: {reason}"
        for reason, units, layers in report.fixed
    )


def summary(report: Report, *, where: bool = True) -> Table:
    """Return where the dead, dormant and saturated units are, and what can be re-initialised.

    Args:
        report: The report.
        where: Whether the layers with the largest shares are named.
    """
    rows = report.rows
    worst = [
        ("dead", _where(rows, lambda row: row.dead)),
        ("frozen", _where(rows, lambda row: row.frozen)),
        ("dormant", _where(rows, lambda row: row.dormant)),
        ("saturated", _where(rows, lambda row: row.saturated)),
        ("not finite", _where(rows, lambda row: row.nonfinite)),
    ]
    pairs = [
        *(worst if where else []),
        ("resettable", _resettable(rows)),
        ("not reset", _fixed(report)),
        ("coverage", _coverage(report)),
        *(("note", note) for note in report.notes),
    ]
    absent = {"not finite": "none", "not reset": ""}
    return facts(pair for pair in pairs if absent.get(pair[0]) != pair[1])


def stacked(*parts: RenderableType) -> Group:
    """Return the parts with an empty line between them."""
    spaced = [line for part in parts for line in (Text(), part)]
    return Group(*spaced[1:])


def legend(report: Report) -> Text:
    """Return what the words of a report mean."""
    words = [_LEGEND.format(tau=report.tau, saturated=report.saturated)]
    words += [_RANK_LEGEND.format(rows=report.rank_rows)] if report.rank_rows else []
    return Text("\n".join(words), style="dim")


@dataclass(frozen=True)
class PlanRow:
    """One layer of a plan; scores are those of the chosen units."""

    name: str
    units: int
    hidden: int
    chosen: int
    lowest: float
    highest: float


@dataclass(frozen=True)
class MaskRow:
    """One parameter of a plan of single weights."""

    name: str
    weights: int
    chosen: int


@dataclass(frozen=True)
class PlanView:
    """What `fastplastic plan` and `fastplastic reinit` show."""

    facts: tuple[tuple[str, str], ...]
    rows: tuple[PlanRow, ...] = ()
    masks: tuple[MaskRow, ...] = ()
    notes: tuple[str, ...] = ()


def table_of(titles: Sequence[str], cells: Iterable[Sequence[str]]) -> Table:
    """Return a table whose first column is text and whose others are numbers."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for index, title in enumerate(titles):
        table.add_column(title, justify="right" if index else "left", overflow="fold")
    for row in cells:
        table.add_row(*map(Text, row))
    return table


def plan(view: PlanView) -> RenderableType:
    """Return which units of which layers, or which weights of which tensors, a plan takes."""
    parts: list[RenderableType] = [facts(view.facts)]
    parts += [_unit_table(view.rows)] if view.rows else []
    parts += [_mask_table(view.masks)] if view.masks else []
    parts += [facts(("note", note) for note in view.notes)] if view.notes else []
    return stacked(*parts)


def _unit_table(rows: Sequence[PlanRow]) -> Table:
    return table_of(
        ("layer", "units", "resettable", "chosen", "share", "scores"),
        (
            (
                row.name,
                count(row.units),
                count(row.hidden),
                count(row.chosen),
                percent(row.chosen / row.units),
                f"{magnitude(row.lowest)} to {magnitude(row.highest)}",
            )
            for row in rows
        ),
    )


def _mask_table(rows: Sequence[MaskRow]) -> Table:
    return table_of(
        ("tensor", "weights", "chosen", "share"),
        (
            (row.name, count(row.weights), count(row.chosen), percent(row.chosen / row.weights))
            for row in rows
        ),
    )


def criteria(rows: Iterable[Sequence[str]]) -> RenderableType:
    """Return the criteria: of what, name, candidates, threshold, formula, source, record."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("of")
    table.add_column("criterion", no_wrap=True)
    table.add_column("candidates")
    table.add_column("threshold", justify="right")
    table.add_column("formula", overflow="fold")
    table.add_column("source", overflow="fold")
    table.add_column("beats random", justify="right")
    for row in rows:
        table.add_row(*map(Text, row))
    words = (
        "h: activation, f: activation function, g: gradient to h, w_in and w_out: weights that "
        "make and read the unit, dw: gradient to a weight. flat: abs(f'(z)) <= 0.01. Means are "
        "over samples and positions. candidates: the scores that are re-initialised first. "
        "A threshold of weights is a multiple of the mean score of their tensor. beats random: on "
        "how many of the networks that benchmarks/transfer screens the accuracy after fine-tuning "
        "was above that of as many at random (p < 0.05)."
    )
    return stacked(table, Text(words, style="dim"))
