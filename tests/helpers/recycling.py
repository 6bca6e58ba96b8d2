"""A small network that a Recycler follows, and its training."""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fastplastic import Recycler


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3)
    )


def batch(step: int) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(step)
    images = torch.randn(16, 8, generator=draws)
    return images, (images[:, 0] > 0).long() + (images[:, 1] > 0).long()


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    recycler: Recycler | None,
    steps: range,
) -> None:
    for step in steps:
        images, labels = batch(step)
        optimizer.zero_grad()
        cross_entropy(model(images), labels).backward()
        optimizer.step()
        if recycler is not None and not recycler._installed:
            recycler.step()
