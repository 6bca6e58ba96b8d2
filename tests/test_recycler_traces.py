"""Each preset against a few lines that say again what its paper does, over 2,000 steps."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from fastplastic import Recycler

STEPS = 2000


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 4)
    )


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    """Yield random batches with labels that are drawn anew every 400 steps."""
    draws = torch.Generator().manual_seed(1)
    for step in range(STEPS):
        if step % 400 == 0:
            teacher = torch.randn(12, 4, generator=draws)
        images = torch.randn(16, 12, generator=draws)
        yield images, (images @ teacher).argmax(1)


class Features:
    """The outputs of the ReLUs in the last forward pass."""

    def __init__(self, model: nn.Sequential) -> None:
        self.last: dict[str, Tensor] = {}
        for name, module in model.named_children():
            if isinstance(module, nn.ReLU):
                producer = str(int(name) - 1)
                module.register_forward_hook(self._keep(producer))

    def _keep(self, producer: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
            self.last[producer] = output.detach().double()

        return hook


def trace(
    method: str, expected: Callable[[nn.Sequential, Features, int], dict[str, list[int]]], **options
) -> int:
    """Train, and compare what is re-initialised in each step; return in how many anything was."""
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    features = Features(model)
    recycler = Recycler(model, torch.randn(2, 12), optimizer, method, **options)
    resets = 0
    for step, (images, labels) in enumerate(batches(), 1):
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        wanted = expected(model, features, step)
        reset = recycler.step()
        found = {} if reset is None else {n: u.tolist() for n, u in reset.units.items()}
        assert found == wanted, f"step {step}"
        resets += reset is not None
        optimizer.zero_grad()
    recycler.detach()
    return resets


def test_redo_chooses_what_its_paper_says() -> None:
    def expected(model: nn.Sequential, features: Features, step: int) -> dict[str, list[int]]:
        if step % 50:
            return {}
        found = {}
        for name, h in features.last.items():
            score = h.abs().mean(0) / (h.abs().mean() + 1e-9)
            found[name] = (score <= 0.1).nonzero().flatten().tolist()
        return {name: units for name, units in found.items() if units}

    assert trace("redo", expected, every=50, threshold=0.1) >= 10


def test_grama_chooses_what_its_paper_says() -> None:
    def expected(model: nn.Sequential, features: Features, step: int) -> dict[str, list[int]]:
        if step % 50:
            return {}
        found = {}
        for name in features.last:
            size = model[int(name)].weight.grad.double().abs().mean(1)
            found[name] = (size / size.mean() <= 0.3).nonzero().flatten().tolist()
        return {name: units for name, units in found.items() if units}

    assert trace("grama", expected, every=50, threshold=0.3) >= 10


class ContinualBackprop:
    """The published loop over layers, in float64: ages, utilities, fractional counts."""

    def __init__(self, rate: float, decay: float, maturity: int) -> None:
        self.rate, self.decay, self.maturity = rate, decay, maturity
        sizes = {"0": 32, "2": 24}
        self.age = {name: torch.zeros(size) for name, size in sizes.items()}
        self.utility = {name: torch.zeros(size).double() for name, size in sizes.items()}
        self.mean = {name: torch.zeros(size).double() for name, size in sizes.items()}
        self.count = dict.fromkeys(sizes, 0.0)
        self.bias: dict[str, Tensor] = {}

    def __call__(self, model: nn.Sequential, features: Features, step: int) -> dict[str, list[int]]:
        found = {}
        self.bias = {}
        for name, h in features.last.items():
            reader = model[int(name) + 2]
            self.age[name] += 1
            correction = 1 - self.decay ** self.age[name].double()
            self.mean[name] = self.decay * self.mean[name] + (1 - self.decay) * h.mean(0)
            new = reader.weight.detach().double().abs().mean(0) * h.abs().mean(0)
            self.utility[name] = self.decay * self.utility[name] + (1 - self.decay) * new
            eligible = (self.age[name] > self.maturity).nonzero().flatten()
            self.count[name] += self.rate * len(eligible)
            number = int(self.count[name])
            self.count[name] -= number
            if not number:
                continue
            corrected = (self.utility[name] / correction)[eligible]
            units = eligible[torch.topk(-corrected, number).indices]
            lost = reader.weight.detach().double()[:, units] * (self.mean[name] / correction)[units]
            self.bias[f"{int(name) + 2}"] = reader.bias.detach().double() + lost.sum(1)
            for values in (self.age, self.utility, self.mean):
                values[name][units] = 0
            found[name] = sorted(units.tolist())
        return found


def test_continual_backpropagation_chooses_what_its_paper_says() -> None:
    again = ContinualBackprop(rate=2e-3, decay=0.99, maturity=60)
    options = {"rate": 2e-3, "maturity": 60}
    assert trace("cbp", again, **options) >= 100


def test_continual_backpropagation_moves_the_lost_constant_into_the_bias() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    features, again = Features(model), ContinualBackprop(2e-3, 0.99, 60)
    recycler = Recycler(model, torch.randn(2, 12), optimizer, "cbp", rate=2e-3, maturity=60)
    seen = 0
    for step, (images, labels) in enumerate(batches(), 1):
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        again(model, features, step)
        reset = recycler.step()
        for name, units in () if reset is None else reset.units.items():
            reader = model[int(name) + 2]
            assert not reader.weight[:, units].any()
            fresh = reset.units.get(str(int(name) + 2), [])
            kept = [row for row in range(reader.out_features) if row not in fresh]
            wanted = again.bias[str(int(name) + 2)].float()[kept]
            torch.testing.assert_close(reader.bias.detach()[kept], wanted)
            seen += 1
        optimizer.zero_grad()
        if seen > 30:
            break
    assert seen > 30


def test_swr_chooses_what_its_paper_says() -> None:
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    recycler = Recycler(model, torch.randn(2, 12), optimizer, "swr", threshold=0.02)
    resets = 0
    for step, (images, labels) in enumerate(batches(), 1):
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
        utility = {
            name: (weight * weight.grad).abs().detach() for name, weight in model.named_parameters()
        }
        recycler.step()
        optimizer.zero_grad()
        for name, weight in model.named_parameters():
            chosen = torch.zeros_like(weight, dtype=torch.bool)
            # The head and the biases are never chosen.
            if step % 128 == 0 and name in ("0.weight", "2.weight"):
                chosen = utility[name] <= 0.02 * utility[name].mean()
                resets += bool(chosen.any())
            assert torch.equal(weight.detach() != before[name], chosen), f"{name} in step {step}"
    assert resets >= 20


def test_random_takes_as_many_as_asked_for_and_others_each_time() -> None:
    model = network()
    optimizer = torch.optim.Adam(model.parameters())
    recycler = Recycler(model, torch.randn(2, 12), optimizer, "random", ratio=0.25, every=100)
    for images, labels in batches():
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        recycler.step()
        optimizer.zero_grad()
    assert [reset.count for reset in recycler.log] == [14] * 20
    taken = {
        tuple(sorted((n, u) for n in r.units for u in r.units[n].tolist())) for r in recycler.log
    }
    assert len(taken) == 20
    assert all(reset.overlap < 0.7 for reset in recycler.log[1:])


@pytest.mark.parametrize("name", ["regrama", "custom"])
def test_other_names(name: str) -> None:
    model = network()
    optimizer = torch.optim.Adam(model.parameters())
    options = {"criterion": "gradient", "ratio": 0.1} if name == "custom" else {}
    recycler = Recycler(model, torch.randn(2, 12), optimizer, name, **options)
    assert recycler.method.criterion == "gradient"
