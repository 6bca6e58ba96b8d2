import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from fastplastic.errors import InputError
from fastplastic.training import L2Init


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, strength: float) -> None:
    """Train with the term in the loss."""
    begun = [p.detach().clone() for p in model.parameters()]
    draws = torch.Generator().manual_seed(0)
    for _ in range(20):
        images = torch.randn(8, 4, generator=draws)
        loss = cross_entropy(model(images), images[:, :3].argmax(1))
        pairs = zip(model.parameters(), begun, strict=True)
        term = sum((p - w).square().sum() for p, w in pairs)
        optimizer.zero_grad()
        (loss + strength * term).backward()
        optimizer.step()


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_it_is_the_gradient_of_the_term(kind: type[torch.optim.Optimizer]) -> None:
    found = []
    for hooked in (False, True):
        model = network()
        optimizer = kind(model.parameters(), 0.05)
        if hooked:
            L2Init(model, optimizer, strength=0.1)
        train(model, optimizer, 0.0 if hooked else 0.1)
        found.append([p.detach() for p in model.parameters()])
    for own, wanted in zip(*found, strict=True):
        torch.testing.assert_close(own, wanted, atol=1e-5, rtol=1e-5)


def test_it_ends_and_goes_on_from_its_state() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    pull = L2Init(model, optimizer, strength=0.1)
    state = {name: weight + 1 for name, weight in pull.state_dict().items()}
    pull.load_state_dict(state)
    model(torch.randn(2, 4)).sum().backward()
    model[0].weight.grad.zero_()
    optimizer.step()
    torch.testing.assert_close(model[0].weight.grad, torch.full((8, 4), -0.2))
    pull.remove()
    assert not optimizer._optimizer_step_pre_hooks
    with pytest.raises(InputError, match="the state is of another model"):
        pull.load_state_dict({})


@pytest.mark.parametrize("strength", [0.0, -1.0, float("nan")])
def test_a_strength_that_means_nothing(strength: float) -> None:
    model = network()
    with pytest.raises(InputError, match=r"strength is .*, expected more than 0"):
        L2Init(model, torch.optim.SGD(model.parameters(), 0.1), strength=strength)


def test_two_on_one_model() -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    first = L2Init(model, optimizer)
    with pytest.raises(InputError, match="an L2Init pulls this model already"):
        L2Init(model, optimizer)
    first.remove()
    L2Init(model, optimizer)
