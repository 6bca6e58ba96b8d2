"""The law of a parameter: the distribution of its initial values, element by element.

    x = Philox word 0 of (seed, "initial values", name) at the element
    u = ((x >> 9) + 0.5) 2^-23,  p = u,  or p_low + u p_width  unless (p_low, p_width) = (0, 1)
    s = p (uniform)  or  SQRT_2 erfinv(2 p - 1) (normal)
    value = location + scale s,  low where value < low,  high where value > high,
            then rounded to the dtype of the weight

Every operation is one float32 operation, rounded to nearest, in the order written here and below;
none are contracted. So every backend gives the same bits.

    log(a):            a = 2^e m with 1 <= m < 2; where m > SQRT_2: m / 2 and e + 1.
                       f = m - 1, z = f f, q = (LOG[0] f + LOG[1]) f + ... + LOG[8]
                       y = (f z) q;  y = y + LOG_LOW e;  y = y - 0.5 z;  log = (f + y) + LOG_HIGH e
    erfinv(x):         w = -log(max((1 - x) (1 + x), LEAST))
                       w < 5:  v = w - 2.5,    q = (CENTRE[0] v + CENTRE[1]) v + ... + CENTRE[8]
                       else:   v = sqrt(w) - 3, q = (TAIL[0] v + TAIL[1]) v + ... + TAIL[8]
                       erfinv = q x

log after Moshier's Cephes (logf), erfinv after Giles, "Approximating the erfinv function", GPU
Computing Gems, 2011, within its range thanks to LEAST. u is exact, so the normal law ends at 5.3
standard deviations.
"""

import math
from dataclasses import dataclass
from typing import Literal

SQRT_2 = 1.4142135623730951
LOG = (
    7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1,
    -1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1,
)  # fmt: skip
LOG_LOW, LOG_HIGH = -2.12194440e-4, 0.693359375
# What (1 - x) (1 + x) is between the two last float32 numbers below 1; 0 has no logarithm.
LEAST = 2.0**-24
CENTRE = (
    2.81022636e-08, 3.43273939e-07, -3.5233877e-06, -4.39150654e-06, 0.00021858087,
    -0.00125372503, -0.00417768164, 0.246640727, 1.50140941,
)  # fmt: skip
TAIL = (
    -0.000200214257, 0.000100950558, 0.00134934322, -0.00367342844, 0.00573950773,
    -0.0076224613, 0.00943887047, 1.00167406, 2.83297682,
)  # fmt: skip


@dataclass(frozen=True)
class Law:
    """A distribution that each element of a parameter is drawn from independently.

    The value is min(max(location + scale s, low), high), with s uniform on (p_low, p_high) or the
    standard normal quantile of such a number: a normal law is truncated by (p_low, p_high). A
    scale of 0 makes a constant.

    Attributes:
        kind: "uniform" or "normal".
        location: What is added.
        scale: What s is multiplied by; of any sign.
        p_low: Lower end of the uniform number, in [0, 1].
        p_high: Its upper end, in [p_low, 1].
        low: No value is below this.
        high: No value is above this.
    """

    kind: Literal["uniform", "normal"]
    location: float
    scale: float
    p_low: float = 0.0
    p_high: float = 1.0
    low: float = -math.inf
    high: float = math.inf

    def __post_init__(self) -> None:
        """Refuse what is no distribution."""
        if self.kind not in ("uniform", "normal"):
            raise ValueError(f"law {self.kind!r} is unknown, expected 'uniform' or 'normal'")
        if not (math.isfinite(self.location) and math.isfinite(self.scale)):
            raise ValueError(
                f"the law has location {self.location} and scale {self.scale}, "
                "expected finite numbers"
            )
        if not 0 <= self.p_low <= self.p_high <= 1:
            raise ValueError(
                f"the law lies between probabilities {self.p_low} and {self.p_high}, "
                "expected 0 <= p_low <= p_high <= 1"
            )
        if not self.low <= self.high:
            raise ValueError(
                f"the law lies between {self.low} and {self.high}, expected low <= high"
            )

    @property
    def numbers(self) -> tuple[float, float, float, float, float, float]:
        """Return location, scale, p_low, p_width, low, high: to be rounded to float32."""
        width = self.p_high - self.p_low
        return self.location, self.scale, self.p_low, width, self.low, self.high
