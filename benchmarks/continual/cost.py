"""What a Recycler costs in training, beside the same training without it.

python benchmarks/continual/cost.py

ResNet-18 on batches of 8 images of 32 px, on the CPU. One step in 1,000 is measured and followed by
a reset, which is too little to be seen in the noise of 1,000 steps. So blocks of ten steps, one of
them measured and followed by a reset, are timed in turns with blocks without a Recycler, and what
the one step takes longer is set against 1,000 plain ones. Steps in which nothing is measured are
timed in the same way.
"""

import time
from statistics import median, quantiles

import timm
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from fastplastic import Recycler

_EVERY, _BLOCK, _ROUNDS = 1000, 10, 40
_NEVER = 10**9


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    """Make a block of steps; return its seconds."""
    images, labels = torch.randn(8, 3, 32, 32), torch.arange(8)
    begun = time.perf_counter()
    for _ in range(_BLOCK):
        optimizer.zero_grad()
        cross_entropy(model(images), labels).backward()
        optimizer.step()
    return time.perf_counter() - begun


def longer(every: int) -> tuple[list[float], list[float], Recycler]:
    """Return how much longer blocks with a Recycler take, plain blocks, and the Recycler."""
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=10)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    example = torch.randn(2, 3, 32, 32)
    recycler = Recycler(model, example, optimizer, "redo", every=every, ratio=0.05).install()
    train(model, optimizer)
    more, plain = [], []
    for number in range(_ROUNDS):
        seconds = {}
        for attached in (True, False) if number % 2 else (False, True):
            if attached:
                recycler.attach()
            else:
                recycler.detach()
            seconds[attached] = train(model, optimizer)
        more.append(seconds[True] - seconds[False])
        plain.append(seconds[False])
    return more, plain, recycler


def main() -> None:
    """Print what a step with a reset takes longer, and one without."""
    more, plain, recycler = longer(_BLOCK)
    step = median(plain) / _BLOCK
    low, _, high = quantiles(more, n=4)
    print(f"plain step {1e3 * step:.1f} ms, {_ROUNDS} blocks of {_BLOCK} in turns")
    print(
        f"measured step with its reset: {1e3 * median(more):.1f} ms longer "
        f"(quartiles {1e3 * low:.1f}, {1e3 * high:.1f}); "
        f"at every={_EVERY}: {1 + median(more) / (_EVERY * step):.5f}"
    )
    counts = [reset.count for reset in recycler.log]
    print(f"{len(counts)} resets of {min(counts)} to {max(counts)} units")
    more, plain, _ = longer(_NEVER)
    print(f"steps that are not measured: {1 + median(more) / median(plain):.4f}")


if __name__ == "__main__":
    main()
