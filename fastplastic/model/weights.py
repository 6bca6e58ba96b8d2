"""The weights of a model as a profile keeps them, and the mean gradients of all parameters."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from fastplastic.errors import InputError
from fastplastic.kernels import DTYPES
from fastplastic.model.batch_groups import BatchGroup
from fastplastic.model.group_means import add_whole, sizes_of, sum_of_slices, summands
from fastplastic.model.spread import (
    Part,
    aligned,
    gathered_by_fsdp,
    is_spread,
    local_of,
    part_of,
)
from fastplastic.processes import Processes


class Weights(Mapping[str, Tensor]):
    """{name: tensor}, the tensors themselves and a sum over the bits of each.

    Args:
        tensors: What to keep; no copies are made.
        parts: Which parts these are of weights that are cut over processes.

    Attributes:
        parts: {name: which part of the weight the tensor is}, of those that are cut over
            processes, the same names in each.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], parts: Mapping[str, Part] | None = None
    ) -> None:
        self.parts: Mapping[str, Part] = dict(parts or {})
        self._tensors = {name: tensor.detach() for name, tensor in tensors.items()}
        self._sums = {name: _sum_of_bits(tensor) for name, tensor in self._tensors.items()}

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

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


def weights_of(model: nn.Module, but: Sequence[str] = ()) -> Weights:
    """Return the floating-point parameters of a model that have one name, or parts of them.

    Args:
        model: The model.
        but: Names of modules whose parameters are left out.
    """
    left_out = tuple(f"{name}." for name in but)
    parameters = {
        name: parameter
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter.dtype in DTYPES and parameter.numel()
    }
    names: dict[tuple[bool, int], list[str]] = {}
    for name, parameter in parameters.items():
        names.setdefault(_memory_of(parameter), []).append(name)
    kept = [own[0] for own in names.values() if len(own) == 1]
    kept = [name for name in kept if not name.startswith(left_out)]
    parts = {name: part_of(name, parameters[name]) for name in kept}
    return Weights(
        {name: local_of(parameters[name]) for name in kept},
        {name: part for name, part in parts.items() if part.cut},
    )


def _memory_of(parameter: Tensor) -> tuple[bool, int]:
    """Return what two names of the same memory have in common."""
    # A part without elements has no address, and whoever spreads a parameter keeps it one object.
    spread = is_spread(parameter)
    return spread, id(parameter) if spread else parameter.data_ptr()


def _sum_of_bits(tensor: Tensor) -> int:
    """Return the sum of the bit patterns, which any one change changes; it wraps around."""
    if tensor.element_size() == 2:
        return int(tensor.view(torch.int16).sum(dtype=torch.int64))
    integer = torch.int32 if tensor.element_size() == 4 else torch.int64
    return int(tensor.view(integer).sum(dtype=integer))


class MeanGradient:
    """Gathers gradients over backward passes.

    float32 and float64 gradients add up in `.grad` itself, at no extra memory; narrower ones are
    added in float32, because a sum of many batches would be rounded away.

    Args:
        model: Its `.grad` are expected to be None, and are None again after `take`.

    Attributes:
        batches: How many backward passes were added.
        summands: After `take`, names of parameters that are left out, because each process of a
            group had but a summand of the gradient.
    """

    def __init__(self, model: nn.Module) -> None:
        self._parameters = dict(model.named_parameters())
        self._sharded = gathered_by_fsdp(model)
        self.summands: frozenset[str] = frozenset()
        self._wide: dict[str, Tensor] = {}
        self.batches = 0

    def add(self, batches: int) -> None:
        """Note that a backward pass is done, and of how many batches (0 for a pass that adds 0)."""
        self.batches += batches
        for name, parameter in self._parameters.items():
            gradient = parameter.grad
            if gradient is None or gradient.dtype not in (torch.float16, torch.bfloat16):
                continue
            parameter.grad = None
            wide = gradient.float()
            self._wide[name] = self._wide[name] + wide if name in self._wide else wide

    def take(
        self, together: Processes | None = None, group: BatchGroup | None = None
    ) -> dict[str, Tensor]:
        """Return the mean of each parameter that got a gradient, and clear `.grad`.

        Args:
            together: The processes that the batches are spread over; each gets the mean of all, of
                a spread parameter the part that it has.
            group: Those that share the batches of this one; None for itself alone.
        """
        totals = {}
        for name, parameter in self._parameters.items():
            total = self._wide.get(name, parameter.grad)
            parameter.grad = None
            # A process without a batch of its own may have a part of what others found.
            if total is not None and (self.batches or together):
                total = aligned(total.detach(), parameter)
                totals[name] = total.to_dense() if total.is_sparse else total
        self._wide.clear()
        if together is None or group is None:
            return {name: total.div_(self.batches) for name, total in totals.items()}
        return self._mean_of_all(totals, together, group)

    def notes(self) -> tuple[str, ...]:
        """Return what a reader of the means has to know."""
        if not self.summands:
            return ()
        names = sorted(self.summands)
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        return (
            f"the gradient of {names[0]}{more} is not measured: those that share batches have a "
            "summand each, which nobody adds up (a whole parameter among slices): an optimizer "
            "would make them differ",
        )

    def _mean_of_all(
        self, totals: dict[str, Tensor], together: Processes, group: BatchGroup
    ) -> dict[str, Tensor]:
        known = together.share((self.batches, sizes_of(totals, group)))
        # Of those that share batches one counts them.
        batches = sum(known[ranks[0]][0] for ranks in group.every)
        sizes = [own for _, own in known]
        self.summands = summands(sizes, group)
        means: dict[str, Tensor] = {}
        if not batches:
            return means
        for name in sorted({name for own in sizes for name in own}.difference(self.summands)):
            parameter = self._parameters[name]
            total = totals[name] if name in totals else torch.zeros_like(parameter.detach())
            if not is_spread(parameter):
                add_whole(total, together, group)
            elif id(parameter) not in self._sharded and len(group.every) > 1:
                most = max(own[name][0] for own in sizes if name in own)
                total = sum_of_slices(local_of(total), together, group, most)
            # Backward passes under FSDP2 left the means over the groups.
            done = len(group.every) if id(parameter) in self._sharded else 1
            means[name] = local_of(total).div_(batches / done)
        return means
