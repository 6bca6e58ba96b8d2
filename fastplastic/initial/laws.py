"""Laws of parameters: how to write down a distribution, and what an elementwise step makes of it.

A law is one element's distribution in the form that `kernels` draw from. Not every chain of steps
has that form: where one leads out of it, there is no law.
"""

import math
from collections.abc import Callable

from fastplastic.kernels import Law

__all__ = ["Law", "constant", "normal", "then", "truncated_normal", "uniform"]


def constant(value: float) -> Law:
    """Return the law of a single finite value."""
    return Law("uniform", value, 0.0)


def uniform(low: float, high: float) -> Law:
    """Return the uniform law between two finite ends."""
    return Law("uniform", low, high - low)


def normal(mean: float, std: float) -> Law:
    """Return the normal law."""
    return Law("normal", mean, std)


def truncated_normal(mean: float, std: float, low: float, high: float) -> Law:
    """Return the normal law under the condition that the value is in [low, high]."""
    p_low, p_high = (_normal_cdf((end - mean) / std) for end in (low, high))
    return Law("normal", mean, std, p_low, p_high, low, high)


def then(law: Law, operation: str, *arguments: float) -> Law | None:
    """Return the law after one more elementwise operation; None where it has another form.

    Args:
        law: The law before it.
        operation: Named as in PyTorch: "mul" (factor), "div" (divisor), "add" (summand),
            "clamp" (low, high), "erfinv" ().
        arguments: The numbers in parentheses.
    """
    try:
        return _STEPS[operation](law, *arguments)
    except (ValueError, ZeroDivisionError):
        # Not finite: no law is.
        return None


def _mul(law: Law, factor: float) -> Law:
    if factor == 0:
        return constant(0.0)
    low, high = sorted((law.low * factor, law.high * factor))
    p = law.p_low, law.p_high
    return Law(law.kind, law.location * factor, law.scale * factor, *p, low, high)


def _div(law: Law, divisor: float) -> Law:
    low, high = sorted((law.low / divisor, law.high / divisor))
    p = law.p_low, law.p_high
    return Law(law.kind, law.location / divisor, law.scale / divisor, *p, low, high)


def _add(law: Law, summand: float) -> Law:
    p = law.p_low, law.p_high
    location = law.location + summand
    return Law(law.kind, location, law.scale, *p, law.low + summand, law.high + summand)


def _clamp(law: Law, low: float, high: float) -> Law:
    least, most = (min(max(end, low), high) for end in (law.low, law.high))
    return Law(law.kind, law.location, law.scale, law.p_low, law.p_high, least, most)


def _erfinv(law: Law) -> Law | None:
    """Fold the way by which timm and PyTorch draw a truncated normal: erfinv of a uniform."""
    plain = law.kind == "uniform" and law.scale != 0 and (law.p_low, law.p_high) == (0, 1)
    if not plain or (law.low, law.high) != (-math.inf, math.inf):
        return None
    # erfinv(2 p - 1) = s / sqrt(2).
    p_low, p_high = sorted(((1 + law.location) / 2, (1 + law.location + law.scale) / 2))
    return Law("normal", 0.0, 1 / math.sqrt(2), p_low, p_high)


def _normal_cdf(x: float) -> float:
    return math.erfc(-x / math.sqrt(2)) / 2


_STEPS: dict[str, Callable[..., Law | None]] = {
    "mul": _mul,
    "div": _div,
    "add": _add,
    "clamp": _clamp,
    "erfinv": _erfinv,
}
