"""Activation functions in float32 registers.

h = f(z) by the formulas of torch, so that h is 0 where the network's own h is: GELU where 1 + erf
rounds to 0, SiLU where exp(-z) overflows. Next to 0, where a difference would cancel, a series
keeps h different from 0. Absolute errors are below 5e-7 of max(1, |h|).
"""

import math
from functools import lru_cache

import torch
import triton.language as tl

from fastplastic.kernels.activations import ACTIVATIONS, INFINITE_FROM, parse_activation
from fastplastic.kernels.gpu.runtime import device_function

LEAKY_SLOPE = 0.01
# Functions that never fall, and those that are never negative.
_MONOTONE = (
    "identity", "relu", "relu6", "hardtanh", "elu", "celu", "selu", "softplus", "hardsigmoid",
    "sigmoid", "tanh",
)  # fmt: skip
_POSITIVE = ("relu", "relu6", "softplus", "hardsigmoid", "sigmoid")
# log2 of erfc(x / sqrt 2) for x up to here, fitted so that h is off by 2e-7 at most, by 7e-6 where
# what is read has three digits.
_ERFC_END = tl.constexpr(5.6)
_FLOAT16_END = tl.constexpr(INFINITE_FROM[torch.float16])
_BFLOAT16_END = tl.constexpr(INFINITE_FROM[torch.bfloat16])
_GELU_ZERO = tl.constexpr(ACTIVATIONS["gelu"].zero_below)
_GELU_TANH_ZERO = tl.constexpr(ACTIVATIONS["gelu_tanh"].zero_below)


def flat_ends(name: str, dtype: torch.dtype = torch.float32) -> dict[str, float | None]:
    """Return the ends of where a function is flat, as numbers of a dtype inside the intervals.

    All are z <= FLAT_BELOW, FLAT_FROM <= z <= FLAT_TO, or z >= FLAT_ABOVE; None where there is no
    such interval.
    """
    ends: dict[str, float | None] = dict.fromkeys(
        ("FLAT_BELOW", "FLAT_FROM", "FLAT_TO", "FLAT_ABOVE")
    )
    for low, high in ACTIVATIONS[name].flat:
        if low == -math.inf:
            ends["FLAT_BELOW"] = _inside(high, dtype, up=False)
        elif high == math.inf:
            ends["FLAT_ABOVE"] = _inside(low, dtype, up=True)
        else:
            ends["FLAT_FROM"] = _inside(low, dtype, up=True)
            ends["FLAT_TO"] = _inside(high, dtype, up=False)
    return ends


def _inside(number: float, dtype: torch.dtype, up: bool) -> float:
    """Round to a dtype in one direction."""
    nearest = torch.tensor(number, dtype=torch.float64).to(dtype)
    if nearest.item() < number if up else nearest.item() > number:
        # The bits of a floating-point number grow with its size.
        bits = nearest.view(torch.int32 if dtype == torch.float32 else torch.int16)
        bits += 1 if (nearest.item() > 0) == up else -1
    return float(nearest)


@lru_cache
def traits(activation: str, dtype: torch.dtype) -> dict[str, object]:
    """Return what the kernel is told about a function at compile time.

    Args:
        activation: Its name and slope, as in `fastplastic.kernels.activation_stats`; "" for abs(g)
            of gradients.
        dtype: Of the tensors.
    """
    name, slope = parse_activation(activation or "identity")
    slope = LEAKY_SLOPE if slope is None else slope
    return {
        "slope": slope,
        "ACTIVATION": name,
        "MONOTONE": name in _MONOTONE or (name == "leaky_relu" and slope >= 0),
        "POSITIVE": name in _POSITIVE,
        "GRADIENT": not activation,
        **flat_ends(name, dtype),
    }


@device_function
def _half_erfc(x, TYPE: tl.constexpr):
    """Return erfc(x / sqrt 2) / 2 for 0 <= x <= _ERFC_END, as 2 to the power of a polynomial."""
    if TYPE == tl.float32:
        q = -0.0008461498073302209 + x * (4.860665649175644e-05 + x * -1.0728321058195434e-06)
        q = -0.45873960852622986 + x * (-0.05356283113360405 + x * (0.008246500976383686 + x * q))
        q = -1.1511799097061157 + x * q
    else:
        q = -0.04890564829111099 + x * (0.005890191532671452 + x * -0.00031445620697923005)
        q = -0.46268001198768616 + x * q
        q = -1.150072455406189 + x * q
    return tl.exp2(-1.0 + x * q)


@device_function
def _expm1(z):
    # For z <= 0.
    series = z * (1.0 + z * (0.5 + z * (1.0 / 6 + z * (1.0 / 24 + z * (1.0 / 120)))))
    return tl.where(z > -0.1, series, tl.exp(z) - 1.0)


