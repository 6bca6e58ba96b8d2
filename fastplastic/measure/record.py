"""What was measured of a model: a record of each layer, and the profile of them all."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastplastic import __version__
from fastplastic.criteria import CRITERIA, ScoredLayer
from fastplastic.errors import InputError, no_such
from fastplastic.files import SCHEMA_VERSION, StoredProfile, read_profile, write_profile
from fastplastic.measure.table import flat_rows
from fastplastic.model import Weights
from fastplastic.notebook import html_table
from fastplastic.stats import LayerStats, UnitStats, columns_of
from fastplastic.wiring import Consumer, UnitLayer

if TYPE_CHECKING:
    import pandas

    from fastplastic.diagnostics import Ranks

# Of a notebook: more layers than this push all else out of sight.
_SHOWN = 30


@dataclass(frozen=True, eq=False, repr=False)
class LayerProfile:
    """What was measured of one weight layer. Tensors are on the CPU, one entry per unit.

    Attributes:
        wiring: What makes the units and what reads them.
        stats: The sums behind all numbers here.
        ranks: Ranks of a sample of the activations; None if not asked for, or nothing finite seen.
    """

    wiring: UnitLayer
    stats: LayerStats
    ranks: "Ranks | None" = None

    def __repr__(self) -> str:
        row = self.to_dict()
        keys = [key for key in ("hidden", "dead", "frozen", "dormant") if row[key] is not None]
        counts = ", ".join(f"{row[key]} {key}" for key in keys)
        return (
            f"LayerProfile({self.name!r}: {self.kind}, {self.activation}, "
            f"{self.n_units} units, {counts})"
        )

    @property
    def name(self) -> str:
        """Dotted module name of the producer."""
        return self.wiring.name

    @property
    def kind(self) -> str:
        """One of linear, conv, depthwise conv, conv transpose, conv1d (Hugging Face)."""
        return self.wiring.kind

    @property
    def n_units(self) -> int:
        """Number of units."""
        return self.wiring.n_units

    @property
    def activation(self) -> str:
        """Name of the activation function, "unknown" where `wiring.unknown` says why."""
        return self.wiring.activation

    @property
    def hidden(self) -> Tensor:
        """Bool: units that reach the network through their consumers' columns only."""
        return self.wiring.hidden

    @property
    def consumers(self) -> tuple[Consumer, ...]:
        """The layers that read the units."""
        return self.wiring.consumers

    @property
    def reason(self) -> str | None:
        """Why units are not hidden, with their number; None when all are."""
        reasons = self.wiring.reasons.items()
        return "; ".join(f"{reason} ({number})" for reason, number in reasons) or None

    @property
    def measured(self) -> Tensor:
        """Bool: units of whose activations anything finite was seen; others have no figures."""
        return self.stats["n"] > 0

    @property
    def dead(self) -> Tensor:
        """Bool: h is constant over every position seen (more than one)."""
        return self.stats.range_h == 0

    @property
    def frozen(self) -> Tensor:
        """Bool: abs(f'(z)) <= 0.01 at every position seen."""
        return (self.stats["n_flat"] == self.stats["n"]) & (self.stats["n"] > 0)

    @property
    def saturated_fraction(self) -> Tensor:
        """float64: share of positions with abs(f'(z)) <= 0.01; NaN where nothing was seen."""
        return self.stats.flat_share

    @property
    def dormant_score(self) -> Tensor:
        """float64: mean abs(h) / (its mean over the layer + 1e-9) (ReDo, arXiv 2302.12902)."""
        return CRITERIA["dormant"].score(self.stats)

    @property
    def dormant(self) -> Tensor:
        """Bool: `dormant_score` is at most the 0.025 of ReDo's default setting."""
        threshold = CRITERIA["dormant"].threshold
        assert threshold is not None
        return self.dormant_score <= threshold

    @property
    def no_gradient(self) -> bool:
        """Whether no gradient reached the weights: gradient scores are NaN then."""
        return not self.stats.has_gradients

    def to_dict(self) -> dict[str, Any]:
        """Return the layer's part of the JSON schema; what nothing was seen of is None."""
        seen = bool(self.measured.any())
        return {
            "name": self.name,
            "kind": self.kind,
            "activation": self.activation,
            "units": self.n_units,
            "hidden": int(self.hidden.sum()),
            "dead": int(self.dead.sum()) if seen else None,
            "frozen": int(self.frozen.sum()) if seen else None,
            "dormant": int(self.dormant.sum()) if seen else None,
            "saturated_fraction": _share(self.stats, "n_flat", "n"),
            "mean_abs_activation": _share(self.stats, "sum_abs_h", "n"),
            "mean_abs_gradient": _share(self.stats, "sum_abs_g", "n_g"),
            **({"unknown": dict(self.wiring.unknown)} if self.wiring.unknown else {}),
            **({"tied": list(self.wiring.tied)} if self.wiring.tied else {}),
            **({} if self.ranks is None else {"ranks": asdict(self.ranks)}),
        }


