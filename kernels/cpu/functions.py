"""Activation functions in float32, free of branches and calls, so that LLVM can vectorise them.

Each takes z and returns h = f(z). Absolute errors are below 2e-7 of max(1, |h|), that of GELU below
2e-6 (near z = -5, where it is 1.7e-6 itself) because its Phi is off by up to 4e-7. Next to 0, where
a difference would cancel, a series keeps h different from 0 wherever f is. Polynomials are summed
up as two halves: a processor works on both at once, while in Horner's form each step waits for the
one before.
"""

from typing import Any

import numpy as np

from fastplastic.kernels.cpu.compiling import inline

F = np.float32
_ZERO, _HALF, _ONE, _TWO = F(0), F(0.5), F(1), F(2)
# Where 2^n and all factors of e^x are normal float32 numbers.
_EXP_MAX, _EXP_MIN = F(88), F(-87)
_LOG2E = F(1.4426950408889634)
_LN2_HIGH, _LN2_LOW = F(0.693359375), F(-2.12194440e-4)
# exp on [-ln(2)/2, ln(2)/2]: minimax fit, error 2e-9.
_E2, _E3, _E4 = F(0.5000000168458113), F(0.16666415402296733), F(0.04166608348765379)
_E5, _E6 = F(0.008375135206447653), F(0.0013956062249004958)
# (Phi(z) - 1/2) / z as a polynomial in z^2 / 12.5 - 1 on |z| <= 5, Phi the normal distribution
# function: minimax fit, error 2e-7 in Phi.
_PHI = tuple(F(c) for c in (
    0.1413637881, -0.07029626368, 0.05152046834, -0.04044303642, 0.03144304301,
    -0.023265698, 0.01639729825, -0.01117245611, 0.006422399307, -0.002675997608,
    0.001709814352, -0.001617313063, 0.0006139280687,
))  # fmt: skip
_PHI_END, _PHI_SCALE = F(5), F(2 / 25)
_QUICK = F(1.702)
_SQRT_2_PI, _CUBIC = F(0.7978845608028654), F(0.044715)
_SELU_SCALE, _SELU_ALPHA = F(1.0507009873554805), F(1.0507009873554805 * 1.6732632423543772)
_NEAR = F(0.1)


@inline
def exp(x: Any) -> Any:
    """Return e^x, that of the ends below -87 and above 88."""
    y = max(min(x, _EXP_MAX), _EXP_MIN)
    n = np.floor(y * _LOG2E + _HALF)
    r = (y - n * _LN2_HIGH) - n * _LN2_LOW
    s = r * r
    p = ((_E6 * s + (_E5 * r + _E4)) * s + (_E3 * r + _E2)) * s + (r + _ONE)
    return p * np.int32(np.int32(np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)


@inline
def normal_cdf(z: Any) -> Any:
    """Return Phi(z) = (1 + erf(z / sqrt(2))) / 2, that of 5 above 5."""
    y = max(min(z, _PHI_END), -_PHI_END)
    t = y * y * _PHI_SCALE - _ONE
    s = t * t
    even = ((_PHI[12] * s + _PHI[10]) * s + _PHI[8]) * s + _PHI[6]
    odd = ((_PHI[11] * s + _PHI[9]) * s + _PHI[7]) * s + _PHI[5]
    even = ((even * s + _PHI[4]) * s + _PHI[2]) * s + _PHI[0]
    odd = (odd * s + _PHI[3]) * s + _PHI[1]
    return y * (odd * t + even) + _HALF


@inline
def expm1(x: Any) -> Any:
    """Return e^x - 1 for x <= 0."""
    series = x * (_ONE + x * (_HALF + x * (F(1 / 6) + x * (F(1 / 24) + x * F(1 / 120)))))
    return series if x > -_NEAR else exp(x) - _ONE


@inline
def log1p(x: Any) -> Any:
    """Return log(1 + x) for 0 <= x < 2^30."""
    # log(u) with u = 1 + x, by exponent and mantissa in [sqrt(1/2), sqrt(2)); x - (u - 1) was lost.
    u = _ONE + x
    lost = x - (u - _ONE)
    bits = F(u).view(np.int32)
    n = np.int32(np.int32(bits - np.int32(0x3F3504F3)) >> np.int32(23))
    m = np.int32(bits - np.int32(n << np.int32(23))).view(np.float32) - _ONE
    # log(1 + m) = 2 atanh(m / (2 + m)).
    s = m / (_TWO + m)
    t = s * s
    series = _TWO * s * (_ONE + t * (F(1 / 3) + t * (F(0.2) + t * (F(1 / 7) + t * F(1 / 9)))))
    return F(n) * _LN2_HIGH + (F(n) * _LN2_LOW + series + lost / u)


@inline
def identity(z: Any, slope: Any) -> Any:
    return z


@inline
def relu(z: Any, slope: Any) -> Any:
    return z if z > _ZERO else _ZERO


@inline
def relu6(z: Any, slope: Any) -> Any:
    return min(max(z, _ZERO), F(6))


@inline
def hardtanh(z: Any, slope: Any) -> Any:
    return min(max(z, -_ONE), _ONE)


@inline
def leaky_relu(z: Any, slope: Any) -> Any:
    return z if z > _ZERO else z * slope


@inline
def elu(z: Any, slope: Any) -> Any:
    return z if z > _ZERO else expm1(min(z, _ZERO))


# With an alpha of 1 both are the same function.
celu = elu


@inline
def selu(z: Any, slope: Any) -> Any:
    return _SELU_SCALE * z if z > _ZERO else _SELU_ALPHA * expm1(min(z, _ZERO))


@inline
def gelu(z: Any, slope: Any) -> Any:
    return z * normal_cdf(z)


@inline
def gelu_tanh(z: Any, slope: Any) -> Any:
    inner = _SQRT_2_PI * (z + _CUBIC * z * z * z)
    return z / (_ONE + exp(-_TWO * inner))


@inline
def quick_gelu(z: Any, slope: Any) -> Any:
    return z / (_ONE + exp(-_QUICK * z))


@inline
def silu(z: Any, slope: Any) -> Any:
    return z / (_ONE + exp(-z))


@inline
def mish(z: Any, slope: Any) -> Any:
    # tanh(log(1 + e)) = e (e + 2) / (e (e + 2) + 2)
    e = exp(min(z, F(20)))
    n = e * (e + _TWO)
    return z if z > F(20) else z * (n / (n + _TWO))


@inline
def softplus(z: Any, slope: Any) -> Any:
    return z if z > F(20) else log1p(exp(min(z, F(20))))


@inline
def hardswish(z: Any, slope: Any) -> Any:
    return z * min(max(z + F(3), _ZERO), F(6)) / F(6)


@inline
def hardsigmoid(z: Any, slope: Any) -> Any:
    return min(max(z + F(3), _ZERO), F(6)) / F(6)


@inline
def sigmoid(z: Any, slope: Any) -> Any:
    return _ONE / (_ONE + exp(-z))


@inline
def tanh(z: Any, slope: Any) -> Any:
    t = z * z
    series = z * (_ONE + t * (F(-1 / 3) + t * (F(2 / 15) + t * F(-17 / 315))))
    size = _ONE - _TWO / (exp(_TWO * abs(z)) + _ONE)
    whole = size if z > _ZERO else -size
    return series if abs(z) < _NEAR else whole
