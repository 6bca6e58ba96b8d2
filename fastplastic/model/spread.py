"""Tensors that several processes hold parts of: the DTensors of FSDP2 and tensor parallelism."""

import sys
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fastplastic.errors import InputError
from fastplastic.kernels import WeightShard


def is_spread(tensor: Tensor) -> bool:
    """Tell whether several processes hold parts of a tensor, or copies, as one DTensor."""
    # Whoever made one has loaded this.
    module: Any = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


@dataclass(frozen=True)
class Part:
    """The part of a tensor that this process holds.

    Attributes:
        shape: Of the whole tensor.
        offsets: Where the part begins, in each dimension.
        sizes: Its shape.
        first: Whether no process before this one holds the same part.
        cut: Whether processes hold different parts; the same in all of them.
    """

    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    first: bool = True
    cut: bool = False

    @property
    def whole(self) -> bool:
        """Whether it is all of the tensor."""
        return self.sizes == self.shape

    @property
    def shard(self) -> WeightShard:
        """The same, as kernels take it."""
        return WeightShard(self.shape, self.offsets, counted=self.first)


def part_of(name: str, tensor: Tensor) -> Part:
    """Return which part of a tensor this process holds.

    Args:
        name: What errors call it.
        tensor: Any tensor; one that is not spread is whole.

    Raises:
        InputError: It is placed in a way that is not understood: as sums to be made, or in parts
            that are no block of it.
    """
    if not is_spread(tensor):
        shape = tuple(tensor.shape)
        return Part(shape, (0,) * len(shape), shape)
    spread: Any = tensor
    placements, mesh = spread.placements, spread.device_mesh
    chunks = [] if any(p.is_partial() for p in placements) else spread.__create_chunk_list__()
    local = tuple(local_of(tensor).shape)
    if len(chunks) != 1 or tuple(chunks[0].sizes) != local:
        raise InputError(
            f"{name!r} is placed as {tuple(map(str, placements))} on a mesh of {mesh.shape}: "
            "expected a block of it in each process (Shard, Replicate): re-initialise before it is "
            "placed so"
        )
    where = mesh.get_coordinate() or ()
    first = all(at == 0 for p, at in zip(placements, where, strict=True) if p.is_replicate())
    # Where processes form several meshes, each has a copy of the whole.
    first = first and 0 in mesh.mesh
    # Not `is_shard()`, which is false where FSDP2 cuts what tensor parallelism has cut.
    cut = any(
        not p.is_replicate() and size > 1 for p, size in zip(placements, mesh.shape, strict=True)
    )
    return Part(tuple(tensor.shape), tuple(chunks[0].offsets), local, first, cut)


def local_of(tensor: Tensor) -> Tensor:
    """Return the part that this process holds, in the same memory."""
    if not is_spread(tensor):
        return tensor
    spread: Any = tensor.detach()
    local: Tensor = spread.to_local()
    return local


def gathered_by_fsdp(model: nn.Module) -> set[int]:
    """Return the ids of the parameters that FSDP2 spreads and gathers."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return set()
    modules = [module for module in model.modules() if isinstance(module, fsdp.FSDPModule)]
    return {id(parameter) for module in modules for parameter in module.parameters()}


def whole_of(tensor: Tensor) -> Tensor:
    """Return all of a tensor; all processes that hold parts of it call this. It has a gradient."""
    if not is_spread(tensor):
        return tensor
    spread: Any = tensor
    found: Tensor = spread.full_tensor()
    return found


def aligned(gradient: Tensor, parameter: Tensor) -> Tensor:
    """Return a gradient placed as its parameter; all processes that hold parts of it call this."""
    if not is_spread(parameter) or not is_spread(gradient):
        return gradient
    own: Any = gradient
    like: Any = parameter
    if own.placements == like.placements:
        return gradient
    # Where each process sees other positions, it has a summand.
    moved: Tensor = own.redistribute(placements=like.placements)
    return moved


def reshard(model: nn.Module) -> None:
    """Free what FSDP2 has gathered of parameters and kept, as the first one does after a forward.

    Without a backward pass to come that is never freed, and parameters are not what they were.
    """
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    for module in model.modules() if fsdp is not None else ():
        if isinstance(module, fsdp.FSDPModule):
            module.reshard()
