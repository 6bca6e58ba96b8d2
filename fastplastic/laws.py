"""The law of a parameter: the distribution of its initial values, element by element.

A law is drawn row by row from streams keyed by (seed, parameter name, row), in float64 on the CPU:
the same row gets the same values whatever else is drawn, on every device.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fastplastic.randomness import keyed_generator

Step = tuple[str, tuple[float, ...]]


@dataclass(frozen=True)
class Law:
    """A source of numbers, and what is done to each of them.

    Attributes:
        source: "constant" (value), "uniform" (low, high), "normal" (mean, std) or
            "truncated normal" (mean, std, low, high).
        arguments: The numbers in parentheses.
        steps: Elementwise operations in order, named as in PyTorch: ("mul", (factor,)),
            ("div", (divisor,)), ("add", (summand,)), ("clamp", (low, high)), ("erfinv", ()).
    """

    source: Literal["constant", "uniform", "normal", "truncated normal"]
    arguments: tuple[float, ...]
    steps: tuple[Step, ...] = ()

    def then(self, operation: str, *arguments: float) -> "Law":
        """Return the law followed by one more elementwise operation."""
        return Law(self.source, self.arguments, (*self.steps, (operation, arguments)))


def draw(law: Law, seed: int, name: str, rows: Tensor, shape: Sequence[int]) -> Tensor:
    """Return fresh rows of a parameter, float64 [len(rows), *shape] on the CPU.

    Args:
        law: The law of every element.
        seed: Any integer.
        name: Name of the parameter.
        rows: int64, which rows of the parameter.
        shape: Shape of one row.
    """
    values = torch.empty(len(rows), *shape, dtype=torch.float64)
    for value, row in zip(values, rows.tolist(), strict=True):
        _fill(law, keyed_generator(seed, "initial values", name, row), value)
    for operation, arguments in law.steps:
        values = _apply(values, operation, arguments)
    return values


def _fill(law: Law, generator: np.random.Generator, value: Tensor) -> None:
    """Write the source's numbers into a contiguous float64 tensor."""
    if law.source == "constant":
        value.fill_(law.arguments[0])
        return
    numbers = value.numpy()
    if law.source == "uniform":
        low, high = law.arguments
        numbers[...] = generator.uniform(low, high, numbers.shape)
    elif law.source == "normal":
        mean, std = law.arguments
        numbers[...] = generator.normal(mean, std, numbers.shape)
    else:
        value.copy_(_truncated_normal(generator, value.shape, *law.arguments))


def _truncated_normal(
    generator: np.random.Generator,
    shape: Sequence[int],
    mean: float,
    std: float,
    low: float,
    high: float,
) -> Tensor:
    """Draw by the inverse of the normal distribution function, between its values at the ends."""
    ends = [_normal_cdf((end - mean) / std) for end in (low, high)]
    uniform = torch.from_numpy(generator.uniform(ends[0], ends[1], tuple(shape)))
    # At an end that rounds to 0 or 1 the inverse is infinite: the clamp brings it back.
    normal: Tensor = torch.special.ndtri(uniform)
    return (mean + std * normal).clamp(low, high)


def _normal_cdf(x: float) -> float:
    return math.erfc(-x / math.sqrt(2)) / 2


def _apply(values: Tensor, operation: str, arguments: tuple[float, ...]) -> Tensor:
    match operation:
        case "mul":
            return values.mul_(arguments[0])
        case "div":
            return values.div_(arguments[0])
        case "add":
            return values.add_(arguments[0])
        case "clamp":
            return values.clamp_(*arguments)
    assert operation == "erfinv", operation
    return values.erfinv_()
