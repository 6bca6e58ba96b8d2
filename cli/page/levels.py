"""How dark a cell of the heat map is: 0 for nothing to tell, up to 5."""

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

SHARES = (0.0, 0.01, 0.05, 0.2, 0.5)
# About half is normal for ReLU.
SATURATED = (0.6, 0.75, 0.85, 0.95, 0.99)
GRADIENTS = (3.0, 10.0, 30.0, 100.0, 1000.0)


def share_level(share: float) -> int:
    """Return the level of a share of units: above 0, 1 %, 5 %, 20 % and 50 %."""
    return bisect_left(SHARES, share)


def saturated_level(share: float) -> int:
    """Return the level of a share of flat positions: from 60, 75, 85, 95 and 99 % on."""
    return bisect_right(SATURATED, share)


def gradient_level(size: float, usual: float) -> int:
    """Return the level of a gradient: 3, 10, 30, 100 and 1000 times below the usual size."""
    if not size:
        return len(GRADIENTS)
    return bisect_right(GRADIENTS, usual / size)


def usual_gradient(rows: Sequence[Mapping[str, Any]]) -> float:
    """Return the median size over the layers that a gradient reached; 0 where there are none."""
    sizes = [row["mean_abs_gradient"] for row in rows if row["mean_abs_gradient"]]
    return median(sizes) if sizes else 0.0
