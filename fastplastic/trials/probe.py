"""Fit the head alone before anything is measured: a linear probe.

Gradients behind a head with random weights are noise, and fine-tuning through one spoils features:
Kumar et al., "Fine-tuning can distort pretrained features" (LP-FT), arXiv 2202.10054.
"""

from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fastplastic.errors import InputError
from fastplastic.model import device_of, output_layers, outputs_of, read_batches, undisturbed

# Weight decays of the standardised features that are tried, and the most steps L-BFGS takes.
DECAYS = (1.0, 0.1, 0.01, 0.001)
_STEPS = 100
# Each of so many images is held out when the decay is chosen.
_FOLD = 5


def fit_head(model: nn.Module, batches: Iterable[Any]) -> float:
    """Fit the layers that make the model's outputs to the batches, in place.

    The rest of the network stays as it is, and runs in eval mode, once. Each head is fitted to its
    own inputs, standardised, by L-BFGS from zero: multinomial logistic regression. Its weight decay
    is the one of 1, 0.1, 0.01 and 0.001 with the smallest loss on each fifth image, which are held
    out for that; a decay that is too small makes a head of large weights, through which fine-tuning
    begins with large steps. Nothing is random.

    Args:
        model: A model whose outputs a Linear or a 1 x 1 convolution makes.
        batches: Yield (inputs, targets).

    Returns:
        The mean cross-entropy of the fitted head on the batches.

    Raises:
        InputError: There is no such layer, or no batch, or the features are not finite.
    """
    with undisturbed(model):
        # Read once: the batches may be a generator, or come in random order.
        unread = iter(batches)
        first = next(unread, None)
        if first is None:
            raise InputError("there are no batches to fit the head to, expected at least one")
        heads = output_layers(model, next(read_batches([first], device_of(model))))
        if not heads:
            raise InputError(
                f"{type(model).__name__} has no classifier to fit, expected a Linear or a "
                "convolution that makes the outputs: leave the probe out, as with "
                "TrainSettings(probe_first=False)"
            )
        features, targets = _features(model, heads, chain([first], unread))
    losses = [_fit(head, features[i], targets) for i, head in enumerate(heads)]
    return sum(losses) / len(losses)


def _features(
    model: nn.Module, heads: list[nn.Linear | nn.Conv2d], batches: Iterable[Any]
) -> tuple[list[Tensor], Tensor]:
    """Return what each head reads, float32 [images, features], and the targets."""
    seen: list[list[Tensor]] = [[] for _ in heads]
    targets: list[Tensor] = []

    def keep(number: int) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen[number].append(args[0].detach().float().flatten(1))

        return hook

    handles = [head.register_forward_pre_hook(keep(i)) for i, head in enumerate(heads)]
    try:
        with torch.no_grad():
            model.eval()
            for batch in read_batches(batches, device_of(model)):
                outputs_of(model, batch)
                targets.append(batch.targets)
    finally:
        for handle in handles:
            handle.remove()
    return [torch.cat(parts) for parts in seen], torch.cat(targets)


def _fit(head: nn.Linear | nn.Conv2d, features: Tensor, targets: Tensor) -> float:
    weight = head.weight.detach()
    classes, width = weight.shape[0], weight[0].numel()
    if features.shape != (len(targets), width) or not bool(features.isfinite().all()):
        raise InputError(
            f"the head reads {tuple(features.shape)} for {len(targets)} images, expected finite "
            f"features [images, {width}]: leave the probe out"
        )
    mean, std = features.mean(0), features.std(0, correction=0)
    # A feature that never changes, or hardly, says nothing, and dividing by it would overflow.
    scale = torch.where(std > 1e-6 * std.max(), 1 / std.clamp_min(1e-30), 0.0)
    inputs = (features - mean) * scale
    w, b = _regression(inputs, targets, classes, _decay(inputs, targets, classes))
    with torch.no_grad():
        loss = float(cross_entropy(inputs @ w.T + b, targets))
        own = w * scale
        head.weight.data = own.reshape(weight.shape).to(weight.dtype)
        if head.bias is not None:
            head.bias.data = (b - own @ mean).to(head.bias.dtype)
    return loss


def _decay(inputs: Tensor, targets: Tensor, classes: int) -> float:
    """Return the weight decay with the smallest loss on images that are held out."""
    held_out = torch.arange(len(targets), device=targets.device) % _FOLD == _FOLD - 1
    if not held_out.any():
        return DECAYS[0]
    losses = {}
    for decay in DECAYS:
        w, b = _regression(inputs[~held_out], targets[~held_out], classes, decay)
        losses[decay] = float(cross_entropy(inputs[held_out] @ w.T + b, targets[held_out]))
    return min(losses, key=losses.__getitem__)


def _regression(
    inputs: Tensor, targets: Tensor, classes: int, decay: float
) -> tuple[Tensor, Tensor]:
    """Return weights [classes, features] and biases that minimise cross-entropy and decay."""
    w = torch.zeros(classes, inputs.shape[1], device=inputs.device, requires_grad=True)
    b = torch.zeros(classes, device=inputs.device, requires_grad=True)
    optimizer: Any = torch.optim.LBFGS([w, b], max_iter=_STEPS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(inputs @ w.T + b, targets) + decay / 2 * w.square().sum()
        torch.autograd.backward(loss)
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return w.detach(), b.detach()
