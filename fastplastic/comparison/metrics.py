"""The figures that profiles are compared by: of one layer, of many, and how far two are apart."""

import math
from collections.abc import Iterable

from fastplastic.files import LayerFigures

_COUNTED = ("dead", "frozen", "dormant")
SHARES = (*_COUNTED, "saturated")
MEANS = ("mean_abs_activation", "mean_abs_gradient")
METRICS = (*SHARES, *MEANS)
# Shares are ratios of counts: what is left of a difference behind this digit is rounding.
_DIGITS = 12


def of_layer(layer: LayerFigures, metric: str) -> float | None:
    """Return a figure of a layer, None where it is unknown.

    dead, frozen and dormant are shares of the units, saturated is the share of flat positions.
    """
    value: float | None = getattr(layer, _field(metric))
    return value / layer.units if value is not None and metric in _COUNTED else value


def of_layers(layers: Iterable[LayerFigures], metric: str) -> float | None:
    """Return the mean of a figure over all units of the layers where it is known, or None."""
    known = [layer for layer in layers if getattr(layer, _field(metric)) is not None]
    if not known:
        return None
    units = sum(layer.units for layer in known)
    if metric in _COUNTED:
        # Whole numbers, so that 3 of 60 units are 0.05 and not a little more.
        return float(sum(getattr(layer, metric) for layer in known) / units)
    return math.fsum(getattr(layer, _field(metric)) * layer.units for layer in known) / units


def difference(metric: str, first: float | None, last: float | None) -> float | None:
    """Return last minus first, None where one of them is unknown."""
    if first is None or last is None:
        return None
    return round(last - first, _DIGITS) if metric in SHARES else last - first


def _field(metric: str) -> str:
    return "saturated_fraction" if metric == "saturated" else metric
