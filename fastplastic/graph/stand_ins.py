"""Models whose parameters are spread over processes, traced as if each process had all of them.

FSDP2 and tensor parallelism leave a part of each parameter in a module (a DTensor), and gather or
exchange what is missing in hooks. The wiring is that of the whole parameters, of which no values
are needed: while a model is traced, fake tensors of their shapes stand in for them, and those hooks
are gone.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from fastplastic.model import is_spread

# Of the hooks of a module, those that run before, after or around its forward function.
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
_FLAGS = ("_with_kwargs", "_always_called")


def lend_stand_ins(model: nn.Module, inputs: Any) -> Any:
    """Put fake tensors in place of spread parameters, and take off the hooks that gather them.

    Whoever calls puts the attributes of all modules back (`attributes_kept`). A model that is not
    spread is left alone.

    Args:
        model: The model.
        inputs: What it is to be traced with.

    Returns:
        The inputs, as fake tensors too where the parameters are.
    """
    if not any(map(is_spread, model.parameters())):
        return inputs
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode = FakeTensorMode()
    for module in model.modules():
        _take_off_hooks(module)
        for name, parameter in module._parameters.items():
            if parameter is not None and is_spread(parameter):
                with mode:
                    module._parameters[name] = _stand_in(parameter)
    return tree_map_only(Tensor, mode.from_tensor, inputs)


def _stand_in(parameter: nn.Parameter) -> nn.Parameter:
    values = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
    return nn.Parameter(values, requires_grad=parameter.requires_grad)


def _take_off_hooks(module: nn.Module) -> None:
    """Take off the hooks of torch.distributed alone: others may belong to the forward pass."""
    for kind in _HOOKS:
        hooks = getattr(module, kind)
        for key in [key for key, hook in hooks.items() if _of_distributed(hook)]:
            del hooks[key]
            for flag in _FLAGS:
                getattr(module, kind + flag, {}).pop(key, None)


def _of_distributed(hook: Callable[..., Any]) -> bool:
    while isinstance(hook, partial):
        hook = hook.func
    return str(getattr(hook, "__module__", "")).startswith("torch.distributed.")
