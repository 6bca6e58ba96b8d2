"""What a Recycler costs in training, beside the same training without it.

python benchmarks/continual/cost.py

ResNet-18 on batches of 8 images of 64 px, on the CPU: rounds of `every` steps each, in turns, one
of them measured and followed by a reset; and single steps in which nothing is measured.
"""

import time
from statistics import median

import timm
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from fastplastic import Recycler

_EVERY, _ROUNDS, _STEPS = 1000, 3, 200


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> float:
    """Make so many steps; return the seconds of each, in the mean."""
    images, labels = torch.randn(8, 3, 64, 64), torch.arange(8)
    begun = time.perf_counter()
    for _ in range(steps):
        optimizer.zero_grad()
        cross_entropy(model(images), labels).backward()
        optimizer.step()
    return (time.perf_counter() - begun) / steps


def main() -> None:
    """Print the ratio of each round, and of a step that is not measured."""
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=10)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    recycler = Recycler(
        model, torch.randn(2, 3, 64, 64), optimizer, "redo", every=_EVERY, threshold=0.5
    ).install()
    train(model, optimizer, _EVERY)
    ratios, unmeasured = [], []
    for number in range(_ROUNDS):
        with_it = train(model, optimizer, _EVERY)
        # The next round begins at the same place of the schedule.
        few = train(model, optimizer, _STEPS)
        recycler.detach()
        plain = train(model, optimizer, _EVERY)
        few_plain = train(model, optimizer, _STEPS)
        recycler.attach()
        train(model, optimizer, _EVERY - _STEPS)
        ratios.append(with_it / plain)
        unmeasured.append(few / few_plain)
        print(
            f"round {number + 1}: plain step {1e3 * plain:.1f} ms; every {_EVERY}: "
            f"{ratios[-1]:.4f}; steps that are not measured: {unmeasured[-1]:.4f}", flush=True,
        )  # fmt: skip
    print(f"median: {median(ratios):.4f}; not measured {median(unmeasured):.4f}")
    print(f"{len(recycler.log)} resets of {[reset.count for reset in recycler.log]} units")


if __name__ == "__main__":
    main()
