"""Models that have no values yet: lazy ones before a forward pass, and those on the meta device."""

from torch import nn
from torch.nn.parameter import is_lazy

from fastplastic.errors import InputError


def check_built(model: nn.Module) -> None:
    """Refuse a model with a parameter or buffer that has no values yet.

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
