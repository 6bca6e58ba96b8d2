"""What a user's loader yields, as arguments of the model, and the loss of one batch."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fastplastic.errors import InputError
from fastplastic.model.spread import whole_of

_EXPECTED = "expected (inputs, targets) or a mapping of the model's arguments"


@dataclass(frozen=True, eq=False)
class Batch:
    """One batch on the model's device.

    Attributes:
        args: Positional arguments of the model.
        kwargs: Keyword arguments of the model, labels not among them.
        targets: What the loss compares with, or None.
        mapping: Whether the loader gave a mapping, as for Hugging Face models.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    targets: Any
    mapping: bool

    def tensors(self) -> list[Tensor]:
        """Return all tensors of the arguments and targets."""
        return _tensors((self.args, self.kwargs, self.targets))

    def example(self) -> tuple[Any, ...] | dict[str, Any]:
        """Return the arguments, cut to two samples where all tensors have as many."""
        values: Any = self.kwargs or self.args
        sizes = {tensor.shape[0] if tensor.ndim else None for tensor in _tensors(values)}
        example: tuple[Any, ...] | dict[str, Any] = values
        if len(sizes) == 1 and None not in sizes:
            example = _map_tensors(values, lambda tensor: tensor[:2])
        return example


def read_batches(batches: Iterable[Any], device: torch.device) -> Iterator[Batch]:
    """Yield every batch on the device; InputError when one has another form."""
    for number, item in enumerate(batches):
        yield read_batch(item, number, device)


def read_batch(item: Any, number: int, device: torch.device) -> Batch:
    """Return what a loader yielded as a batch on the device; InputError for another form."""

    def moved(value: Any) -> Any:
        return _map_tensors(value, lambda tensor: tensor.to(device, non_blocking=True))

    if isinstance(item, Mapping):
        kwargs = dict(moved(dict(item)))
        return Batch((), kwargs, kwargs.pop("labels", None), True)
    if not isinstance(item, (tuple, list)) or len(item) != 2:
        size = f" of {len(item)}" if isinstance(item, (tuple, list)) else ""
        kind = type(item).__name__
        raise InputError(f"batch {number} is a {kind}{size}, {_EXPECTED}: wrap the loader")
    inputs, targets = moved(item[0]), moved(item[1])
    if isinstance(inputs, Mapping):
        return Batch((), dict(inputs), targets, False)
    args = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
    return Batch(args, {}, targets, False)


def loss_of(model: nn.Module, batch: Batch, loss_fn: Callable[[Any, Any], Tensor]) -> Tensor:
    """Run the model on a batch and return the loss, one element.

    A mapping is passed with its labels where the model takes them; then the model's own loss is
    used, unless the caller chose a loss function. That one gets the output as it is.

    Raises:
        InputError: There is nothing to compare with, or the loss is not one number.
    """
    kwargs = dict(batch.kwargs)
    if batch.mapping and batch.targets is not None and _takes_labels(model):
        kwargs["labels"] = batch.targets
    output = model(*batch.args, **kwargs)
    if loss_fn is cross_entropy:
        loss = _default_loss(output, batch)
    else:
        loss = _own_loss(loss_fn, output, batch.targets)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        found = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise InputError(f"the loss is {found}, expected a tensor with one element: take its mean")
    # Of outputs that are spread over processes, each may have a summand of the loss.
    return whole_of(loss).reshape(())


def outputs_of(model: nn.Module, batch: Batch) -> Tensor:
    """Run the model on a batch and return its logits [samples, classes, ...].

    Raises:
        InputError: The output is no tensor and has no `logits`.
    """
    logits = _logits(model(*batch.args, **batch.kwargs))
    if not isinstance(logits, Tensor):
        raise InputError(
            f"the model returned a {type(logits).__name__}, expected logits: wrap the model"
        )
    return logits


def _default_loss(output: Any, batch: Batch) -> Any:
    """Return the model's own loss of a mapping, else the cross-entropy of its logits."""
    loss = getattr(output, "loss", None) if batch.mapping else None
    if loss is not None:
        return loss
    if batch.mapping and batch.targets is None:
        raise InputError(
            f"the batch has {', '.join(batch.kwargs)} but no 'labels', and the model's output "
            "has no loss: add 'labels' to the batches"
        )
    return _cross_entropy(_logits(output), batch.targets)


def _own_loss(loss_fn: Callable[[Any, Any], Tensor], output: Any, targets: Any) -> Any:
    """Return the caller's loss; its errors say where logits are, if the output has any."""
    try:
        return loss_fn(output, targets)
    except Exception as error:
        if getattr(output, "logits", None) is not None:
            error.add_note(
                "loss_fn gets the model's output as it is, here a "
                f"{type(output).__name__}: take output.logits"
            )
        raise


def _takes_labels(model: nn.Module) -> bool:
    parameters = inspect.signature(model.forward).parameters
    return "labels" in parameters or any(
        parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()
    )


def _logits(output: Any) -> Any:
    logits = getattr(output, "logits", None)
    if logits is not None:
        return logits
    # Models with auxiliary heads return theirs after the main one.
    return output[0] if isinstance(output, (tuple, list)) else output


def _cross_entropy(logits: Any, targets: Any) -> Tensor:
    """Return the mean cross-entropy; checks class numbers first, which a GPU does not survive."""
    if not isinstance(logits, Tensor) or not isinstance(targets, Tensor):
        pair = f"{type(logits).__name__} and {type(targets).__name__}"
        raise InputError(f"outputs and targets are {pair}, expected tensors: pass your own loss_fn")
    if logits.ndim == 3 and targets.shape == logits.shape[:2] != (len(logits), logits.shape[2]):
        raise InputError(
            f"outputs of shape {tuple(logits.shape)} for targets of shape {tuple(targets.shape)} "
            "look like (batch, tokens, classes), expected (batch, classes, ...): yield mappings "
            "with 'labels', so that the model's own loss is used, or pass your own loss_fn"
        )
    if not targets.is_floating_point() and targets.numel() and logits.ndim > 1:
        highest, classes = int(targets.max()), logits.shape[1]
        if highest >= classes:
            raise InputError(
                f"a target is class {highest}, expected 0..{classes - 1}, the outputs of the "
                "model: give it a head for your classes, or pass your own loss_fn"
            )
    # In half precision the loss itself would be rounded.
    narrow = logits.dtype in (torch.float16, torch.bfloat16)
    return cross_entropy(logits.float() if narrow else logits, targets)


def _map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Apply a function to every tensor in nested tuples, lists and mappings."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _map_tensors(item, change) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        items = [_map_tensors(item, change) for item in value]
        return items if isinstance(value, list) else tuple(items)
    return value


def _tensors(value: Any) -> list[Tensor]:
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    _map_tensors(value, note)
    return found
