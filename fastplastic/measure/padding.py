"""Tokens that are padding count in no statistic."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Tokens:
    """The tokens that are no padding.

    Attributes:
        shape: (batch, tokens).
        positions: int64, of those that count, with batch and tokens as one dimension.
    """

    shape: torch.Size
    positions: Tensor


def padding_mask(model: nn.Module, kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return the mask of a call with these keyword arguments, [batch, tokens], if there is one."""
    mask = kwargs.get("attention_mask")
    # In an encoder-decoder the mask is for the encoder's tokens only.
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False) or not isinstance(mask, Tensor):
        return None
    return mask if mask.ndim == 2 else None


def tokens_of(mask: Tensor) -> Tokens | None:
    """Return the tokens that count by a mask, or None for all."""
    # Here the host waits for a GPU, once in a step.
    positions = mask.flatten().nonzero().flatten()
    return None if positions.numel() == mask.numel() else Tokens(mask.shape, positions)


def unpadded(x: Tensor, axis: int, tokens: Tokens | None) -> tuple[Tensor, int]:
    """Return x and its axis; [batch, tokens, channels] without padding is [positions, channels]."""
    if tokens is None or x.ndim != 3 or axis not in (2, -1) or x.shape[:2] != tokens.shape:
        return x, axis
    return x.flatten(0, 1).index_select(0, tokens.positions), 1
