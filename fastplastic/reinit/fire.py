"""FIRE: move whole weight matrices to the nearest orthogonal one."""

import math
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastplastic.errors import InputError, no_such
from fastplastic.model import check_built
from fastplastic.reinit.averages import refuse_average
from fastplastic.reinit.forget import forget
from fastplastic.reinit.optimizer_state import OptimizerState
from fastplastic.reinit.regions import Tensors
from fastplastic.reinit.report import Written
from fastplastic.reinit.transaction import Undo
from fastplastic.wiring import is_conv1d

# Layers that hold query, key and value in one weight, in the libraries that have them.
_FUSED = ("qkv", "c_attn", "Wqkv", "query_key_value")


def fire_(
    model: nn.Module,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    iterations: int = 10,
    optimizer: Optimizer | None = None,
) -> tuple[Written, ...]:
    """Move the weights of linear layers and convolutions in place to the nearest orthogonal matrix.

    W becomes sqrt(d_out / d_in) / k times its polar factor W (W^T W)^(-1/2), approximated by
    Newton-Schulz iterations X <- 1.5 X - 0.5 X X^T X from W / norm(W); of a convolution, each of
    the k positions of the kernel on its own. All singular values become about the same, which
    restores plasticity, at the smallest change of the weights. Between two tasks or phases, not
    step by step. Query, key and value in one weight are moved one by one; biases and norms stay.

    Source: FIRE, Han et al., arXiv 2602.08040 (ICLR 2026), and the code of its authors, which moves
    all linear layers and convolutions, and of a ViT the queries and keys alone (pass them as
    `include`).

    Args:
        model: The model.
        include: Patterns (fnmatch) of layer names; empty for all.
        exclude: Patterns of layer names whose weights stay, such as that of a new head.
        iterations: How many, 1 or more. Singular values that are small beside the norm of the
            matrix need more of them.
        optimizer: The optimizer that trains the model, if it has started: what it remembers of
            these weights begins anew.

    Returns:
        What was written. Grouped convolutions are not among it: they hold no matrix of which this
        is known to help.

    Raises:
        InputError: A pattern matches nothing, no weight is left, one is not finite, zero, shared or
            not floating-point; `iterations` is less than 1; the optimizer is not that of the model.
    """
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1:
        raise InputError(f"iterations is {iterations!r}, expected an integer of at least 1")
    check_built(model)
    refuse_average(model)
    layers = dict(_layers(model))
    names = _chosen(layers, include, exclude)
    tensors = Tensors(model)
    weights = {f"{name}.weight": tensors[f"{name}.weight"].detach() for name in names}
    # All that can fail is computed before anything is written.
    moved = {
        f"{name}.weight": _isometric(name, layers[name], weights[f"{name}.weight"], iterations)
        for name in names
    }
    state = None if optimizer is None else OptimizerState(optimizer, model)
    undo = Undo()
    try:
        with torch.no_grad():
            for name, weight in weights.items():
                undo.keep(partial(weight.copy_, weight.clone()))
                weight.copy_(moved[name])
            if state is not None:
                forget(state, weights, undo)
    except BaseException:  # also KeyboardInterrupt and MemoryError
        undo()
        raise
    return tuple(
        Written(name, "parameter", weight.numel(), weight.numel())
        for name, weight in weights.items()
    )


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        linear = isinstance(module, nn.Linear) or is_conv1d(module)
        conv = isinstance(module, nn.modules.conv._ConvNd) and module.groups == 1
        if (linear or conv) and isinstance(getattr(module, "weight", None), nn.Parameter):
            yield name, module


def _chosen(
    layers: dict[str, nn.Module], include: Sequence[str], exclude: Sequence[str]
) -> list[str]:
    for option, patterns in (("include", include), ("exclude", exclude)):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in layers):
                raise InputError(f"{option}: {no_such('layer', pattern, layers)}")
    wanted = include or ["*"]
    names = [
        name
        for name in layers
        if any(fnmatchcase(name, pattern) for pattern in wanted)
        and not any(fnmatchcase(name, pattern) for pattern in exclude)
    ]
    if not names:
        raise InputError("no linear layer or convolution is left, expected at least one")
    return names


def _isometric(name: str, module: nn.Module, weight: Tensor, iterations: int) -> Tensor:
    """Return the weight of a layer, moved."""
    if not bool(weight.isfinite().all()):
        raise InputError(f"{name}.weight is NaN or infinite, expected numbers: mend or exclude it")
    if not bool(weight.any()):
        raise InputError(
            f"{name}.weight is 0 throughout, which no orthogonal matrix is near to: exclude it"
        )
    out_first = not (is_conv1d(module) or getattr(module, "transposed", False))
    matrix = weight if out_first else weight.transpose(0, 1)
    # [positions of the kernel, out, in]
    stacked = matrix.flatten(2).permute(2, 0, 1) if matrix.dim() > 2 else matrix[None]
    positions, rows = stacked.shape[:2]
    fused = name.rpartition(".")[2] in _FUSED and rows % 3 == 0
    parts = stacked.float().chunk(3, dim=1) if fused else (stacked.float(),)
    done = torch.cat([_polar(part, iterations) / positions for part in parts], dim=1)
    result = done.permute(1, 2, 0).reshape(matrix.shape) if matrix.dim() > 2 else done[0]
    return (result if out_first else result.transpose(0, 1)).to(weight.dtype)


def _polar(matrices: Tensor, iterations: int) -> Tensor:
    """Return sqrt(d_out / d_in) times the polar factors of [n, d_out, d_in], approximately."""
    wide = matrices.shape[2] > matrices.shape[1]
    x = matrices.mT if wide else matrices
    # A position that is 0 throughout stays so.
    x = x / x.flatten(1).norm(dim=1).clamp(min=torch.finfo(x.dtype).tiny)[:, None, None]
    for _ in range(iterations):
        x = 1.5 * x - 0.5 * x @ (x.mT @ x)
    scale = math.sqrt(matrices.shape[1] / matrices.shape[2])
    return torch.mul(x.mT if wide else x, scale)
