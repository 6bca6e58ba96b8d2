"""How healthy a unit is: pure functions from the statistics of one layer to a score per unit.

Every function returns float64 [n_units] on the CPU, NaN where the statistics do not tell.
`CRITERIA` says for each which end of the scale makes a unit a candidate for re-initialisation.
h is the activation, f the activation function, z its input, w a weight and dw the gradient of the
loss to it; all means run over batch and positions.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from fastplastic.randomness import unit_noise
from fastplastic.stats import LayerStats

# Keeps the ReDo score defined in a layer whose activations are all zero, as in its reference code.
_REDO_EPSILON = 1e-9


@dataclass(frozen=True)
class Criterion:
    """One way to score units.

    Attributes:
        name: Name on the command line and in plan files.
        formula: (statistics, layer name, seed) -> score per unit.
        candidate: Which scores make a unit a candidate.
        threshold: Threshold of its source (inclusive), or None where the source gives none.
        needs: Which statistics it reads.
        source: Where the formula comes from.
        summary: The formula in one line.
    """

    name: str
    formula: Callable[[LayerStats, str, int], Tensor]
    candidate: Literal["small", "large"]
    threshold: float | None
    needs: Literal["activations", "gradients", "nothing"]
    source: str
    summary: str

    def score(self, stats: LayerStats, *, layer: str = "", seed: int = 0) -> Tensor:
        """Return the score of every unit of a layer, float64 [n_units].

        Args:
            stats: Statistics of the layer.
            layer: Name of the layer; read by `random` only.
            seed: Read by `random` only.
        """
        return self.formula(stats, layer, seed)


def dead(stats: LayerStats) -> Tensor:
    """Return max h - min h; 0 for a unit whose activation is constant (a dead ReLU is always 0).

    Sources: Sokar et al., "The dormant neuron phenomenon" (ReDo), arXiv 2302.12902; Dohare et al.,
    Nature 2024. The unit is that of h. NaN where fewer than two positions were seen.
    """
    return stats.range_h


def frozen(stats: LayerStats) -> Tensor:
    """Return the share of positions with abs(f'(z)) <= 0.01; 1 for a frozen unit.

    Source: Hernandez-Garcia, thesis 2026. Activation functions that are never flat score 0.
    """
    return stats.flat_share


def saturated(stats: LayerStats) -> Tensor:
    """Return the share of positions with abs(f'(z)) <= 0.01, in [0, 1].

    After Rakitianskaia and Engelbrecht, "Measuring saturation in neural networks", SSCI 2015, whose
    own measure is for bounded activation functions only; the flat share is defined for all.
    """
    return stats.flat_share


def dormant(stats: LayerStats) -> Tensor:
    """Return mean abs(h) divided by (its mean over the units of the layer + 1e-9).

    Source: Sokar et al. (ReDo), arXiv 2302.12902. Its text lets the scores of a layer sum to 1, its
    code divides by the mean as we do; threshold 0.025 as in its default setting (0.1 in the paper).
    """
    activity = stats.mean_abs_h
    return activity / (activity.nanmean() + _REDO_EPSILON)


def gradient(stats: LayerStats) -> Tensor:
    """Return mean abs(dw) of the incoming weights divided by its mean over the units of the layer.

    Source: GraMa, arXiv 2505.24061. NaN for the whole layer when no gradient reaches it: that says
    nothing about its units (the last norm of a residual block may start at zero, for instance).
    """
    size = stats.mean_abs_dw
    return size / size.nanmean()


def first_order(stats: LayerStats) -> Tensor:
    """Return abs(sum over positions of h * dL/dh), read off as abs(sum of w_out * dw_out).

    Sources: Molchanov et al., "Importance estimation for neural network pruning", CVPR 2019 (there
    to prune); Hernandez-Garcia, thesis 2026. The unit is that of the loss. NaN where nothing known
    reads the unit, and for a layer where it is zero throughout because no gradient reaches it.
    """
    return stats.first_order


def contribution(stats: LayerStats) -> Tensor:
    """Return mean abs(h) * mean abs(w_out), in the unit of what the consumers compute.

    Source: continual backpropagation, Dohare et al., Nature 2024. NaN where nothing known reads the
    unit.
    """
    return stats.mean_abs_h * stats.mean_abs_w_out


def random(stats: LayerStats, layer: str, seed: int) -> Tensor:
    """Return uniform numbers in [0, 1) fixed by (seed, layer name, unit): the control.

    Args:
        stats: Tells the number of units; its values are not read.
        layer: Name of the layer.
        seed: Any integer.
    """
    return unit_noise(seed, "random criterion", layer, stats.n_units)


_REDO = "Sokar et al., arXiv 2302.12902"
_THESIS = "Hernandez-Garcia, thesis 2026"

CRITERIA: dict[str, Criterion] = {
    criterion.name: criterion
    for criterion in (
        Criterion(
            "dead", lambda stats, *_: dead(stats), "small", 0.0, "activations",
            f"{_REDO}; Dohare et al., Nature 2024", "max h - min h",
        ),
        Criterion(
            "frozen", lambda stats, *_: frozen(stats), "large", 1.0, "activations",
            _THESIS, "share of positions with abs(f'(z)) <= 0.01",
        ),
        Criterion(
            "saturated", lambda stats, *_: saturated(stats), "large", 0.95, "activations",
            "after Rakitianskaia and Engelbrecht, SSCI 2015",
            "share of positions with abs(f'(z)) <= 0.01",
        ),
        Criterion(
            "dormant", lambda stats, *_: dormant(stats), "small", 0.025, "activations",
            _REDO, "mean abs(h) / its mean over the layer",
        ),
        Criterion(
            "gradient", lambda stats, *_: gradient(stats), "small", 0.1, "gradients",
            "GraMa, arXiv 2505.24061", "mean abs(dw) of the incoming row / its mean over the layer",
        ),
        Criterion(
            "first_order", lambda stats, *_: first_order(stats), "small", None, "gradients",
            f"Molchanov et al., CVPR 2019; {_THESIS}", "abs(sum of w_out * dw_out)",
        ),
        Criterion(
            "contribution", lambda stats, *_: contribution(stats), "small", None, "activations",
            "Dohare et al., Nature 2024", "mean abs(h) * mean abs(w_out)",
        ),
        Criterion(
            "random", random, "small", None, "nothing",
            "the control at equal dose", "uniform in [0, 1), seeded",
        ),
    )
}  # fmt: skip
