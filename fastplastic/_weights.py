"""The weights of a model as a profile keeps them: not copied, and seen to be as they were."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from fastplastic.errors import InputError

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Weights(Mapping[str, Tensor]):
    """{name: tensor}, the tensors themselves and a sum over the bits of each.

    Args:
        tensors: What to keep; no copies are made.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = {name: tensor.detach() for name, tensor in tensors.items()}
        self._sums = {name: _sum_of_bits(tensor) for name, tensor in self._tensors.items()}

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def without(self, prefixes: tuple[str, ...]) -> "Weights":
        """Return the weights whose names do not begin so."""
        kept = [name for name in self if not name.startswith(prefixes)]
        return Weights({name: self._tensors[name] for name in kept})

    def check(self) -> None:
        """Refuse weights that are not as they were when they were profiled.

        Raises:
            InputError: One has changed since.
        """
        for name, tensor in self._tensors.items():
            if _sum_of_bits(tensor) != self._sums[name]:
                raise InputError(
                    f"{name!r} has changed since it was profiled, expected the weights that the "
                    "gradients are of: profile the model again"
                )


def weights_of(model: nn.Module) -> Weights:
    """Return the floating-point parameters of a model that have one name."""
    names: dict[int, list[str]] = {}
    tensors: dict[int, Tensor] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.dtype in DTYPES and parameter.numel():
            names.setdefault(parameter.data_ptr(), []).append(name)
            tensors[parameter.data_ptr()] = parameter
    return Weights({own[0]: tensors[key] for key, own in names.items() if len(own) == 1})


def _sum_of_bits(tensor: Tensor) -> int:
    """Return the sum of the bit patterns, which any one change changes; it wraps around."""
    if tensor.element_size() == 2:
        return int(tensor.view(torch.int16).sum(dtype=torch.int64))
    integer = torch.int32 if tensor.element_size() == 4 else torch.int64
    return int(tensor.view(integer).sum(dtype=integer))
