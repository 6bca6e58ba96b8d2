"""What a profile says of one layer, and counts over all of them."""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fastplastic.criteria import CRITERIA
from fastplastic.stats import LayerStats
from fastplastic.wiring import Consumer, UnitLayer

if TYPE_CHECKING:
    from fastplastic.diagnostics import Ranks


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


def _share(stats: LayerStats, total: str, count: str) -> float | None:
    """Return the ratio of two sums over the layer, None when nothing was counted."""
    counted = float(stats[count].sum())
    return float(stats[total].sum()) / counted if counted else None
