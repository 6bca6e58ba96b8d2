"""Tokens that are padding count in no statistic."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(eq=False)
class Tokens:
    """The tokens that are no padding.

    Attributes:
        shape: (batch, tokens).
        counted: bool [batch * tokens], which tokens count.
    """

    shape: torch.Size
    counted: Tensor

    @cached_property
    def positions(self) -> Tensor:
        """int64, of those that count; the host waits for a GPU when first asked."""
        return self.counted.nonzero().flatten()

    def fit(self, x: Tensor, axis: int) -> bool:
        """Tell whether x is [batch, tokens, channels] with these tokens."""
        return x.ndim == 3 and axis in (2, -1) and x.shape[:2] == self.shape


def padding_mask(model: nn.Module, kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return the mask of a call with these keyword arguments, [batch, tokens], if there is one."""
    mask = kwargs.get("attention_mask")
    # In an encoder-decoder the mask is for the encoder's tokens only.
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False) or not isinstance(mask, Tensor):
        return None
    return mask if mask.ndim == 2 else None


def tokens_of(mask: Tensor, *, wait: bool = True) -> Tokens | None:
    """Return the tokens that count by a mask, or None for all.

    Args:
        mask: [batch, tokens], 0 where a token is padding.
        wait: Whether to find out that all count, for which the host waits for a GPU.
    """
    tokens = Tokens(mask.shape, mask.flatten() != 0)
    return None if wait and tokens.positions.numel() == mask.numel() else tokens


def unpadded(x: Tensor, axis: int, tokens: Tokens | None) -> tuple[Tensor, int]:
    """Return x and its axis; [batch, tokens, channels] without padding is [positions, channels]."""
    if tokens is None or not tokens.fit(x, axis):
        return x, axis
    return x.flatten(0, 1).index_select(0, tokens.positions), 1
