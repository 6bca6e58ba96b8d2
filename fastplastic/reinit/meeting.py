"""What has to be the same in all processes before they re-initialise a model together."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor, nn

from fastplastic.errors import InputError
from fastplastic.model import fingerprint, gathered_by_fsdp, is_spread, part_of
from fastplastic.planning import Plan
from fastplastic.processes import Processes

# Shown of a digest.
_DIGITS = 12


def facts_of(model: nn.Module, plan: Plan, options: Mapping[str, Any]) -> dict[str, str]:
    """Return what has to be the same in all processes: names and values.

    Args:
        model: The model.
        plan: The plan; of weights that are spread each process has a mask of its own.
        options: The other arguments of `reinit_`.
    """
    placed = [
        (name, str(tensor.placements), str(tensor.device_mesh.shape))
        for name, tensor in _spread(model)
    ]
    parts = {name for name, *_ in placed}
    own = {item.name: getattr(plan, item.name) for item in fields(plan) if item.name != "parts"}
    own["masks"] = {name: mask for name, mask in plan.masks.items() if name not in parts}
    return {
        "the model": fingerprint(model)[:_DIGITS],
        "how its weights are spread": digest(placed) if placed else "not at all",
        "the plan": digest(own),
        **{name: _shown(value) for name, value in options.items()},
    }


def check_batches_together(
    model: nn.Module, together: Processes | None, *, looks_inside: bool
) -> None:
    """Refuse batches that a model in parts cannot be run on, or not be watched on.

    Args:
        model: The model.
        together: The processes; None where this one works alone.
        looks_inside: Whether more is asked for than the loss.

    Raises:
        InputError: Says which weight, and the way out.
    """
    gathered = gathered_by_fsdp(model)
    for name, tensor in _spread(model):
        if together is None and part_of(name, tensor).cut:
            raise InputError(
                f"{name!r} is cut over processes, and one alone cannot run the model on batches: "
                "call this in all of them, not in `with alone()`, or leave out batches"
            )
        cuts = sum(placement.is_shard() for placement in tensor.placements)
        if looks_inside and (id(tensor) not in gathered or cuts > 1):
            raise InputError(
                f"{name!r} is placed as {tuple(map(str, tensor.placements))}, and with tensor "
                "parallelism each process sees a part of what it is multiplied with: leave out "
                "recalibrate, and pass mean activations as compensate"
            )


def digest(value: Any) -> str:
    """Return a short name of what values hold, the same in all processes.

    Args:
        value: Numbers, texts, tensors, dataclasses, and mappings and sequences of them.
    """
    told = sha256()
    _tell(told, value)
    return told.hexdigest()[:_DIGITS]


def _tell(told: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        values = value.detach().cpu().contiguous()
        told.update(f"{values.dtype} {tuple(values.shape)}".encode())
        told.update(values.view(-1).view(torch.uint8).numpy().tobytes())
    elif is_dataclass(value):
        _tell(told, [(item.name, getattr(value, item.name)) for item in fields(value)])
    elif isinstance(value, Mapping):
        _tell(told, sorted(value.items(), key=lambda item: str(item[0])))
    elif isinstance(value, Iterable) and not isinstance(value, str):
        items = sorted(value) if isinstance(value, set | frozenset) else list(value)
        told.update(f"{len(items)} ".encode())
        for item in items:
            _tell(told, item)
    else:
        told.update(f"{value!r};".encode())


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return digest(value)
    simple = value is None or isinstance(value, str | int | float)
    return str(value) if simple else f"given ({type(value).__name__})"


def _spread(model: nn.Module) -> Sequence[tuple[str, Any]]:
    named = model.named_parameters(remove_duplicate=False)
    return [(name, tensor) for name, tensor in named if is_spread(tensor)]
