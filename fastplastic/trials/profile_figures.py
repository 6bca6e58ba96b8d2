"""A profile in a few numbers: what might tell beforehand whether re-initialisation helps."""

import math

import torch

from fastplastic.measure import Profile


def figures(profile: Profile) -> dict[str, float]:
    """Return figures of the hidden units of a profile, those that can be re-initialised.

    Shares of units that are dead, frozen, dormant or saturated (flat at 95 % of the positions or
    more), the mean share of flat positions, the mean over layers of the spread of mean abs(h) and
    of mean abs(dw) (standard deviation over mean), and the shares of units whose score of
    `gradient` is at most 0.1 and 0.01. Figures without a number are left out.
    """
    masks, columns = [], []
    spreads: dict[str, list[float]] = {"spread_h": [], "spread_dw": []}
    for layer in profile:
        mask = layer.hidden
        if not bool(mask.any()):
            continue
        masks.append(mask)
        size = layer.stats.mean_abs_dw
        gradient = size / size.nanmean()
        flat = layer.saturated_fraction
        columns.append(
            torch.stack(
                [
                    layer.dead.double(), layer.frozen.double(), layer.dormant.double(),
                    (flat >= 0.95).double(), flat,
                    _at_most(gradient, 0.1), _at_most(gradient, 0.01),
                ]
            )[:, mask]
        )  # fmt: skip
        spreads["spread_h"].append(_spread(layer.stats.mean_abs_h[mask]))
        spreads["spread_dw"].append(_spread(size[mask]))
    if not columns:
        return {}
    names = ("dead", "frozen", "dormant", "saturated", "flat", "weak_gradient", "no_gradient")
    means = torch.cat(columns, dim=1).nanmean(dim=1).tolist()
    found = dict(zip(names, means, strict=True))
    for name, values in spreads.items():
        known = [value for value in values if math.isfinite(value)]
        found[name] = sum(known) / len(known) if known else math.nan
    return {name: value for name, value in found.items() if math.isfinite(value)}


def _at_most(scores: torch.Tensor, limit: float) -> torch.Tensor:
    return torch.where(scores.isnan(), torch.nan, (scores <= limit).double())


def _spread(values: torch.Tensor) -> float:
    known = values[values.isfinite()]
    return float(known.std(correction=0) / known.mean()) if len(known) else math.nan
