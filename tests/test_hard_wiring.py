"""Wirings that are hard to reset, from `profile` over `plan` to `reinit_`."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import Net
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from fastplastic import FastPlasticError, plan, profile, reinit_


def net(forward, **layers) -> Net:
    """Return the model in eval mode, with values that no reset would write."""
    model = Net(forward, **layers).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                drawn = torch.rand(tensor.shape, generator=generator)
                # Norms and running variances stay positive.
                tensor.copy_(drawn + 0.5 if tensor.dim() == 1 else (drawn - 0.4) / 2)
    return model


def rows(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def measured(model: nn.Module, x: Tensor):
    return profile(model, [(x, torch.arange(len(x)) % 3)])


def grouped() -> tuple[nn.Module, Tensor]:
    model = net(
        lambda s, x: s.head(F.relu(s.b(F.relu(s.bn(s.a(x))))).mean((2, 3))),
        a=nn.Conv2d(4, 8, 3, groups=2), bn=nn.BatchNorm2d(8), b=nn.Conv2d(8, 12, 1, groups=4),
        head=nn.Linear(12, 3),
    )  # fmt: skip
    return model, rows(6, 4, 6, 6)


def depthwise() -> tuple[nn.Module, Tensor]:
    model = net(
        lambda s, x: s.head(s.out(F.relu6(s.n2(s.dw(F.relu6(s.n1(s.up(x))))))).mean((2, 3))),
        up=nn.Conv2d(3, 12, 1), n1=nn.BatchNorm2d(12), dw=nn.Conv2d(12, 12, 3, groups=12),
        n2=nn.BatchNorm2d(12), out=nn.Conv2d(12, 8, 1), head=nn.Linear(8, 3),
    )  # fmt: skip
    return model, rows(6, 3, 6, 6)


def flattened() -> tuple[nn.Module, Tensor]:
    model = net(
        lambda s, x: s.head(F.relu(s.fc(F.relu(s.conv(x)).flatten(1)))),
        conv=nn.Conv2d(3, 8, 3), fc=nn.Linear(32, 12), head=nn.Linear(12, 3),
    )  # fmt: skip
    return model, rows(6, 3, 4, 4)


def fused_qkv() -> tuple[nn.Module, Tensor]:
    def forward(s: Net, x: Tensor) -> Tensor:
        q, k, v = s.qkv(x).reshape(*x.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return s.head((x + s.proj(mixed)).mean(1))

    model = net(forward, qkv=nn.Linear(8, 24), proj=nn.Linear(8, 8), head=nn.Linear(8, 3))
    return model, rows(6, 5, 8)


def swiglu() -> tuple[nn.Module, Tensor]:
    model = net(
        lambda s, x: s.head(s.down(F.silu(s.gate(x)) * s.up(x)) + x),
        gate=nn.Linear(6, 16), up=nn.Linear(6, 16), down=nn.Linear(16, 6), head=nn.Linear(6, 3),
    )  # fmt: skip
    return model, rows(6, 6)


def packed_swiglu() -> tuple[nn.Module, Tensor]:
    def forward(s: Net, x: Tensor) -> Tensor:
        gate, value = s.packed(x).chunk(2, -1)
        return s.head(s.down(F.silu(gate) * value) + x)

    model = net(forward, packed=nn.Linear(6, 32), down=nn.Linear(16, 6), head=nn.Linear(6, 3))
    return model, rows(6, 6)


HIDDEN = {
    grouped: {"a": 8, "b": 12},
    depthwise: {"up": 12, "out": 8},
    flattened: {"conv": 8, "fc": 12},
    fused_qkv: {"qkv": 8},
    swiglu: {"gate": 16},
    packed_swiglu: {"packed": 16},
}
NORM = ("weight", "bias", "running_mean", "running_var")
MBCONV = (*(f"{n}.{k}" for n in ("up", "dw") for k in NORM[:2]),
          *(f"{n}.{k}" for n in ("n1", "n2") for k in NORM))  # fmt: skip
EVERY = slice(None)
# Layer, unit of it, {what a reset of it writes: index}, {the columns that become zero: index}.
ONE_UNIT = {
    grouped: ("a", 1, dict.fromkeys(("a.weight", "a.bias", *(f"bn.{k}" for k in NORM)), 1),
              {"b.weight": (slice(0, 3), 1)}),
    depthwise: ("up", 1, dict.fromkeys(MBCONV, 1), {"out.weight": (EVERY, 1)}),
    flattened: ("conv", 1, {"conv.weight": 1, "conv.bias": 1},
                {"fc.weight": (EVERY, slice(4, 8))}),
    # The value channels come last: 17 is the second of them.
    fused_qkv: ("qkv", 17, {"qkv.weight": 17, "qkv.bias": 17}, {"proj.weight": (EVERY, 1)}),
    swiglu: ("gate", 1, {f"{n}.{k}": 1 for n in ("gate", "up") for k in NORM[:2]},
             {"down.weight": (EVERY, 1)}),
    packed_swiglu: ("packed", 1, {"packed.weight": [1, 17], "packed.bias": [1, 17]},
                    {"down.weight": (EVERY, 1)}),
}  # fmt: skip


@pytest.mark.parametrize("build", HIDDEN)
def test_reset_units_have_no_effect(build):
    """Whatever their incoming weights are: all that reads them was found and is zero."""
    model, x = build()
    found = measured(model, x)
    hidden = {layer.name: int(layer.hidden.sum()) for layer in found if layer.hidden.any()}
    assert hidden == HIDDEN[build]
    made = plan(found, criterion="random", ratio=0.25, scope="layer")
    quarter = {name: count // 4 for name, count in hidden.items()}
    assert {name: len(units) for name, units in made.units.items()} == quarter
    before = model(x)
    reinit_(model, made)
    output = model(x)
    assert not torch.allclose(output, before)
    with torch.no_grad():
        for name, units in made.units.items():
            for tensor in (model.get_parameter(f"{name}.{key}") for key in ("weight", "bias")):
                # A column that is zero on purpose stays so.
                tensor[units] = torch.where(tensor[units] == 0, 0.0, tensor[units] + 9)
        torch.testing.assert_close(model(x), output, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("build", ONE_UNIT)
def test_all_of_one_unit_is_written_and_nothing_else(build):
    model, x = build()
    name, unit, written, zeroed = ONE_UNIT[build]
    with torch.no_grad():
        # Now it is the only unit whose activation is the same everywhere.
        model.get_parameter(f"{name}.weight")[unit] = 0
    made = plan(measured(model, x), criterion="dead", threshold=1e-6, include=name)
    assert {key: units.tolist() for key, units in made.units.items()} == {name: [unit]}
    before = copy.deepcopy(model.state_dict())
    reinit_(model, made, init="kaiming_uniform")
    for key, tensor in model.state_dict().items():
        expected = torch.zeros_like(tensor, dtype=torch.bool)
        for part in (written, zeroed):
            if key in part:
                expected[part[key]] = True
        assert torch.equal(tensor != before[key], expected), key
    assert all((model.state_dict()[key][index] == 0).all() for key, index in zeroed.items())


def two_tied_layers() -> tuple[nn.Module, Tensor]:
    model = net(
        lambda s, x: s.head(F.relu(s.free(F.relu(s.b(F.relu(s.a(x))))))),
        a=nn.Linear(6, 6), b=nn.Linear(6, 6), free=nn.Linear(6, 8), head=nn.Linear(8, 3),
    )  # fmt: skip
    model.b.weight = model.a.weight
    return model, rows(16, 6)


def tied_embedding() -> tuple[nn.Module, Tensor]:
    model = net(
        lambda s, x: s.head(F.relu(s.a(F.relu(s.free(s.embed(x).mean(1)))))),
        embed=nn.Embedding(11, 6), free=nn.Linear(6, 8), a=nn.Linear(8, 6),
        head=nn.Linear(6, 11, bias=False),
    )  # fmt: skip
    model.head.weight = model.embed.weight
    return model, torch.arange(80).reshape(16, 5) % 11


def called_twice() -> tuple[nn.Module, Tensor]:
    model = net(
        lambda s, x: s.head(F.relu(s.free(F.relu(s.a(F.relu(s.a(x))))))),
        a=nn.Linear(6, 6), free=nn.Linear(6, 8), head=nn.Linear(8, 3),
    )  # fmt: skip
    return model, rows(16, 6)


def parametrised(wrap) -> tuple[nn.Module, Tensor]:
    model = net(
        lambda s, x: s.head(F.relu(s.free(F.relu(s.a(x))))),
        a=wrap(nn.Linear(6, 6)), free=nn.Linear(6, 8), head=nn.Linear(8, 3),
    )  # fmt: skip
    return model, rows(16, 6)


def weight_norm() -> tuple[nn.Module, Tensor]:
    return parametrised(parametrizations.weight_norm)


def spectral_norm() -> tuple[nn.Module, Tensor]:
    return parametrised(parametrizations.spectral_norm)


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (two_tied_layers, "its weight is that of b, too (6)"),
        (tied_embedding, "whose weight is used more than once (6)"),
        (called_twice, "its weight is used 2 times (6)"),
        (weight_norm, "its weight is transformed before use (6)"),
        (spectral_norm, "its weight is transformed before use (6)"),
    ],
)
def test_layers_that_cannot_be_reset_are_measured_and_stay(build, reason):
    model, x = build()
    found = measured(model, x)
    assert found["a"].stats["n"].min() >= 16 and not found["a"].hidden.any()
    assert found["a"].reason.endswith(reason)
    # A tied weight is named by each of its layers.
    layers = 2 if build is two_tied_layers else 1
    with pytest.raises(
        FastPlasticError, match=rf"^none of the {layers} chosen layers has a hidden unit \(mostly: "
    ):
        plan(found, criterion="random", ratio=0.5, include="a")
    made = plan(found, criterion="random", ratio=1.0, max_layer_fraction=1.0)
    assert set(made.units) == {"free"} and made.count == 8
    before = copy.deepcopy(model.state_dict())
    reinit_(model, made)
    changed = {k for k, value in model.state_dict().items() if not torch.equal(value, before[k])}
    reader = "a.weight" if build is tied_embedding else "head.weight"
    assert changed == {"free.weight", "free.bias", reader}


def test_computed_weights_are_not_said_to_have_no_gradient():
    found = measured(*weight_norm())
    assert found["a"].stats["n_g"].min() > 0
    assert found.notes == (
        "the weights of 1 layer (a) are computed from others: gradient scores are unknown there",
    )
