"""What changed between profiles: plain values, which are the schema of the JSON too."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fastplastic import __version__
from fastplastic.comparison.metrics import METRICS, SHARES
from fastplastic.errors import InputError, no_such
from fastplastic.files import SCHEMA_VERSION
from fastplastic.notebook import html_table

# Layers that a notebook shows.
_SHOWN = 20


@dataclass(frozen=True)
class ComparedProfile:
    """Where the figures of one profile are from.

    Attributes:
        label: A for the first profile, B for the second, and so on.
        name: Name of the file, None without one.
        model: Name of the model, None where it is not known, as that of `weights` and `data`.
        weights: Where the weights are from.
        data: Name of the data.
        device: Device of the model.
        dtype: Type of its parameters.
        mode: "train", "eval" or "mixed".
        samples: Number of samples.
        seed: Seed of the random numbers.
        layers: Number of weight layers.
        fastplastic_version: Version of the program that measured it.
    """

    label: str
    name: str | None
    model: str | None
    weights: str | None
    data: str | None
    device: str
    dtype: str
    mode: str
    samples: int
    seed: int
    layers: int
    fastplastic_version: str


@dataclass(frozen=True)
class FigureChange:
    """One figure in every profile.

    Attributes:
        values: The figure, in the order of the profiles; None where it is unknown.
        change: The last minus the first; None where one of them is unknown.
    """

    values: tuple[float | None, ...]
    change: float | None


@dataclass(frozen=True)
class TotalChange:
    """The figures of whole models, or of one layer, over the units that they are known of.

    Attributes:
        units: Number of units in each profile.
        dead: Share of units whose activation is constant.
        frozen: Share of units whose activation function is flat at every position.
        dormant: Share of units whose ReDo score is at most that of its default setting.
        saturated: Share of positions where the activation function is flat, mean over units.
        mean_abs_activation: Mean abs(h) over units.
        mean_abs_gradient: Mean abs(g) over units.
    """

    units: tuple[int, ...]
    dead: FigureChange
    frozen: FigureChange
    dormant: FigureChange
    saturated: FigureChange
    mean_abs_activation: FigureChange
    mean_abs_gradient: FigureChange


@dataclass(frozen=True)
class LayerChange(TotalChange):
    """The figures of a layer that all profiles have.

    Attributes:
        name: Its name.
    """

    name: str

    @property
    def size(self) -> tuple[float, float]:
        """How much changed: the largest change of a share, then the largest spread of one."""
        figures: list[FigureChange] = [getattr(self, metric) for metric in SHARES]
        changes = [abs(figure.change or 0.0) for figure in figures]
        known = [[x for x in figure.values if x is not None] or [0.0] for figure in figures]
        return max(changes), max(max(values) - min(values) for values in known)

    def to_dict(self) -> dict[str, Any]:
        """Return the layer's part of the JSON."""
        return {"name": self.name} | asdict(self)


@dataclass(frozen=True)
class UnmatchedLayer:
    """A layer that not all profiles have.

    Attributes:
        name: Its name.
        only_in: Labels of the profiles that have it.
    """

    name: str
    only_in: tuple[str, ...]


@dataclass(frozen=True, repr=False)
class ProfileComparison:
    """Profiles side by side; `comparison[name]` is what changed in one layer.

    Attributes:
        profiles: Where they are from.
        notes: Why the figures may differ though the weights do not.
        totals: The figures of each model as a whole, all of its own layers.
        layers: The layers that all profiles have, in the order of the first.
        unmatched: The other layers.
    """

    profiles: tuple[ComparedProfile, ...]
    notes: tuple[str, ...]
    totals: TotalChange
    layers: tuple[LayerChange, ...]
    unmatched: tuple[UnmatchedLayer, ...]

    def __repr__(self) -> str:
        return (
            f"ProfileComparison({len(self.profiles)} profiles, {len(self.layers)} layers in all, "
            f"{len(self.unmatched)} in some; change of dead {self.totals.dead.change}, "
            f"dormant {self.totals.dormant.change})"
        )

    def _repr_html_(self) -> str:
        """Return a table for notebooks: of many layers those that changed most."""
        first = self.most_changed()[:_SHOWN]
        titles = ("layer", "units", *METRICS)
        rows = [_cells("in all", self.totals), *(_cells(layer.name, layer) for layer in first)]
        left_out = len(self.layers) - len(first)
        more = [f"{left_out} layers not shown: none changed more"] * (left_out > 0)
        return html_table(repr(self), titles, rows, (*more, *self.notes))

    def __iter__(self) -> Iterator[LayerChange]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, name: str) -> LayerChange:
        """Return the layer with this name; InputError when not all profiles have it."""
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise InputError(no_such("layer", name, [layer.name for layer in self.layers]))

    def most_changed(self) -> tuple[LayerChange, ...]:
        """Return the layers, first those with the largest change of a share."""
        # Sorting leaves layers that changed alike in the order of the model.
        return tuple(sorted(self.layers, key=lambda layer: layer.size, reverse=True))

    def to_dict(self) -> dict[str, Any]:
        """Return the comparison as plain values (schema version 1); unknown numbers are None."""
        return {
            "schema_version": SCHEMA_VERSION,
            "fastplastic_version": __version__,
            "profiles": [asdict(profile) for profile in self.profiles],
            "notes": list(self.notes),
            "totals": asdict(self.totals),
            "layers": [layer.to_dict() for layer in self.layers],
            "unmatched": [asdict(layer) for layer in self.unmatched],
        }


def _cells(name: str, own: TotalChange) -> list[str]:
    """Return a row for notebooks: each figure over the profiles."""
    figures: list[FigureChange] = [getattr(own, metric) for metric in METRICS]
    courses = [
        [None if value is None else f"{value:.3g}" for value in figure.values] for figure in figures
    ]
    units = _course([f"{number:,}" for number in own.units])
    return [name, units, *map(_course, courses)]


def _course(texts: Sequence[str | None]) -> str:
    """Return what stood in each profile; once where it was the same in all."""
    shown = [text or "-" for text in texts]
    return " → ".join(shown) if len(set(shown)) > 1 else shown[0]
