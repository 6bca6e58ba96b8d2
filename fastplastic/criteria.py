"""How healthy a unit is: pure functions from the statistics of one layer to a score per unit.

Every function of units returns float64 [n_units] on the CPU, NaN where the statistics do not tell.
`CRITERIA` says for each which end of the scale makes a unit a candidate for re-initialisation.
`WEIGHT_CRITERIA` holds those of single weights, functions from weights and gradients. h is the
activation, f the activation function, z its input, g the gradient of the loss to h, w a weight and
dw the gradient of the loss to it; all means run over batch and positions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fastplastic.kernels import SCORES
from fastplastic.randomness import unit_noise
from fastplastic.stats import LayerStats

# Keeps the ReDo score defined in a layer whose activations are all zero, as in its reference code.
_REDO_EPSILON = 1e-9


@dataclass(frozen=True)
class ScoredLayer:
    """What a criterion may know of a layer beside its statistics.

    Attributes:
        name: Its name.
        activations: (first unit, last unit + 1, name of the activation function), as in
            `wiring.UnitLayer`.
        seed: Any integer.
    """

    name: str = ""
    activations: Sequence[tuple[int, int, str]] = ()
    seed: int = 0


@dataclass(frozen=True)
class Criterion:
    """One way to score units.

    Attributes:
        name: Name on the command line and in plan files.
        formula: (statistics, layer) -> score per unit.
        candidate: Which scores make a unit a candidate.
        threshold: Threshold of its source (inclusive), or None where the source gives none.
        needs: Which statistics it reads.
        source: Where the formula comes from.
        summary: The formula in one line.
        only: For which activation functions alone, or "" for all.
    """

    name: str
    formula: Callable[[LayerStats, ScoredLayer], Tensor]
    candidate: Literal["small", "large"]
    threshold: float | None
    needs: Literal["activations", "gradients", "nothing"]
    source: str
    summary: str
    only: str = ""

    @property
    def unknown(self) -> str:
        """Why a unit may have no score."""
        if self.only:
            return f"only {self.only} have one"
        if self.name == "activation_gradient":
            return "no gradient to their activation was seen"
        return "no gradient reaches them" if self.needs == "gradients" else "nothing was measured"

    def beyond(self, scores: Tensor) -> Tensor | None:
        """Return which scores are beyond the threshold of the source, bool; None without one."""
        if self.threshold is None:
            return None
        small = self.candidate == "small"
        return scores <= self.threshold if small else scores >= self.threshold

    def score(self, stats: LayerStats, layer: ScoredLayer | None = None) -> Tensor:
        """Return the score of every unit of a layer, float64 [n_units].

        Args:
            stats: Statistics of the layer.
            layer: Read by `phi` and `random` only.
        """
        return self.formula(stats, ScoredLayer() if layer is None else layer)


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


def phi(stats: LayerStats, layer: ScoredLayer) -> Tensor:
    """Return the root mean square of h scaled to [-1, 1]; 1 for a unit at the ends of its range.

    After Rakitianskaia and Engelbrecht, "Measuring saturation in neural networks", SSCI 2015, who
    take the mean of the size, which sums of h and h^2 do not tell; the root mean square is at least
    as large, and the same at 0 and at 1. Only for tanh, hardtanh, sigmoid and hardsigmoid: NaN for
    units with another activation function.
    """
    mean, square = stats.mean_h, stats.mean_sq_h
    scores = torch.full_like(mean, torch.nan)
    for first, stop, name in layer.activations:
        units = slice(first, stop)
        if name in ("tanh", "hardtanh"):
            scores[units] = square[units].sqrt()
        elif name in ("sigmoid", "hardsigmoid"):
            # (2 h - 1)^2 on average; rounding can make it negative.
            scores[units] = (4 * square[units] - 4 * mean[units] + 1).clamp(min=0).sqrt()
    return scores


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


def activation_gradient(stats: LayerStats) -> Tensor:
    """Return mean abs(g) divided by its mean over the units of the layer.

    Source: the variant of GraMa (arXiv 2505.24061) in use that reads gradients of activations
    instead of weights; threshold 0.01 there. NaN for the whole layer when no gradient reaches it.
    """
    size = stats.mean_abs_g
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


def zero_contribution(stats: LayerStats) -> Tensor:
    """Return the standard deviation of h times mean abs(w_out).

    Source: continual backpropagation with the mean of a unit moved into the bias of its consumers,
    Dohare et al., Nature 2024. There it is mean abs(h - mean h), which sums do not tell; the
    standard deviation is at least as large, and 0 for the same units.
    """
    return stats.std_h * stats.mean_abs_w_out


def adaptable_contribution(stats: LayerStats) -> Tensor:
    """Return `zero_contribution` divided by mean abs(w_in): units with large weights adapt slowly.

    Source: continual backpropagation, Dohare et al., Nature 2024. NaN where all incoming weights
    are 0.
    """
    size = stats.mean_abs_w
    return zero_contribution(stats) / size.where(size > 0, torch.nan)


def random(stats: LayerStats, layer: ScoredLayer) -> Tensor:
    """Return uniform numbers in [0, 1) fixed by (seed, layer name, unit): the control.

    Args:
        stats: Tells the number of units; its values are not read.
        layer: Its name and the seed are read.
    """
    return unit_noise(layer.seed, "random criterion", layer.name, stats.n_units)


_REDO = "Sokar et al., arXiv 2302.12902"
_THESIS = "Hernandez-Garcia, thesis 2026"

CRITERIA: dict[str, Criterion] = {
    criterion.name: criterion
    for criterion in (
        Criterion(
            "dead", lambda stats, _: dead(stats), "small", 0.0, "activations",
            f"{_REDO}; Dohare et al., Nature 2024", "max h - min h",
        ),
        Criterion(
            "frozen", lambda stats, _: frozen(stats), "large", 1.0, "activations",
            _THESIS, "share of positions with abs(f'(z)) <= 0.01",
        ),
        Criterion(
            "saturated", lambda stats, _: saturated(stats), "large", 0.95, "activations",
            "after Rakitianskaia and Engelbrecht, SSCI 2015",
            "share of positions with abs(f'(z)) <= 0.01",
        ),
        Criterion(
            "phi", phi, "large", None, "activations",
            "after Rakitianskaia and Engelbrecht, SSCI 2015",
            "root mean square of h scaled to [-1, 1]", "tanh, hardtanh, sigmoid, hardsigmoid",
        ),
        Criterion(
            "dormant", lambda stats, _: dormant(stats), "small", 0.025, "activations",
            _REDO, "mean abs(h) / its mean over the layer",
        ),
        Criterion(
            "gradient", lambda stats, _: gradient(stats), "small", 0.1, "gradients",
            "GraMa, arXiv 2505.24061", "mean abs(dw) of the incoming row / its mean over the layer",
        ),
        Criterion(
            "activation_gradient", lambda stats, _: activation_gradient(stats), "small", 0.01,
            "gradients", "variant of GraMa, arXiv 2505.24061",
            "mean abs(g) / its mean over the layer",
        ),
        Criterion(
            "first_order", lambda stats, _: first_order(stats), "small", None, "gradients",
            f"Molchanov et al., CVPR 2019; {_THESIS}", "abs(sum of w_out * dw_out)",
        ),
        Criterion(
            "contribution", lambda stats, _: contribution(stats), "small", None, "activations",
            "Dohare et al., Nature 2024", "mean abs(h) * mean abs(w_out)",
        ),
        Criterion(
            "zero_contribution", lambda stats, _: zero_contribution(stats), "small", None,
            "activations", "Dohare et al., Nature 2024",
            "standard deviation of h * mean abs(w_out)",
        ),
        Criterion(
            "adaptable_contribution", lambda stats, _: adaptable_contribution(stats), "small", None,
            "activations", "Dohare et al., Nature 2024", "zero_contribution / mean abs(w_in)",
        ),
        Criterion(
            "random", random, "small", None, "nothing",
            "the control at equal dose", "uniform in [0, 1), seeded",
        ),
    )
}  # fmt: skip


@dataclass(frozen=True)
class WeightCriterion:
    """One way to score single weights; the smallest scores are candidates.

    Attributes:
        name: Name on the command line, in plan files and in `kernels.select`.
        formula: (weights, their mean gradients) -> float32 score of each, in their shape.
        needs: "gradients", or "nothing".
        source: Where the formula comes from.
        summary: The formula in one line.
        warning: What a user should know, or "".
    """

    name: str
    formula: Callable[[Tensor, Tensor], Tensor]
    needs: Literal["gradients", "nothing"]
    source: str
    summary: str
    warning: str = ""


_SWR = "Hernandez-Garcia et al., arXiv 2508.00212"


def _of_weights(name: str, source: str, summary: str, warning: str = "") -> WeightCriterion:
    """Return the criterion whose score is that of `kernels.select`."""
    score = SCORES[name]
    needs: Literal["gradients", "nothing"] = "gradients" if score.dw else "nothing"
    return WeightCriterion(name, score.of, needs, source, summary, warning)


WEIGHT_CRITERIA: dict[str, WeightCriterion] = {
    criterion.name: criterion
    for criterion in (
        # The best of the utilities compared there, with a threshold and resampling.
        _of_weights("swr", f"SWR: {_SWR}", "abs(w * dw)"),
        _of_weights("gradient", _SWR, "abs(dw)"),
        _of_weights(
            "magnitude", _SWR, "abs(w)",
            f"magnitude failed in all settings of {_SWR}: swr did best there",
        ),
        _of_weights("random", "the control at equal dose", "seeded order"),
    )
}  # fmt: skip