@device_function
def _log1p(x):
    # For 0 <= x < 2^30: u = 1 + x = 2^n (1 + m), log(1 + m) = 2 atanh(m / (2 + m)).
    u = 1.0 + x
    lost = (x - (u - 1.0)) / u
    bits = u.to(tl.int32, bitcast=True)
    n = (bits - 0x3F3504F3) >> 23
    m = (bits - (n << 23)).to(tl.float32, bitcast=True) - 1.0
    s = m / (2.0 + m)
    t = s * s
    series = 2.0 * s * (1.0 + t * (1.0 / 3 + t * (0.2 + t * (1.0 / 7 + t * (1.0 / 9)))))
    return n.to(tl.float32) * 0.6931471805599453 + (series + lost)


@device_function
def _tanh(z):
    t = z * z
    series = z * (1.0 + t * (-1.0 / 3 + t * (2.0 / 15 + t * (-17.0 / 315))))
    size = 1.0 - 2.0 / (tl.exp(2.0 * tl.abs(z)) + 1.0)
    return tl.where(tl.abs(z) < 0.1, series, tl.where(z > 0, size, -size))


@device_function
def rounded(x, TYPE: tl.constexpr):
    """Return finite float32 numbers rounded to a floating-point type, to nearest, ties to even."""
    if TYPE == tl.bfloat16:
        # By bits, because the interpreter would truncate.
        bits = x.to(tl.int32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        return (bits & -65536).to(tl.float32, bitcast=True)
    else:
        return x.to(TYPE).to(tl.float32)


@device_function
def _least(a, b):
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@device_function
def _most(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@device_function
def activate(z, slope, ACTIVATION: tl.constexpr, TYPE: tl.constexpr):
    """Return h = f(z), not rounded to TYPE, for float32 z; NaN of NaN, of infinite z anything."""
    if ACTIVATION == "identity":
        h = z
    elif ACTIVATION == "relu":
        h = _most(z, 0.0)
    elif ACTIVATION == "relu6":
        h = _least(_most(z, 0.0), 6.0)
    elif ACTIVATION == "hardtanh":
        h = _least(_most(z, -1.0), 1.0)
    elif ACTIVATION == "leaky_relu":
        h = tl.where(z > 0, z, z * slope)
    elif ACTIVATION == "elu" or ACTIVATION == "celu":
        h = tl.where(z > 0, z, _expm1(_least(z, 0.0)))
    elif ACTIVATION == "selu":
        below = 1.7580993408473766 * _expm1(_least(z, 0.0))
        h = tl.where(z > 0, 1.0507009873554805 * z, below)
        if TYPE == tl.float16:
            h = tl.where(h >= _FLOAT16_END, float("inf"), h)
        elif TYPE == tl.bfloat16:
            h = tl.where(h >= _BFLOAT16_END, float("inf"), h)
    elif ACTIVATION == "gelu":
        # z (1 + erf(z / sqrt 2)) / 2 is max(z, 0) - x erfc(x / sqrt 2) / 2 of x = abs(z), and the
        # second term is nothing beyond the end.
        x = _least(tl.abs(z), _ERFC_END)
        h = tl.maximum(z, 0.0) - x * _half_erfc(x, TYPE)
        h = tl.where(z <= _GELU_ZERO, -0.0, h)
    elif ACTIVATION == "gelu_tanh":
        inner = 0.7978845608028654 * (z + 0.044715 * z * z * z)
        h = tl.where(z <= _GELU_TANH_ZERO, -0.0, z / (1.0 + tl.exp(-2.0 * inner)))
    elif ACTIVATION == "quick_gelu":
        # Three operations of torch, each of which rounds.
        s = rounded(1.0 / (1.0 + tl.exp(-rounded(1.702 * z, TYPE))), TYPE)
        h = z * s
    elif ACTIVATION == "silu":
        h = z / (1.0 + tl.exp(-z))
    elif ACTIVATION == "mish":
        # tanh(log(1 + e)) = e (e + 2) / (e (e + 2) + 2)
        e = tl.exp(_least(z, 20.0))
        n = e * (e + 2.0)
        h = tl.where(z > 20.0, z, z * (n / (n + 2.0)))
    elif ACTIVATION == "softplus":
        h = tl.where(z > 20.0, z, _log1p(tl.exp(_least(z, 20.0))))
    elif ACTIVATION == "hardswish":
        h = z * _least(_most(z + 3.0, 0.0), 6.0) / 6.0
    elif ACTIVATION == "hardsigmoid":
        h = _least(_most(z + 3.0, 0.0), 6.0) / 6.0
    elif ACTIVATION == "sigmoid":
        h = 1.0 / (1.0 + tl.exp(-z))
    else:
        tl.static_assert(ACTIVATION == "tanh")
        h = _tanh(z)
    return h
