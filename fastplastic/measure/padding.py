"""Tokens that are padding count in no statistic."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Tokens:
    """The tokens that are no padding.

    Attributes:
        shape: (batch, tokens).
        positions: int64, of those that count, with batch and tokens as one dimension.
    """

    shape: torch.Size
    positions: Tensor


def unpadded(x: Tensor, axis: int, tokens: Tokens | None) -> tuple[Tensor, int]:
    """Return x and its axis; [batch, tokens, channels] without padding is [positions, channels]."""
    if tokens is None or x.ndim != 3 or axis not in (2, -1) or x.shape[:2] != tokens.shape:
        return x, axis
    return x.flatten(0, 1).index_select(0, tokens.positions), 1
