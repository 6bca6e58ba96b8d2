"""What `select`, `selection_masks` and `resample_` refuse, in the same words on every device."""

from collections.abc import Sequence
from numbers import Integral

import torch
from torch import Tensor

from fastplastic.kernels.law import Law
from fastplastic.kernels.scores import SCORES
from fastplastic.kernels.selection import Selection
from fastplastic.kernels.shards import Shards, WeightShard

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
Tensors = Sequence[Tensor]
Gradients = Sequence[Tensor | None] | None


def check_select(
    weights: Tensors,
    gradients: Gradients,
    names: Sequence[str],
    count: int,
    criterion: str,
    caps: Sequence[int] | None,
    shards: Shards,
) -> None:
    """Refuse arguments of `select` that do not fit together."""
    if criterion not in SCORES:
        raise ValueError(f"criterion {criterion!r} is unknown, expected one of {', '.join(SCORES)}")
    _check_weights(weights)
    _check_length("names", names, weights)
    if not isinstance(count, Integral) or count < 0:
        raise ValueError(f"count is {count}, expected an integer that is 0 or more")
    if caps is not None:
        _check_length("caps", caps, weights)
        if any(not isinstance(cap, Integral) or cap < 0 for cap in caps):
            raise ValueError(f"caps are {list(caps)}, expected integers that are 0 or more")
    _check_gradients(weights, gradients, criterion)
    _check_shards(weights, shards)


def check_selection(
    selection: Selection, weights: Tensors, gradients: Gradients, shards: Shards
) -> None:
    """Refuse weights that the selection cannot be of."""
    _check_weights(weights)
    _check_length("names of the selection", selection.names, weights)
    _check_gradients(weights, gradients, selection.criterion)
    _check_shards(weights, shards)


def check_resample(
    weights: Tensors,
    names: Sequence[str],
    laws: Sequence[Law],
    masks: Sequence[Tensor | None] | None,
    shards: Shards,
) -> None:
    """Refuse arguments of `resample_` that do not fit together."""
    _check_weights(weights)
    _check_length("names", names, weights)
    _check_length("laws", laws, weights)
    _check_shards(weights, shards)
    for i, weight in enumerate(weights):
        # A value written once would show in several elements.
        if any(
            step == 0 and size > 1 for step, size in zip(weight.stride(), weight.shape, strict=True)
        ):
            raise ValueError(f"weight {i} is expanded, expected elements of its own: clone it")
    if masks is None:
        return
    _check_length("masks", masks, weights)
    for i, (mask, weight) in enumerate(zip(masks, weights, strict=True)):
        if mask is not None and (mask.dtype != torch.bool or mask.shape != weight.shape):
            raise ValueError(
                f"mask {i} is {mask.dtype} {tuple(mask.shape)}, expected torch.bool "
                f"{tuple(weight.shape)} like the weight: expand it"
            )


def _check_weights(weights: Tensors) -> None:
    for i, weight in enumerate(weights):
        _check_local(f"weight {i}", weight)
        if weight.dtype not in DTYPES:
            raise ValueError(
                f"weight {i} is {weight.dtype}, expected float32, bfloat16, float16 or float64"
            )


def _check_local(what: str, tensor: Tensor) -> None:
    # The address of a DTensor is 0. Its class takes a second to load, for nothing mostly.
    if hasattr(tensor, "to_local"):
        raise ValueError(
            f"{what} is a DTensor, expected a tensor of this process alone: pass its to_local(), "
            "and where it lies in the weight as shards"
        )


def _check_shards(weights: Tensors, shards: Shards) -> None:
    if shards is None:
        return
    _check_length("shards", shards, weights)
    for i, (weight, shard) in enumerate(zip(weights, shards, strict=True)):
        if shard is not None and weight.numel() and not _fits(tuple(weight.shape), shard):
            raise ValueError(
                f"weight {i} is {tuple(weight.shape)} with offsets {shard.offsets}, expected a "
                f"part of the weight {shard.shape}"
            )


def _fits(shape: tuple[int, ...], shard: WeightShard) -> bool:
    if len(shape) != len(shard.shape):
        return False
    boxes = zip(shape, shard.offsets, shard.shape, strict=True)
    return all(at + size <= whole for size, at, whole in boxes)


def _check_length(what: str, values: Sequence[object], weights: Tensors) -> None:
    if len(values) != len(weights):
        raise ValueError(
            f"there are {len(values)} {what} for {len(weights)} weights, expected one for each"
        )


def _check_gradients(weights: Tensors, gradients: Gradients, criterion: str) -> None:
    if not SCORES[criterion].dw:
        return
    if gradients is None:
        raise ValueError(f"there are no gradients, expected them for criterion {criterion!r}")
    _check_length("gradients", gradients, weights)
    for i, (gradient, weight) in enumerate(zip(gradients, weights, strict=True)):
        if gradient is None:
            raise ValueError(
                f"gradient {i} is missing, expected one for criterion {criterion!r}: leave the "
                "weight out"
            )
        _check_local(f"gradient {i}", gradient)
        if gradient.dtype not in DTYPES or gradient.shape != weight.shape:
            raise ValueError(
                f"gradient {i} is {gradient.dtype} {tuple(gradient.shape)}, expected a "
                f"floating-point tensor {tuple(weight.shape)} like the weight"
            )
