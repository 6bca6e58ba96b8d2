"""Models without values: names, shapes and dtypes of all tensors, in no memory."""

import copy

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fastplastic.errors import InputError
from fastplastic.model.spread import is_spread


def stand_in(tensor: Tensor) -> Tensor:
    """Return a tensor of the same shape and dtype on the CPU, which has one element in memory."""
    if not tensor.numel():
        return torch.empty(tensor.shape, dtype=tensor.dtype)
    return torch.zeros([1] * tensor.dim(), dtype=tensor.dtype).expand(tensor.shape)


def outline(model: nn.Module) -> nn.Module:
    """Return a copy of a model whose parameters and buffers are stand-ins; tied ones stay so.

    Args:
        model: The model; it may be on the meta device.

    Raises:
        InputError: A tensor has no shape yet, or is spread over processes.
    """
    memo: dict[int, object] = {}
    parameters = list(model.named_parameters(remove_duplicate=False))
    for name, tensor in (*parameters, *model.named_buffers(remove_duplicate=False)):
        if is_lazy(tensor):
            raise InputError(
                f"{name!r} is not built yet, expected a built model: run one forward pass first"
            )
        if is_spread(tensor):
            raise InputError(
                f"{name!r} is spread over processes, expected a whole model: make one by itself, "
                "under torch.device('meta'), which takes no memory"
            )
        if id(tensor) not in memo:
            made = stand_in(tensor.detach())
            if isinstance(tensor, nn.Parameter):
                made = nn.Parameter(made, requires_grad=tensor.requires_grad)
            memo[id(tensor)] = made
    return copy.deepcopy(model, memo)
