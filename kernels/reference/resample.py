"""Fresh initial values by NumPy, one float32 operation at a time: the oracle of every backend.

The formulas, operation by operation, are in `law.py`; the words in `philox.py`.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastplastic.kernels.checks import check_resample
from fastplastic.kernels.law import CENTRE, LEAST, LOG, LOG_HIGH, LOG_LOW, SQRT_2, TAIL, Law
from fastplastic.kernels.philox import INITIAL_VALUES, philox_key
from fastplastic.kernels.reference.select import elements_of, philox_words
from fastplastic.kernels.shards import Shards

Floats = NDArray[np.float32]


def resample_(
    weights: Sequence[Tensor],
    names: Sequence[str],
    laws: Sequence[Law],
    *,
    seed: int = 0,
    masks: Sequence[Tensor | None] | None = None,
    shards: Shards = None,
) -> None:
    """Write fresh initial values into the selected elements; see `fastplastic.kernels`."""
    check_resample(weights, names, laws, masks, shards)
    for i, (weight, name, law) in enumerate(zip(weights, names, laws, strict=True)):
        key = philox_key(seed, INITIAL_VALUES, name)
        element = elements_of(weight, None if shards is None else shards[i])
        fresh = torch.from_numpy(_values(law, philox_words(key, element)))
        fresh = fresh.reshape(weight.shape).to(weight)
        mask = None if masks is None else masks[i]
        with torch.no_grad():
            weight.copy_(fresh if mask is None else torch.where(mask, fresh, weight))


def _values(law: Law, words: NDArray[np.uint32]) -> Floats:
    location, scale, p_low, p_width, low, high = np.array(law.numbers, dtype=np.float32)
    p = ((words >> np.uint32(9)).astype(np.float32) + np.float32(0.5)) * np.float32(2**-23)
    if (p_low, p_width) != (0, 1):
        p = p_low + p * p_width
    s = p
    if law.kind == "normal":
        s = np.float32(SQRT_2) * _erfinv(np.float32(2) * p - np.float32(1))
    value = location + scale * s
    value = np.where(value < low, low, value)
    result: Floats = np.where(value > high, high, value)
    return result


def _erfinv(x: Floats) -> Floats:
    one = np.float32(1)
    w = -_log(np.maximum((one - x) * (one + x), np.float32(LEAST)))
    centre = _polynomial(CENTRE, w - np.float32(2.5))
    tail = _polynomial(TAIL, np.sqrt(w) - np.float32(3))
    return np.where(w < np.float32(5), centre, tail) * x


def _log(a: Floats) -> Floats:
    bits = a.view(np.int32)
    exponent = (bits >> 23) - 127
    m = ((bits & 0x7FFFFF) | 0x3F800000).view(np.float32)
    large = m > np.float32(SQRT_2)
    m = np.where(large, m * np.float32(0.5), m)
    e = (exponent + large).astype(np.float32)
    f = m - np.float32(1)
    z = f * f
    y = f * z * _polynomial(LOG, f)
    y = y + np.float32(LOG_LOW) * e
    y = y - np.float32(0.5) * z
    return (f + y) + np.float32(LOG_HIGH) * e


def _polynomial(coefficients: Sequence[float], x: Floats) -> Floats:
    total = np.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        total = total * x + np.float32(coefficient)
    return total
