"""A Recycler in a plain loop of Accelerate, which needs nothing of its own."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from fastplastic import Monitor, Recycler


@pytest.fixture(autouse=True)
def fresh_accelerator() -> Iterator[None]:
    """Accelerate keeps its settings for the whole process, other tests' among them."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3)
    )


def batches() -> DataLoader:
    draws = torch.Generator().manual_seed(1)
    images = torch.randn(192, 8, generator=draws)
    labels = (images[:, 0] > 0).long() + (images[:, 1] > 0).long()
    return DataLoader(list(zip(images, labels, strict=True)), batch_size=8)


class AcceleratedLoop:
    """A loop over 24 batches, two to a step of the optimizer."""

    def __init__(self, *, installed: bool, **options) -> None:
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, **options)
        model = network()
        self.model, self.optimizer, self.loader = self.accelerator.prepare(
            model, torch.optim.Adam(model.parameters(), 1e-2), batches()
        )
        self.recycler = Recycler(
            self.accelerator.unwrap_model(self.model), torch.randn(2, 8), self.optimizer, "grama",
            every=4, threshold=0.6,
        )  # fmt: skip
        self.installed = installed
        if installed:
            self.recycler.install()

    def run(self, first: int = 0, last: int = 24) -> None:
        for number, (images, labels) in enumerate(self.loader):
            if not first <= number < last:
                continue
            with self.accelerator.accumulate(self.model):
                self.accelerator.backward(cross_entropy(self.model(images), labels))
                self.optimizer.step()
                if not self.installed:
                    self.recycler.step()
                self.optimizer.zero_grad()

    def values(self) -> list[Tensor]:
        weights = list(self.model.parameters())
        return weights + [v for p in weights for v in self.optimizer.state[p].values()]


def by_hand(every: int) -> tuple[list[Tensor], list[dict]]:
    """Return the same of a loop without Accelerate."""
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    recycler = Recycler(model, torch.randn(2, 8), optimizer, "grama", every=every, threshold=0.6)
    for number, (images, labels) in enumerate(batches(), 1):
        (cross_entropy(model(images), labels) / 2).backward()
        if number % 2 == 0:
            optimizer.step()
            recycler.step()
            optimizer.zero_grad()
    weights = list(model.parameters())
    values = weights + [v for p in weights for v in optimizer.state[p].values()]
    return values, [reset.to_dict() for reset in recycler.log]


@pytest.mark.parametrize("installed", [False, True])
def test_accumulated_batches_are_one_step(installed: bool) -> None:
    loop = AcceleratedLoop(installed=installed)
    loop.run()
    assert loop.recycler.steps == 12
    assert [reset.step for reset in loop.recycler.log] == [4, 8, 12]
    values, log = by_hand(every=4)
    assert [reset.to_dict() for reset in loop.recycler.log] == log
    assert all(map(torch.equal, loop.values(), values))


def test_a_checkpoint_of_accelerate_keeps_the_recycler(tmp_path: Path) -> None:
    whole = AcceleratedLoop(installed=True)
    whole.run()
    first = AcceleratedLoop(installed=True)
    first.accelerator.register_for_checkpointing(first.recycler)
    first.run(last=10)
    first.accelerator.save_state(tmp_path)
    second = AcceleratedLoop(installed=True)
    second.accelerator.register_for_checkpointing(second.recycler)
    second.accelerator.load_state(tmp_path)
    second.run(first=10)
    assert all(map(torch.equal, second.values(), whole.values()))
    assert [r.to_dict() for r in second.recycler.log] == [r.to_dict() for r in whole.recycler.log]


def test_in_mixed_precision_units_are_found_beneath_autocast() -> None:
    loop = AcceleratedLoop(installed=True, mixed_precision="bf16")
    patched = loop.model.forward
    assert set(loop.recycler._sizes) == {"0", "2"} and loop.model.forward == patched
    loop.run()
    assert [reset.step for reset in loop.recycler.log] == [4, 8, 12]


def test_mixed_precision_is_left_on_the_model() -> None:
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    model = accelerator.prepare(network())
    before = vars(model)["forward"]
    with Monitor(model, torch.randn(2, 8)) as monitor:
        model(torch.randn(4, 8)).sum().backward()
    assert vars(model)["forward"] is before
    assert monitor.compute().coverage.measured == 3
