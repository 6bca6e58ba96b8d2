"""Whole matrices moved to the nearest orthogonal one."""

import copy
import math

import pytest
import timm
import torch
from torch import Tensor, nn

from fastplastic.errors import InputError
from fastplastic.reinit import fire_, forget


def polar(matrix: Tensor) -> Tensor:
    """Return the exact polar factor, by the singular value decomposition."""
    left, _, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    return left @ right


@pytest.mark.parametrize("shape", [(24, 16), (16, 24), (16, 16), (1, 5), (5, 1)])
def test_a_linear_layer_becomes_its_polar_factor(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(shape[1], shape[0]))
    before = model[0].weight.detach().clone()
    bias = model[0].bias.detach().clone()
    fire_(model, iterations=30)
    wanted = polar(before) * math.sqrt(shape[0] / shape[1])
    torch.testing.assert_close(model[0].weight.double(), wanted, atol=1e-5, rtol=1e-4)
    assert torch.equal(model[0].bias, bias)


def test_ten_iterations_are_those_of_the_authors() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3))
    weight = model[0].weight.detach().clone()
    fire_(model)
    for i in range(3):
        for j in range(3):
            x = weight[:, :, i, j] / weight[:, :, i, j].norm()
            for _ in range(10):
                x = 1.5 * x - 0.5 * x @ x.T @ x
            wanted = x * math.sqrt(8 / 3) / 9
            torch.testing.assert_close(model[0].weight[:, :, i, j].detach(), wanted)


def test_query_key_and_value_are_moved_one_by_one() -> None:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", depth=1, embed_dim=48, num_classes=4)
    name = "blocks.0.attn.qkv"
    before = model.get_submodule(name).weight.detach().clone()
    fire_(model, include=[name], iterations=60)
    for part, old in zip(model.get_submodule(name).weight.chunk(3), before.chunk(3), strict=True):
        torch.testing.assert_close(part.double(), polar(old), atol=1e-4, rtol=1e-3)


def test_what_is_left_alone() -> None:
    model = timm.create_model("mobilenetv2_050", num_classes=4)
    before = copy.deepcopy(model.state_dict())
    written = {entry.name for entry in fire_(model, exclude=["classifier"])}
    changed = {name for name, value in model.state_dict().items() if not value.equal(before[name])}
    assert changed == written and "classifier.weight" not in written
    grouped = {n for n, m in model.named_modules() if getattr(m, "groups", 1) > 1}
    assert grouped and not {f"{name}.weight" for name in grouped} & written


def test_the_optimizer_forgets_what_it_knew() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(4, 6)).sum().backward()
    optimizer.step()
    fire_(model, include=["0"], optimizer=optimizer)
    state = optimizer.state
    assert not state[model[0].weight]["exp_avg"].any() and state[model[0].weight]["step"] == 0
    assert state[model[0].bias]["exp_avg"].any() and state[model[2].weight]["exp_avg"].any()


def test_nothing_is_written_when_anything_fails() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 2))
    with torch.no_grad():
        model[1].weight[0, 0] = math.nan
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match=r"1.weight is NaN or infinite, expected numbers: mend"):
        fire_(model)
    assert model[0].weight.equal(before["0.weight"])


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"iterations": 0}, "iterations is 0, expected an integer of at least 1"),
        ({"include": ["layer9"]}, "include: no layer 'layer9' among 1"),
        ({"exclude": ["*"]}, "no linear layer or convolution is left"),
    ],
)
def test_what_cannot_be_done(options: dict, text: str) -> None:
    with pytest.raises(InputError, match=text):
        fire_(nn.Sequential(nn.Linear(3, 3)), **options)


def test_a_weight_of_zeros() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    nn.init.zeros_(model[0].weight)
    with pytest.raises(InputError, match=r"0.weight is 0 throughout"):
        fire_(model)


def test_everything_is_as_before_when_the_optimizer_fails(monkeypatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 2))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(4, 6)).sum().backward()
    optimizer.step()
    weights, state = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))

    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(forget, "step_of", fail)
    with pytest.raises(MemoryError):
        fire_(model, optimizer=optimizer)
    assert all(map(torch.equal, weights.values(), model.state_dict().values()))
    for now, then in zip(optimizer.state_dict()["state"].values(), state.values(), strict=True):
        assert all(map(torch.equal, now.values(), then.values()))
