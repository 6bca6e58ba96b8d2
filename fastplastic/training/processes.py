"""What several processes that train one model must have in common."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fastplastic.errors import InputError
from fastplastic.model import is_spread, local_of, part_of
from fastplastic.processes import Processes

# Gradients that were reduced are the same bits; those of different batches are not that close.
_SAME = 1e-6


def gradient_norm(model: nn.Module, together: Processes | None) -> float | None:
    """Return the norm of the gradients of all parameters, in each process the same.

    Args:
        model: The model.
        together: The processes that share it; None where this is the only one.

    Returns:
        None where no parameter has a gradient.

    Raises:
        InputError: Parameters that all have whole have other gradients in another process.
    """
    whole, parts = [], []
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        if gradient is not None and not is_spread(parameter):
            whole.append(gradient)
        elif gradient is not None and part_of(name, parameter).first:
            parts.append(local_of(gradient))
    own, rest, some = _norm(whole), _norm(parts), bool(whole or parts)
    if together is not None:
        said = together.share((own, rest, some))
        _check_same([norm for norm, _, _ in said])
        rest = math.hypot(*(norm for _, norm, _ in said))
        some = any(one for _, _, one in said)
    return math.hypot(own, rest) if some else None


def _norm(gradients: Iterable[Tensor]) -> float:
    return float(torch.nn.utils.get_total_norm(list(gradients)))


def _check_same(norms: list[float]) -> None:
    for rank, norm in enumerate(norms):
        first = norms[0]
        # Of such as are not finite another check says so.
        if math.isfinite(norm - first) and abs(norm - first) > _SAME * abs(first):
            raise InputError(
                f"the gradients have a norm of {norm:.6g} in process {rank} and {first:.6g} in "
                "process 0, expected the same in all, as of DistributedDataParallel(model): train "
                "with that, or let each choose by itself within fastplastic.alone()"
            )
