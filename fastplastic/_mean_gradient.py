"""The mean gradient of every parameter over batches."""

import torch
from torch import Tensor, nn


class MeanGradient:
    """Gathers gradients over backward passes.

    float32 and float64 gradients add up in `.grad` itself, at no extra memory; narrower ones are
    added in float32, because a sum of many batches would be rounded away.

    Args:
        model: Its `.grad` are expected to be None, and are None again after `take`.
    """

    def __init__(self, model: nn.Module) -> None:
        self._parameters = dict(model.named_parameters())
        self._wide: dict[str, Tensor] = {}
        self.batches = 0

    def add(self) -> None:
        """Note that one more backward pass is done."""
        self.batches += 1
        for name, parameter in self._parameters.items():
            gradient = parameter.grad
            if gradient is None or gradient.dtype not in (torch.float16, torch.bfloat16):
                continue
            parameter.grad = None
            wide = gradient.float()
            self._wide[name] = self._wide[name] + wide if name in self._wide else wide

    def take(self) -> dict[str, Tensor]:
        """Return the mean of each parameter that got a gradient, and clear `.grad`."""
        means = {}
        for name, parameter in self._parameters.items():
            total = self._wide.get(name, parameter.grad)
            parameter.grad = None
            if total is not None and self.batches:
                total = total.detach()
                means[name] = (total.to_dense() if total.is_sparse else total).div_(self.batches)
        self._wide.clear()
        return means
