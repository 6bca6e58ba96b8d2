"""Which processes share each batch: those of tensor parallelism, by the placement of parameters."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from fastplastic.errors import InputError
from fastplastic.model.spread import gathered_by_fsdp, is_spread
from fastplastic.processes import Processes


@dataclass(frozen=True)
class BatchGroup:
    """The processes that run a model on the same batches as this one, each a slice of its layers.

    Attributes:
        ranks: Their numbers, in the order of their slices; that of this process is among them.
        place: Of this process, from 0.
        every: The ranks of all groups, each of which has batches of its own.
    """

    ranks: tuple[int, ...] = (0,)
    place: int = 0
    every: tuple[tuple[int, ...], ...] = ((0,),)

    @property
    def alone(self) -> bool:
        """Whether this process shares its batches with no other."""
        return len(self.ranks) == 1

    @property
    def first(self) -> bool:
        """Whether what all of the group have alike is counted in this process."""
        return self.place == 0


def batch_group(model: nn.Module, together: Processes | None) -> BatchGroup:
    """Return the group of this process; all processes call it.

    Args:
        model: The model.
        together: All processes; None where this is the only one.

    Raises:
        InputError: A parameter is placed in a way that is not understood.
    """
    rank, size = (together.rank, together.size) if together else (0, 1)
    sharded, copied = gathered_by_fsdp(model), _copied(model)
    found: dict[tuple[int, ...], str] = {}
    placed: dict[str, Any] = {
        name: parameter
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if is_spread(parameter)
    }
    for name, parameter in placed.items():
        # `replicate` shards along no dimension: where its own end is not known.
        unclear = id(parameter) in copied and parameter.device_mesh.ndim > 1
        _check(not unclear, name, parameter, size)
        ranks = _sharing(name, parameter, size, fsdp=id(parameter) in sharded)
        if len(ranks) > 1:
            found.setdefault(ranks, name)
    if len(found) > 1:
        (one, first), (other, second) = list(found.items())[:2]
        raise InputError(
            f"{first!r} is spread over processes {_listed(one)}, {second!r} over {_listed(other)}, "
            "expected one mesh of tensor parallelism for all layers"
        )
    own = next(iter(found), (rank,))
    for name, parameter in placed.items():
        if id(parameter) in sharded:
            copies = prod(parameter.device_mesh.shape[: data_dims(parameter, fsdp=True)])
            _check(copies * len(own) == size, name, parameter, size)
    everyone: tuple[tuple[int, ...], ...] = tuple((one,) for one in range(size))
    if together is not None and placed:
        everyone = _partition(together, own)
    return BatchGroup(own, own.index(rank), everyone)


def data_dims(parameter: Any, *, fsdp: bool) -> int:
    """Return how many dimensions of a parameter's mesh are those of different batches.

    FSDP2 puts its dimensions before those of tensor parallelism, and shards along its last one.
    """
    placements = parameter.placements
    cut = [dim for dim, placement in enumerate(placements) if not placement.is_replicate()]
    if not fsdp:
        return 0
    return cut[0] + 1 if cut else len(placements)


def cut_of(parameter: Any, group: BatchGroup, *, fsdp: bool) -> tuple[int, range] | None:
    """Return which slice of a parameter this process computes with, along which dimension.

    Returns:
        None where it is all of it.
    """
    own = data_dims(parameter, fsdp=fsdp)
    for placement in parameter.placements[own:]:
        if not placement.is_replicate() and not group.alone:
            size = parameter.shape[placement.dim]
            # As torch.chunk cuts: the last ones may have less, or nothing.
            step = -(-size // len(group.ranks))
            begin = min(group.place * step, size)
            return placement.dim, range(begin, min(begin + step, size))
    return None


def _copied(model: nn.Module) -> set[int]:
    """Return the ids of the parameters that `replicate` holds copies of, which is made of FSDP2."""
    module = sys.modules.get("torch.distributed._composable.replicate_with_fsdp")
    kind: Any = getattr(module, "ReplicateModule", None)
    found = [own for own in model.modules() if kind is not None and isinstance(own, kind)]
    return {id(parameter) for own in found for parameter in own.parameters()}


def _sharing(name: str, parameter: Any, size: int, *, fsdp: bool) -> tuple[int, ...]:
    """Return the processes that share a parameter and their batches."""
    mesh = parameter.device_mesh
    own, where = data_dims(parameter, fsdp=fsdp), mesh.get_coordinate()
    known = where is not None and mesh.ndim - own <= 1
    known = known and not any(placement.is_partial() for placement in parameter.placements)
    _check(known and size % mesh.size() == 0, name, parameter, size)
    ranks: Tensor = mesh.mesh[tuple(where[:own])]
    return tuple(ranks.flatten().tolist())


def _partition(together: Processes, own: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Return the groups of all processes; InputError where they are no groups."""
    said: list[tuple[int, ...]] = together.share(own)
    for rank, ranks in enumerate(said):
        if rank not in ranks or any(said[other] != ranks for other in ranks):
            raise InputError(
                f"process {rank} shares layers with processes {_listed(ranks)}, which do not all "
                "say the same, expected groups of processes for tensor parallelism"
            )
    return tuple(dict.fromkeys(said))


def _check(fine: bool, name: str, parameter: Any, size: int) -> None:
    if fine:
        return
    mesh = parameter.device_mesh
    raise InputError(
        f"{name!r} is placed as {tuple(map(str, parameter.placements))} on a mesh of "
        f"{tuple(mesh.shape)}, there are {size} processes, expected all of them to share it by "
        "fully_shard, by parallelize_module on a mesh of one dimension, or by both: call this "
        "before the model is spread"
    )


def _listed(ranks: tuple[int, ...]) -> str:
    return ", ".join(map(str, ranks))


def waited(tensor: Tensor) -> Tensor:
    """Return the values of a tensor that another process may still send."""
    wait: Callable[[], Tensor] | None = getattr(tensor, "trigger_wait", None)
    return tensor if type(tensor) is torch.Tensor or wait is None else wait()
