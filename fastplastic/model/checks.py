"""What is asked of a model: whether it has values, what it is made of, and in which mode it is."""

import hashlib
import sys
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy

from fastplastic.errors import InputError
from fastplastic.model.spread import is_spread

# Integers that take as many bytes.
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def check_built(model: nn.Module, *, spread: bool = False) -> None:
    """Refuse a model with a parameter or buffer that has no values yet.

    Args:
        model: The model.
        spread: Whether its parameters may be spread over processes.

    Raises:
        InputError: Names the first such tensor and says what to do.
    """
    tensors = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    for name, tensor in tensors:
        if is_lazy(tensor):
            raise InputError(
                f"{name!r} is not built yet, expected a built model: run one forward pass first"
            )
        if tensor.is_meta:
            raise InputError(
                f"{name!r} is on the meta device, expected real values: load the weights first"
            )
        if is_spread(tensor) and not spread:
            raise InputError(
                f"{name!r} is spread over processes (a DTensor, as of fully_shard or "
                "parallelize_module), expected a whole tensor in each: call this before the model "
                "is spread"
            )


def check_unwrapped(model: nn.Module, what: str) -> None:
    """Refuse what torch wraps around a model: its calls are not those of the model.

    Args:
        model: The model.
        what: What it was passed to, as in `Monitor(model.module)`.

    Raises:
        InputError: Says what to pass.
    """
    own = getattr(model, "_orig_mod", model)
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None and any(
        isinstance(m, fsdp.FullyShardedDataParallel) for m in own.modules()
    ):
        raise InputError(
            "the model is in a FullyShardedDataParallel, which joins weights of all layers to flat "
            "ones, expected one spread by torch.distributed.fsdp.fully_shard (FSDP2)"
        )
    if isinstance(own, (DataParallel, DistributedDataParallel)):
        raise InputError(
            f"the model is wrapped in a {type(own).__name__}, expected the module inside: "
            f"{what}(model.module)"
        )


def nonfinite_tensors(model: nn.Module) -> tuple[str, ...]:
    """Return the names of parameters and buffers that hold NaN or infinity.

    An infinity in a buffer counts in running statistics only: attention masks are made of it.
    """
    found = []
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not tensor.is_floating_point():
            continue
        parameter = isinstance(tensor, nn.Parameter)
        strict = parameter or name.endswith(("running_mean", "running_var"))
        if not bool(tensor.isfinite().all() if strict else not tensor.isnan().any()):
            found.append(name)
    return tuple(found)


def fingerprint(model: nn.Module) -> str:
    """Return a name for the model's structure: the sha256 of its parameters' names, shapes, dtypes.

    Values do not count: a model keeps its fingerprint while it is trained. Buffers do not count.

    Returns:
        64 hexadecimal digits.
    """
    lines = sorted(
        f"{name} {tuple(parameter.shape)} {parameter.dtype}"
        for name, parameter in model.named_parameters()
    )
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def digest_of_copies(model: nn.Module) -> str:
    """Return a short name for the values of the parameters that this process has whole.

    Made of sums of their bits, which are the same in any order and on any device. Buffers do not
    count: statistics of norms differ between processes that train together.
    """
    sums = []
    for name, parameter in model.named_parameters():
        if not is_spread(parameter):
            bits = parameter.detach().view(_BITS.get(parameter.element_size(), torch.uint8))
            sums.append(f"{name} {int(bits.sum(dtype=torch.int64))}")
    return hashlib.sha256("\n".join(sums).encode()).hexdigest()[:12]


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the first parameter; InputError when there is none."""
    for parameter in model.parameters():
        return parameter.device
    raise InputError("the model has no parameters, expected weight layers: nothing to profile")


def dtype_of(model: nn.Module) -> str:
    """Return the name of the type of the first floating-point parameter."""
    types = (p.dtype for p in model.parameters() if p.is_floating_point())
    return str(next(types, torch.float32)).removeprefix("torch.")


def mode_of(model: nn.Module) -> str:
    """Return "train", "eval", or "mixed" when modules differ."""
    flags = {module.training for module in model.modules()}
    return "mixed" if len(flags) > 1 else "train" if flags == {True} else "eval"
