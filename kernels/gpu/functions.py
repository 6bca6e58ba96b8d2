"""Activation functions in float32 registers.

h = f(z) by the formulas of torch, so that h is 0 where the network's own h is: GELU where 1 + erf
rounds to 0, SiLU where exp(-z) overflows. Next to 0, where a difference would cancel, a series
keeps h different from 0. Absolute errors are below 5e-7 of max(1, |h|).
"""

import math

import numpy as np
import torch
import triton.language as tl

from fastplastic.kernels.activations import ACTIVATIONS, INFINITE_FROM
from fastplastic.kernels.gpu.runtime import device_function

# 1 + erf just above the end of the zeros, so that there are none beyond.
_LEAST_TAIL = tl.constexpr(2.0**-24)
_FLOAT16_END = tl.constexpr(INFINITE_FROM[torch.float16])
_BFLOAT16_END = tl.constexpr(INFINITE_FROM[torch.bfloat16])
_GELU_ZERO = tl.constexpr(ACTIVATIONS["gelu"].zero_below)
_GELU_TANH_ZERO = tl.constexpr(ACTIVATIONS["gelu_tanh"].zero_below)


def flat_ends(name: str) -> dict[str, float | None]:
    """Return the ends of where a function is flat, as float32 numbers inside the intervals.

    All are z <= FLAT_BELOW, FLAT_FROM <= z <= FLAT_TO, or z >= FLAT_ABOVE; None where there is no
    such interval.
    """
    ends: dict[str, float | None] = dict.fromkeys(
        ("FLAT_BELOW", "FLAT_FROM", "FLAT_TO", "FLAT_ABOVE")
    )
    for low, high in ACTIVATIONS[name].flat:
        if low == -math.inf:
            ends["FLAT_BELOW"] = _float32(high, up=False)
        elif high == math.inf:
            ends["FLAT_ABOVE"] = _float32(low, up=True)
        else:
            ends["FLAT_FROM"], ends["FLAT_TO"] = _float32(low, up=True), _float32(high, up=False)
    return ends


def _float32(number: float, up: bool) -> float:
    """Round to float32 in one direction."""
    nearest = np.float32(number)
    # Compared as float64: NumPy would round the other one to float32 too.
    if float(nearest) < number if up else float(nearest) > number:
        nearest = np.nextafter(nearest, np.float32(math.inf if up else -math.inf))
    return float(nearest)


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
def activate(z, slope, ACTIVATION: tl.constexpr, TYPE: tl.constexpr):
    """Return h = f(z), not rounded to TYPE, for float32 z that is finite; else anything."""
    if ACTIVATION == "identity":
        h = z
    elif ACTIVATION == "relu":
        h = tl.maximum(z, 0.0)
    elif ACTIVATION == "relu6":
        h = tl.minimum(tl.maximum(z, 0.0), 6.0)
    elif ACTIVATION == "hardtanh":
        h = tl.minimum(tl.maximum(z, -1.0), 1.0)
    elif ACTIVATION == "leaky_relu":
        h = tl.where(z > 0, z, z * slope)
    elif ACTIVATION == "elu" or ACTIVATION == "celu":
        h = tl.where(z > 0, z, _expm1(tl.minimum(z, 0.0)))
    elif ACTIVATION == "selu":
        below = 1.7580993408473766 * _expm1(tl.minimum(z, 0.0))
        h = tl.where(z > 0, 1.0507009873554805 * z, below)
        if TYPE == tl.float16:
            h = tl.where(h >= _FLOAT16_END, float("inf"), h)
        elif TYPE == tl.bfloat16:
            h = tl.where(h >= _BFLOAT16_END, float("inf"), h)
    elif ACTIVATION == "gelu":
        tail = tl.maximum(1.0 + tl.erf(z * 0.7071067811865476), _LEAST_TAIL)
        h = tl.where(z <= _GELU_ZERO, -0.0, 0.5 * z * tail)
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
        e = tl.exp(tl.minimum(z, 20.0))
        n = e * (e + 2.0)
        h = tl.where(z > 20.0, z, z * (n / (n + 2.0)))
    elif ACTIVATION == "softplus":
        h = tl.where(z > 20.0, z, _log1p(tl.exp(tl.minimum(z, 20.0))))
    elif ACTIVATION == "hardswish":
        h = z * tl.minimum(tl.maximum(z + 3.0, 0.0), 6.0) / 6.0
    elif ACTIVATION == "hardsigmoid":
        h = tl.minimum(tl.maximum(z + 3.0, 0.0), 6.0) / 6.0
    elif ACTIVATION == "sigmoid":
        h = 1.0 / (1.0 + tl.exp(-z))
    else:
        tl.static_assert(ACTIVATION == "tanh")
        h = _tanh(z)
    return h
