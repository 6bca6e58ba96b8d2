"""Copies of a model (a target network, a moving average) that are re-initialised along with it."""

from collections.abc import Collection, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from fastplastic.errors import InputError
from fastplastic.model import local_of, part_of
from fastplastic.reinit.places import Where, shift_within
from fastplastic.reinit.regions import Tensors
from fastplastic.reinit.transaction import Undo, place_of

# Under what AveragedModel, timm's ModelEma and compiled or parallel models keep the model.
_PREFIXES = ("", "module.", "_orig_mod.", "ema.", "module.module.")


class ModelCopies:
    """Models with the same parameters, each perhaps inside of a wrapper.

    Args:
        modules: The copies.
        names: Names of tensors of the model that will be written.
        tensors: The tensors of the model.

    Raises:
        InputError: A copy is the model itself, or has no such tensor, or one of another shape.
    """

    def __init__(
        self, modules: Sequence[nn.Module], names: Collection[str], tensors: Tensors
    ) -> None:
        self._tensors = tensors
        self._copies = [_Copy(module, number, names) for number, module in enumerate(modules)]
        for copy in self._copies:
            for name in names:
                copy.check(name, tensors[name])

    def write(self, places: Sequence[Where], shifts: Mapping[str, Tensor], undo: Undo) -> None:
        """Give each copy the values of the model at these places, and shift the same biases.

        Where a bias is only shifted, the copy keeps the difference that it has to the model's.
        """
        with torch.no_grad():
            for copy in self._copies:
                for name, shift in shifts.items():
                    copy.check(name, self._tensors[name])
                    own, part = local_of(copy[name]), part_of(name, copy[name])
                    undo.keep(partial(own.copy_, own.clone()))
                    own.add_(shift_within(shift, part).to(own))
                for where in places:
                    own = copy[where.name]
                    values = place_of(self._tensors[where.name], where).read()
                    undo.keep_place(own, where).write(values.to(own.device, own.dtype))


class _Copy:
    """One copy, whose tensors are found under the names of the model."""

    def __init__(self, module: nn.Module, number: int, names: Collection[str]) -> None:
        self._tensors = Tensors(module)
        self._called = f"copy {number} ({type(module).__name__})"
        known = (p for p in _PREFIXES if all(f"{p}{name}" in self._tensors for name in names))
        self._prefix = next(known, "")

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[f"{self._prefix}{name}"].detach()

    def check(self, name: str, tensor: Tensor) -> None:
        """Raise InputError unless there is such a tensor, and not that of the model."""
        if f"{self._prefix}{name}" not in self._tensors:
            raise InputError(
                f"{self._called} has no {name!r}, expected the parameters and buffers of the "
                "model: leave it out"
            )
        own = self[name]
        if own.shape != tensor.shape:
            raise InputError(
                f"{name!r} of {self._called} has shape {tuple(own.shape)}, expected "
                f"{tuple(tensor.shape)} as in the model: leave it out"
            )
        if part_of(name, own) != part_of(name, tensor):
            raise InputError(
                f"{name!r} of {self._called} is not spread over processes as in the model, "
                "expected the same part in each: spread it alike, or leave it out"
            )
        mine, theirs = local_of(own), local_of(tensor)
        if mine.numel() and mine.data_ptr() == theirs.data_ptr():
            raise InputError(
                f"{name!r} of {self._called} is that of the model, expected one of its own"
            )
