"""Shrink and perturb: every weight a little smaller and a little noisier."""

from collections.abc import Collection

import torch
from torch import nn

from fastplastic.errors import InputError
from fastplastic.model import check_built
from fastplastic.randomness import stream


def shrink_perturb_(
    model: nn.Module,
    *,
    shrink: float = 0.6,
    noise: float = 0.01,
    exclude: Collection[str] = (),
    seed: int = 0,
) -> None:
    """Set every parameter w to shrink * w + noise * e in place, with e from N(0, 1).

    Source: Ash and Adams, "On warm-starting neural network training", arXiv 1910.08475.

    Args:
        model: The model.
        shrink: Factor in [0, 1).
        noise: Standard deviation of what is added, 0 or more.
        exclude: Names of modules whose parameters stay, such as that of the head.
        seed: Any integer. The values depend on it, the parameter's name and the element alone.

    Raises:
        InputError: A number is out of range, or a parameter has no values yet.
    """
    if not (0 <= shrink < 1 and noise >= 0):
        raise InputError(
            f"shrink {shrink}, noise {noise}: expected a factor from 0 to less than 1, and 0 or "
            "more: correct them"
        )
    check_built(model)
    kept = tuple(f"{name}." for name in exclude)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(kept) and kept:
                continue
            draws = stream(seed, "shrink and perturb", name).standard_normal(
                tuple(parameter.shape), dtype="float32"
            )
            added = torch.as_tensor(draws).to(parameter.device, parameter.dtype)
            parameter.mul_(shrink).add_(added, alpha=noise)
