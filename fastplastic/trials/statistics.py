"""Means, intervals and paired tests over seeds, by scipy; Holm's correction over arms."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

_LEVEL = 0.95
# Two-sided level of a test, and the chance with which a detectable effect is seen.
ALPHA = 1 - _LEVEL
_POWER = 0.8


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its interval of 95 % by Student's t.

    Attributes:
        mean: The mean.
        low: Lower end of the interval; None with a single seed.
        high: Upper end; None with a single seed.
        n: Number of seeds.
    """

    mean: float
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True)
class Comparison:
    """The paired difference of an arm to another over the seeds that both have.

    Attributes:
        against: Name of the other arm.
        difference: Mean of (this arm - the other) and its interval.
        p: Two-sided p of the paired t-test; None where it is not defined: with a single seed, or
            when all differences are the same.
        corrected: p after Holm's correction over the arms that are compared with the same.
        detectable: The effect that such a test would show in four of five trials of as many seeds;
            None with a single seed.
    """

    against: str
    difference: Estimate
    p: float | None
    corrected: float | None
    detectable: float | None

    @property
    def shown(self) -> int:
        """1 where the arm is shown to be better, -1 worse, 0 where neither is shown."""
        if self.corrected is None or self.corrected >= ALPHA:
            return 0
        return 1 if self.difference.mean > 0 else -1


def estimate(values: Sequence[float]) -> Estimate:
    """Return the mean of the values with its interval."""
    from scipy import stats

    n, mean = len(values), float(np.mean(values))
    if n < 2:
        return Estimate(mean, None, None, n)
    half = float(stats.t.ppf(0.5 + _LEVEL / 2, n - 1)) * _error(values)
    return Estimate(mean, mean - half, mean + half, n)


def compare(against: str, ours: Sequence[float], theirs: Sequence[float]) -> Comparison:
    """Return the comparison of two arms, value by value of the same seeds; not yet corrected."""
    from scipy import stats

    differences = [x - y for x, y in zip(ours, theirs, strict=True)]
    found, n = estimate(differences), len(differences)
    if n < 2:
        return Comparison(against, found, None, None, None)
    error = _error(differences)
    factor = stats.t.ppf(1 - ALPHA / 2, n - 1) + stats.t.ppf(_POWER, n - 1)
    # Rounding aside, all the same: no spread to compare with.
    flat = error <= 1e-12 * max(map(abs, differences))
    p = None if flat or error == 0 else float(2 * stats.t.sf(abs(found.mean) / error, n - 1))
    return Comparison(against, found, p, p, float(factor) * error)


def holm(ps: Mapping[str, float | None]) -> dict[str, float | None]:
    """Return the p values after Holm's step-down correction, those that are not defined as None.

    Source: Holm, "A simple sequentially rejective multiple test procedure", 1979.
    """
    known = sorted((p, name) for name, p in ps.items() if p is not None)
    corrected: dict[str, float | None] = dict.fromkeys(ps)
    least = 0.0
    for rank, (p, name) in enumerate(known):
        least = max(least, min(1.0, p * (len(known) - rank)))
        corrected[name] = least
    return corrected


def _error(values: Sequence[float]) -> float:
    """Return the standard error of the mean."""
    return float(np.std(values, ddof=1)) / math.sqrt(len(values))
