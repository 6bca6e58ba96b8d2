"""Lend a model a head for other classes, for the time of a measurement."""

import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastplastic.errors import InputError
from fastplastic.model.batches import Batch, outputs_of
from fastplastic.model.checks import fingerprint
from fastplastic.model.left_as_found import undisturbed


@dataclass(frozen=True)
class LentHead:
    """A head that is not the model's own.

    Attributes:
        layers: Dotted names of the layers that stand in the place of the model's own ones.
        fingerprint: Fingerprint of the model with its own head.
    """

    layers: tuple[str, ...]
    fingerprint: str


@contextmanager
def loss_head(model: nn.Module, num_classes: int, seed: int = 0) -> Iterator[LentHead]:
    """Lend the model a fresh classifier with another number of outputs, for the time of the block.

    Every classifier of a timm model (distilled models have two) is replaced by one of the same kind
    with PyTorch's default initial weights; where it is a block, the layer that makes the outputs
    is. Afterwards, also after an exception, the very same modules are back in their
    place. The global RNG is not touched.

    Yields:
        What `fastplastic.profile` needs to know of it.

    Raises:
        InputError: The model has no classifier that can be replaced.
    """
    fresh = _fresh_heads(model, num_classes, seed)
    names = list(fresh)
    lent = LentHead(tuple(names), fingerprint(model))
    old = {name: model.get_submodule(name) for name in names}
    try:
        for name in old:
            _place(model, name, fresh[name])
        yield lent
    finally:
        for name, head in old.items():
            _place(model, name, head)


def give_head(model: nn.Module, num_classes: int, seed: int = 0) -> None:
    """Put fresh classifiers into a model for good, as `loss_head` does for a time; InputError."""
    for name, head in _fresh_heads(model, num_classes, seed).items():
        _place(model, name, head)


def _fresh_heads(model: nn.Module, num_classes: int, seed: int) -> dict[str, nn.Linear | nn.Conv2d]:
    """Return a fresh layer for each name of a classifier; InputError where there is none."""
    heads = output_layers(model)
    # A head can stand in two places: it is replaced in both.
    modules = model.named_modules(remove_duplicate=False)
    names = {name: id(module) for name, module in modules if any(module is x for x in heads)}
    if not names:
        raise _no_classifier(model)
    generator = torch.Generator().manual_seed(seed)
    fresh = {id(head): _fresh(head, num_classes, generator) for head in heads}
    return {name: fresh[head] for name, head in names.items()}


def output_layers(model: nn.Module, batch: Batch | None = None) -> list[nn.Linear | nn.Conv2d]:
    """Return the layers that make the model's outputs; more than one where heads are averaged.

    Args:
        model: A timm model, which tells; or any other.
        batch: With it a model that does not tell is run, in eval mode: the layer whose output it
            returns is the one.
    """
    found = _named_by_timm(model)
    return found if found or batch is None else _seen_at_the_end(model, batch)


def _named_by_timm(model: nn.Module) -> list[nn.Linear | nn.Conv2d]:
    get = getattr(model, "get_classifier", None)
    found = get() if get is not None else ()
    blocks = list(found) if isinstance(found, tuple | list) else [found]
    # VOLO adds up two heads and returns one: timm's configuration names both.
    named = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    for name in (named,) if isinstance(named, str) else named:
        with suppress(AttributeError):  # the model has lost this head, or never had it
            blocks.append(model.get_submodule(name))
    layers: list[nn.Linear | nn.Conv2d] = []
    for block in blocks:
        inside = [part for part in block.modules() if isinstance(part, nn.Linear | nn.Conv2d)]
        layers += [last for last in inside[-1:] if not any(last is layer for layer in layers)]
    return layers


def _seen_at_the_end(model: nn.Module, batch: Batch) -> list[nn.Linear | nn.Conv2d]:
    made: list[tuple[nn.Linear | nn.Conv2d, Tensor]] = []

    def keep(module: Any, args: Any, output: Any) -> None:
        made.append((module, output))

    layers = [part for part in model.modules() if isinstance(part, nn.Linear | nn.Conv2d)]
    handles = [layer.register_forward_hook(keep) for layer in layers]
    try:
        with undisturbed(model), torch.no_grad():
            model.eval()
            end = outputs_of(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    # A view of it is the same output: a 1 x 1 convolution is flattened.
    return [
        layer
        for layer, output in made
        if isinstance(output, Tensor)
        and (output.data_ptr(), output.numel()) == (end.data_ptr(), end.numel())
    ]


def _no_classifier(model: nn.Module) -> InputError:
    return InputError(
        f"{type(model).__name__} has no classifier that could be replaced for these data, expected "
        "a Linear or a convolution: give the model a head with --num-classes"
    )


def _fresh(
    old: nn.Linear | nn.Conv2d, num_classes: int, generator: torch.Generator
) -> nn.Linear | nn.Conv2d:
    bias = old.bias is not None
    new: nn.Linear | nn.Conv2d
    # Made on the meta device, where the layer's own initialisation draws no random numbers.
    if isinstance(old, nn.Linear):
        new = nn.Linear(old.in_features, num_classes, bias, device="meta")
    else:
        kept = ("in_channels", "kernel_size", "stride", "padding", "dilation")
        geometry: dict[str, Any] = {name: getattr(old, name) for name in kept}
        new = nn.Conv2d(out_channels=num_classes, bias=bias, device="meta", **geometry)
    new = new.to_empty(device="cpu")
    # reset_parameters of both draws from this law, but from the global RNG.
    bound = 1 / math.sqrt(max(1, new.weight[0].numel()))
    for parameter in new.parameters():
        nn.init.uniform_(parameter, -bound, bound, generator=generator)
    return new.to(old.weight.device, old.weight.dtype).train(old.training)


def _place(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, module)
