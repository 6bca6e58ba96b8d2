"""Shrink and perturb: every weight a little smaller and a little noisier."""

from collections.abc import Collection
from fnmatch import fnmatchcase

import torch
from torch import nn
from torch.optim import Optimizer

from fastplastic.errors import InputError, no_such
from fastplastic.model import check_built
from fastplastic.randomness import stream
from fastplastic.reinit.forget import forget
from fastplastic.reinit.optimizer_state import OptimizerState
from fastplastic.reinit.transaction import Undo


def shrink_perturb_(
    model: nn.Module,
    *,
    shrink: float = 0.6,
    noise: float = 0.01,
    exclude: Collection[str] = (),
    optimizer: Optimizer | None = None,
    seed: int = 0,
) -> None:
    """Set every parameter w to shrink * w + noise * e in place, with e from N(0, 1).

    Source: Ash and Adams, "On warm-starting neural network training", arXiv 1910.08475.

    Args:
        model: The model.
        shrink: Factor in [0, 1).
        noise: Standard deviation of what is added, 0 or more.
        exclude: Patterns (fnmatch) of the names of modules whose parameters stay, such as that of
            the head.
        optimizer: The optimizer that trains the model, if it has started: what it remembers of
            these parameters begins anew.
        seed: Any integer. The values depend on it, the parameter's name and the element alone.

    Raises:
        InputError: A number is out of range, a pattern matches no module, a parameter has no values
            yet, or the optimizer is not that of the model.
    """
    if not (0 <= shrink < 1 and noise >= 0):
        raise InputError(
            f"shrink {shrink}, noise {noise}: expected a factor from 0 to less than 1, and 0 or "
            "more: correct them"
        )
    check_built(model)
    state = None if optimizer is None else OptimizerState(optimizer, model)
    moved = _moved(model, exclude)
    with torch.no_grad():
        for name, parameter in moved.items():
            draws = stream(seed, "shrink and perturb", name).standard_normal(
                tuple(parameter.shape), dtype="float32"
            )
            added = torch.as_tensor(draws).to(parameter.device, parameter.dtype)
            parameter.mul_(shrink).add_(added, alpha=noise)
    if state is not None:
        forget(state, moved, Undo())


def _moved(model: nn.Module, exclude: Collection[str]) -> dict[str, nn.Parameter]:
    """Return the parameters that are not in modules of these patterns."""
    names = [name for name, _ in model.named_modules() if name]
    kept: tuple[str, ...] = ()
    for pattern in exclude:
        hits = [name for name in names if fnmatchcase(name, pattern)]
        if not hits:
            raise InputError(f"exclude: {no_such('module', pattern, names)}")
        kept += tuple(f"{name}." for name in hits)
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if not kept or not name.startswith(kept)
    }
