"""Draw a profile with matplotlib: a row for every layer, in the order of the network."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastplastic.cli.overview import stage_of
from fastplastic.cli.plot import require_matplotlib

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# In inches: a row, what stands above and below them, and the most that a picture is high.
_ROW, _AROUND, _MOST = 0.16, 1.3, 60.0
# Of a name; what tells layers apart is its end.
_LETTERS = 34
_BAR = "#0072B2"
_UNKNOWN = "#767676"
_SHARES = {"dead": "dead", "dormant": "dormant", "saturated_fraction": "saturated"}


def draw_profile(
    layers: Sequence[Mapping[str, Any]], title: str, path: Path, *, force: bool
) -> None:
    """Write a picture of the layers of a profile, as its JSON has them.

    Raises:
        InputError: matplotlib is not installed.
        FileError: The file exists or cannot be written.
    """
    require_matplotlib()
    from matplotlib import rc_context

    from fastplastic.files import atomic_write

    # The same profile makes the same file, whose text can be searched.
    same = {"svg.hashsalt": "fastplastic", "svg.fonttype": "none"}
    with rc_context(same), atomic_write(path, force) as temporary:
        form = path.suffix[1:]
        metadata = {"Date": None} if form == "svg" else None
        profile_figure(layers, title).savefig(temporary, format=form, dpi=150, metadata=metadata)


def profile_figure(layers: Sequence[Mapping[str, Any]], title: str) -> "Figure":
    """Return the figure: shares of units, of flat positions, and sizes of gradients."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    height = min(_ROW * len(layers) + _AROUND, _MOST)
    figure = Figure(figsize=(11, height), layout=ConstrainedLayoutEngine(wspace=0.04))
    panels = figure.subplots(1, 4, sharey=True, squeeze=False)[0]
    for axes, (key, name) in zip(panels, _SHARES.items(), strict=False):
        _draw_shares(axes, [_share(layer, key) for layer in layers], name)
    _draw_gradients(panels[3], [layer["mean_abs_gradient"] for layer in layers])
    _name_rows(panels[0], [str(layer["name"]) for layer in layers])
    for axes in panels:
        _shade(axes, [str(layer["name"]) for layer in layers])
    # Names of others are no formulas.
    figure.suptitle(title, fontsize="medium", parse_math=False)
    return figure


def _share(layer: Mapping[str, Any], key: str) -> float | None:
    value: float | None = layer[key]
    return value if value is None or key == "saturated_fraction" else value / layer["units"]


def _draw_shares(axes: "Axes", shares: Sequence[float | None], title: str) -> None:
    known = [(row, 100 * share) for row, share in enumerate(shares) if share is not None]
    axes.barh([row for row, _ in known], [share for _, share in known], height=0.7, color=_BAR)
    _mark_unknown(axes, shares)
    words = "positions" if title == "saturated" else "units"
    axes.set(xlim=(0, 100), xlabel=f"% of {words}")
    axes.set_title(title, fontsize="medium")
    axes.grid(axis="x", alpha=0.4)


def _draw_gradients(axes: "Axes", sizes: Sequence[float | None]) -> None:
    known = [(row, size) for row, size in enumerate(sizes) if size]
    axes.set_xscale("log")
    axes.plot([size for _, size in known], [row for row, _ in known], "o", ms=4, color=_BAR)
    _mark_unknown(axes, sizes)
    _write(axes, [row for row, size in enumerate(sizes) if size == 0], "0")
    axes.set(xlabel="mean|g|, powers of ten")
    axes.set_title("gradient", fontsize="medium")
    axes.grid(axis="x", alpha=0.4)


def _mark_unknown(axes: "Axes", values: Sequence[float | None]) -> None:
    _write(axes, [row for row, value in enumerate(values) if value is None], "not measured")


def _write(axes: "Axes", rows: Sequence[int], text: str) -> None:
    """Write a word at the left end of rows that have nothing to draw."""
    for row in rows:
        axes.text(
            0.02, row, text, transform=axes.get_yaxis_transform(), va="center",
            fontsize=6, color=_UNKNOWN,
        )  # fmt: skip


def _name_rows(axes: "Axes", names: Sequence[str]) -> None:
    # Panels share their rows: the first layer stands at the top of all.
    axes.set_ylim(len(names) - 0.4, -0.6)
    # Where rows are too low for a name each, every second one, or fewer, has one.
    step = ceil(len(names) * _ROW / (_MOST - _AROUND))
    rows = range(0, len(names), step)
    labels = [_shortened(names[row]) for row in rows]
    axes.set_yticks(rows, labels, fontsize=7, parse_math=False)


def _shortened(name: str) -> str:
    return name if len(name) <= _LETTERS else "..." + name[3 - _LETTERS :]


def _shade(axes: "Axes", names: Sequence[str]) -> None:
    """Put every second stage on a darker ground."""
    for first, last in list(_stages(names))[1::2]:
        axes.axhspan(first - 0.5, last + 0.5, color="black", alpha=0.05, linewidth=0, zorder=0)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _stages(names: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Yield the first and the last row of every stage."""
    for _, rows in groupby(range(len(names)), lambda row: stage_of(names[row])):
        own = list(rows)
        yield own[0], own[-1]