@dataclass(frozen=True)
class Totals:
    """Counts over all layers; dead, frozen and dormant units need not be hidden."""

    layers: int
    units: int
    hidden_units: int
    dead: int
    frozen: int
    dormant: int


@dataclass(frozen=True)
class Coverage:
    """Which weight layers were measured.

    Attributes:
        found: Weight layers in the model.
        measured: Those of which activations were seen.
        skipped: (name, reason) of the others.
    """

    found: int
    measured: int
    skipped: tuple[tuple[str, str], ...]


@dataclass(frozen=True, eq=False, repr=False)
class Profile:
    """The plasticity profile of a model on some data.

    Attributes:
        layers: One entry per weight layer, in execution order.
        coverage: Which weight layers were measured, and why others were not.
        mode: "train" or "eval", the mode the model was in, or "mixed".
        samples: Number of samples.
        batches: Number of batches (forward passes).
        backend: What computed the statistics.
        device: Device of the model.
        dtype: Type of its first floating-point parameter.
        seed: Seed of torch's random numbers when profiling began (dropout draws from them).
        fingerprint: Fingerprint of the model.
        gradients: {parameter name: mean gradient over the batches}, if they were asked for. Of
            parameters that are cut over processes (FSDP2), as of `weights`, the part of this one.
        weights: {parameter name: the parameter itself, not a copy}, if gradients were asked for.
            `weights.parts` says which part of a parameter this process has, and of which.
        notes: What a reader of the numbers has to know.
    """

    layers: tuple[LayerProfile, ...]
    coverage: Coverage
    mode: str
    samples: int
    batches: int
    backend: str
    device: str
    dtype: str
    seed: int
    fingerprint: str
    gradients: Mapping[str, Tensor] | None = None
    weights: Weights | None = None
    notes: tuple[str, ...] = ()
    _by_name: dict[str, LayerProfile] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        # A tied weight answers to the names of all modules that hold it.
        names = {other: layer for layer in self.layers for other in layer.wiring.tied}
        names |= {layer.name: layer for layer in self.layers}
        object.__setattr__(self, "_by_name", names)

    def __repr__(self) -> str:
        totals = self.totals
        return (
            f"Profile({totals.layers} layers, {totals.units} units: {totals.hidden_units} hidden, "
            f"{totals.dead} dead, {totals.frozen} frozen, {totals.dormant} dormant; "
            f"{self.samples} samples, {self.mode})"
        )

    def _repr_html_(self) -> str:
        """Return a table for notebooks: of many layers those with most weak units."""
        rows = [layer.to_dict() for layer in self.layers]
        worst = sorted(range(len(rows)), key=lambda at: -_weakness(rows[at]))[:_SHOWN]
        titles = [name for name in rows[0] if name not in ("unknown", "tied", "ranks")]
        left_out = len(rows) - len(worst)
        more = [f"{left_out} layers not shown: none is worse; to_dict() has all"] * (left_out > 0)
        cells = ([rows[at][name] for name in titles] for at in sorted(worst))
        return html_table(repr(self), titles, cells, (*more, *self.notes))

    def __iter__(self) -> Iterator[LayerProfile]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, name: str) -> LayerProfile:
        """Return the layer with this name; InputError when there is none."""
        if name not in self._by_name:
            raise InputError(no_such("layer", name, self._by_name))
        return self._by_name[name]

    @property
    def totals(self) -> Totals:
        """Counts over all layers."""
        rows = [layer.to_dict() for layer in self.layers]
        sums = {
            key: sum(row[key] or 0 for row in rows)
            for key in ("units", "hidden", "dead", "frozen", "dormant")
        }
        return Totals(layers=len(rows), hidden_units=sums.pop("hidden"), **sums)

    def score(self, criterion: str, *, seed: int = 0) -> dict[str, Tensor]:
        """Return {layer name: float64 [n_units]}, NaN where the score is unknown.

        Args:
            criterion: Name of a criterion in `criteria.CRITERIA`; it says which scores are bad.
            seed: Read by the criterion `random` only.

        Raises:
            InputError: There is no such criterion.
        """
        if criterion not in CRITERIA:
            raise InputError(no_such("criterion", criterion, CRITERIA))
        rule = CRITERIA[criterion]
        return {
            layer.name: rule.score(
                layer.stats, ScoredLayer(layer.name, layer.wiring.activations, seed)
            )
            for layer in self.layers
        }

    def to_dict(
        self, *, model: str | None = None, weights: str | None = None, data: str | None = None
    ) -> dict[str, Any]:
        """Return the profile as plain values (schema version 1); unknown numbers are None.

        Args:
            model: Name of the model, if it has one.
            weights: Where its weights come from.
            data: Name of the data.
        """
        skipped = [{"name": name, "reason": reason} for name, reason in self.coverage.skipped]
        return {
            "schema_version": SCHEMA_VERSION,
            "fastplastic_version": __version__,
            "model": model,
            "weights": weights,
            "data": data,
            "device": self.device,
            "dtype": self.dtype,
            "mode": self.mode,
            "samples": self.samples,
            "seed": self.seed,
            "coverage": {
                "found": self.coverage.found,
                "measured": self.coverage.measured,
                "skipped": skipped,
            },
            "notes": list(self.notes),
            "totals": asdict(self.totals),
            "layers": [layer.to_dict() for layer in self.layers],
        }

    def to_pandas(self) -> "pandas.DataFrame":
        """Return a DataFrame of the layers of `to_dict`, one row each; unknown numbers are NaN.

        Ranks have a column each, such as "ranks.srank".

        Raises:
            InputError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise InputError(
                "to_pandas needs pandas: pip install pandas, or take to_dict()['layers']"
            ) from error
        return pandas.DataFrame(flat_rows(layer.to_dict() for layer in self.layers))

    def save(self, path: str | os.PathLike[str], *, force: bool = False) -> None:
        """Write the profile as safetensors with JSON metadata.

        Gradients and weights are in it where the profile has them.

        Raises:
            FileError: The path cannot be written, or exists and `force` is not set.
            InputError: The weights have changed since they were profiled, or are cut over
                processes.
        """
        if self.weights is not None:
            _check_whole(self.weights)
            self.weights.check()
        stored = StoredProfile(
            wiring=[layer.wiring for layer in self.layers],
            table=torch.cat([layer.stats.table for layer in self.layers], dim=1),
            fields={name: getattr(self, name) for name in StoredProfile.names()},
            **asdict(self.coverage),
            notes=self.notes,
            ranks={layer.name: layer.ranks for layer in self.layers if layer.ranks is not None},
            gradients=self.gradients,
            weights=self.weights,
        )
        write_profile(stored, path, force=force)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Profile":
        """Read a profile from a file.

        Raises:
            FileError: The file is missing, damaged or not a profile.
        """
        stored = read_profile(path)
        sizes = {layer.name: layer.n_units for layer in stored.wiring}
        stats = UnitStats(stored.table, columns_of(sizes))
        return cls(
            layers=tuple(
                LayerProfile(layer, stats[layer.name], stored.ranks.get(layer.name))
                for layer in stored.wiring
            ),
            coverage=Coverage(stored.found, stored.measured, tuple(stored.skipped)),
            gradients=stored.gradients,
            weights=None if stored.weights is None else Weights(stored.weights),
            notes=tuple(stored.notes),
            **stored.fields,
        )


def _check_whole(weights: Weights) -> None:
    for name, part in weights.parts.items():
        raise InputError(
            f"the profile holds {part.sizes} of {name!r} {part.shape} and its gradient, the part "
            "of this process, expected whole ones: save it without them, "
            "dataclasses.replace(profile, gradients=None, weights=None)"
        )


def _weakness(row: Mapping[str, Any]) -> float:
    """Return the share of units that are dead, frozen or dormant, whichever are most."""
    most = max(row[key] or 0 for key in ("dead", "frozen", "dormant"))
    return float(most / row["units"])


def _share(stats: LayerStats, total: str, count: str) -> float | None:
    """Return the ratio of two sums over the layer, None when nothing was counted."""
    counted = float(stats[count].sum())
    return float(stats[total].sum()) / counted if counted else None
