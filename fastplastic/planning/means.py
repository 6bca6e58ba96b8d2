"""Means of scores that are exact: the same whatever the order, the device and who holds them."""

import torch
from torch import Tensor

# A float32 is a 24-bit number times a power of two, of which there are 255; the last is infinity.
_POWERS = 255
_CHUNK = 1 << 20


def sums_of(scores: Tensor) -> Tensor:
    """Return what `mean_of` reads of scores, int64 [256]; tables of parts of scores add up.

    Args:
        scores: float32, 0 or more; what is not finite is left out.

    Returns:
        The sum of the 24-bit numbers for each power of two, then how many scores are finite.
    """
    sums = torch.zeros(_POWERS + 1, dtype=torch.int64, device=scores.device)
    whole = scores.flatten().view(torch.int32)
    for begin in range(0, len(whole), _CHUNK):
        bits = whole[begin : begin + _CHUNK]
        powers = (bits >> 23) & _POWERS
        numbers = (bits & 0x7FFFFF) | ((powers > 0).int() << 23)
        sums.index_add_(0, powers, numbers.long())
    sums[_POWERS] = scores.isfinite().sum()
    return sums


def mean_of(sums: Tensor) -> float:
    """Return the mean of scores, rounded once; NaN, which nothing is below, without any."""
    *numbers, count = sums.tolist()
    # Numbers with the lowest two powers are multiples of the same.
    total = sum(number << max(power, 1) - 1 for power, number in enumerate(numbers))
    return total / count * 2.0**-149 if count else float("nan")
