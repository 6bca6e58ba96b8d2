"""Which activation function a unit meets, and that its figures are those of what it gives.

Eight of sixteen units are dead behind the function, although their values before it vary.
"""

import re

import pytest
import torch
import torch.nn.functional as F
from helpers import Net
from torch import Tensor, nn

from fastplastic import profile

DEAD = torch.arange(16) % 2 == 0


def planted(forward, linear: bool, **layers: nn.Module) -> tuple[Net, Tensor]:
    """Return a net whose layer "a" has dead units, and an input."""
    torch.manual_seed(0)
    a = nn.Linear(6, 16) if linear else nn.Conv2d(3, 16, 3, padding=1)
    net = Net(forward, a=a, **{"b": nn.Linear(16, 4)} | layers).eval()
    with torch.no_grad():
        a.bias[DEAD] = -50.0
        a.bias[~DEAD] = 0.5
    return net, torch.randn(8, 6) if linear else torch.randn(4, 3, 8, 8)


def measured(net: nn.Module, x: Tensor):
    return profile(net, [(x, torch.zeros(len(x), dtype=torch.int64))])["a"]


def gate(net: Net, x: Tensor) -> Tensor:
    return net.g(x).sigmoid()


def by_hand(z: Tensor) -> Tensor:
    centred = z - z.mean(1, keepdim=True)
    return centred / (centred.pow(2).mean(1, keepdim=True) + 1e-5).sqrt()


class Twice(nn.Module):
    """An activation function behind a gate, in a module of its own."""

    def __init__(self, function: nn.Module) -> None:
        super().__init__()
        self.function = function

    def forward(self, z: Tensor) -> Tensor:
        return self.function(z * z.mean((2, 3), keepdim=True).sigmoid())


# forward, further layers, the activation function.
LINEAR = {
    "times a gate": (lambda s, x: s.b(F.relu(s.a(x) * gate(s, x))), "relu"),
    "times a number per sample": (lambda s, x: s.b(F.relu(s.a(x) * x[:, :1].exp())), "relu"),
    "by a norm": (lambda s, x: s.b(F.relu((z := s.a(x)) / z.norm(dim=0))), "relu"),
    "by the norm over units": (
        lambda s, x: s.b(F.relu((z := s.a(x)) / z.norm(dim=1, keepdim=True))), "relu"
    ),
    "by a constant norm": (lambda s, x: s.b(F.relu(s.a(x) / x.norm())), "relu"),
    "maximum": (lambda s, x: s.b(torch.maximum(s.a(x), torch.tensor(0.0))), "relu"),
    "maximum with zeros": (lambda s, x: s.b(torch.maximum(torch.zeros(16), s.a(x))), "relu"),
    "maximum with zeros like itself": (
        lambda s, x: s.b(torch.maximum(z := s.a(x), torch.zeros_like(z))), "relu"
    ),
    "asked for its shape and kind": (
        lambda s, x: s.b(F.relu((z := s.a(x)).view(-1, 16).type_as(z).view_as(z)
                                + torch.zeros_like(z))), "relu",
    ),
    "max of two": (lambda s, x: s.b(torch.max(s.a(x), torch.zeros_like(x[:, :1]))), "relu"),
    "clamp": (lambda s, x: s.b(s.a(x).clamp(min=0)), "relu"),
    "clamped at nothing": (
        lambda s, x: s.b(F.relu(s.a(x).clamp(-float("inf"), float("inf")))), "relu"
    ),
    "clamp_min": (lambda s, x: s.b(s.a(x).clamp_min(0)), "relu"),
    "clamp at 6": (lambda s, x: s.b(s.a(x).clamp(0, 6)), "relu6"),
    "threshold": (lambda s, x: s.b(F.threshold(s.a(x), 0, 0)), "relu"),
    "negative of negative": (lambda s, x: s.b(F.relu(s.a(x).neg().neg())), "relu"),
    "two readers of h": (lambda s, x: s.b(h := F.relu(s.a(x))) + s.c(h), "relu"),
    "two functions of z alike": (
        lambda s, x: s.b(F.relu(z := s.a(x))) + s.c(F.relu(z)), "relu"
    ),
    "reshaped as itself": (
        lambda s, x: s.b(F.relu((z := s.a(x)).flatten(0, 1).reshape_as(z))), "relu"
    ),
    "behind a LayerNorm": (lambda s, x: s.b(F.relu(F.layer_norm(s.a(x), (16,)))), "relu"),
    "behind a LayerNorm by hand": (lambda s, x: s.b(F.relu(by_hand(s.a(x)))), "relu"),
    "dropout": (lambda s, x: s.b(F.relu(F.dropout(s.a(x), 0.5, s.training))), "relu"),
    "a slice": (lambda s, x: s.b(torch.cat([F.relu((z := s.a(x))[:, :8]), z[:, 8:].relu()], 1)),
                "relu"),
}  # fmt: skip


@pytest.mark.parametrize(("forward", "function"), LINEAR.values(), ids=LINEAR.keys())
def test_dead_units_are_found_behind_what_stands_before_the_function(forward, function) -> None:
    net, x = planted(forward, True, g=nn.Linear(6, 16), c=nn.Linear(16, 4))
    found = measured(net, x)
    assert found.activation == function
    assert torch.equal(found.dead, DEAD) and torch.equal(found.dormant, DEAD)
    assert torch.equal(found.frozen, DEAD)


CONV = {
    "max_pool": (lambda s, x: s.b(F.relu(F.max_pool2d(s.a(x), 2)).mean((2, 3))), "relu"),
    "flattened": (lambda s, x: s.d(F.relu(F.max_pool2d(s.a(x), 2)).flatten(1)), "relu"),
    "avg_pool": (lambda s, x: s.d(F.relu(F.avg_pool2d(s.a(x), 2)).flatten(1)), "relu"),
    "squeeze and excite": (
        lambda s, x: s.b(s.act((z := s.a(x)) * s.e(z.mean((2, 3), keepdim=True)).sigmoid())
                         .mean((2, 3))), "relu",
    ),
    "its own mean": (lambda s, x: s.b(s.own(s.a(x)).mean((2, 3))), "relu"),
    "group norm": (lambda s, x: s.b(s.act(s.gn(s.a(x))).mean((2, 3))), "relu"),
    "instance norm": (lambda s, x: s.b(s.act(s.norm(s.a(x))).mean((2, 3))), "relu"),
    "norm behind a concat": (
        lambda s, x: s.b2(s.act(s.wide(torch.cat([x, s.a(x)], 1))).mean((2, 3))), "relu"
    ),
    "each consumer with a norm": (
        lambda s, x: s.b(F.relu(s.n1(z := s.a(x))).mean((2, 3)))
        + s.c(F.relu(s.n2(z)).mean((2, 3))), "relu",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("forward", "function"), CONV.values(), ids=CONV.keys())
def test_dead_channels_are_found(forward, function) -> None:
    net, x = planted(
        forward, False, c=nn.Linear(16, 4), d=nn.Linear(256, 4), e=nn.Conv2d(16, 16, 1),
        act=nn.ReLU(inplace=True), own=Twice(nn.ReLU()), gn=nn.GroupNorm(16, 16),
        norm=nn.InstanceNorm2d(16, affine=True), wide=nn.BatchNorm2d(19), b2=nn.Linear(19, 4),
        n1=nn.BatchNorm2d(16), n2=nn.BatchNorm2d(16),
    )  # fmt: skip
    with torch.no_grad():
        net.e.weight.zero_()
        for norm in (net.gn, net.norm):
            norm.bias[DEAD] = -50.0
            norm.bias[~DEAD] = 0.5
    found = measured(net, x)
    assert found.activation == function
    assert torch.equal(found.dead, DEAD) and torch.equal(found.dormant, DEAD)


def test_who_gives_a_shape_alone_is_not_on_the_way() -> None:
    """LeViT: the pre-activation is that behind the norm alone."""
    net, x = planted(
        lambda s, x: s.b(
            F.relu(s.n((z := s.a(x[:, None])).flatten(0, 1)).reshape_as(z))[:, 0]
        ), True, n=nn.BatchNorm1d(16),
    )  # fmt: skip
    layer = measured(net, x).wiring
    assert layer.norm == "n" and [(s.module, s.where) for s in layer.z_sites] == [("n", "output")]


def test_rows_whose_sum_no_hook_sees_are_known_by_what_they_add() -> None:
    """Heads whose outputs are averaged (distillation)."""
    net, x = planted(lambda s, x: (s.a(x) + s.c(x)) / 2, True, c=nn.Linear(6, 16))
    net.b = nn.Identity()
    layer = measured(net, x).wiring
    assert layer.activation == "identity"
    assert [(site.module, site.where) for site in layer.z_sites] == [("a", "output")]


def test_rows_that_are_picked_have_no_activation_function() -> None:
    net, x = planted(lambda s, x: s.b(s.a(x)[torch.arange(len(x)).flip(0)]), True)
    found = measured(net, x)
    assert found.activation == "identity" and found.measured.all() and not found.hidden.any()


def test_a_statistic_of_a_norm_does_not_count_beside_what_is_pooled() -> None:
    def forward(s: Net, x: Tensor) -> Tensor:
        z = s.a(x)
        normed = z * torch.rsqrt(z.pow(2).mean(1, keepdim=True) + 1e-6)
        return s.b(normed.mean((2, 3)))

    net, x = planted(forward, False)
    assert measured(net, x).activation == "identity"


UNKNOWN = {
    "a function of its own": (lambda s, x: s.b(torch.erf(s.a(x))), "erf is no activation function"),
    "swish by hand": (lambda s, x: s.b((z := s.a(x)) * z.sigmoid()), "mul is no activation"),
    "hardswish by hand": (lambda s, x: s.b((z := s.a(x)) * F.relu6(z + 3) / 6), "mul is no"),
    "maximum with a number": (
        lambda s, x: s.b(torch.maximum(s.a(x), torch.tensor(0.5))), "maximum is no activation"
    ),
    "minimum": (lambda s, x: s.b(torch.minimum(s.a(x), torch.tensor(0.0))), "minimum is no"),
    "maximum of two units": (lambda s, x: s.b(torch.maximum(s.a(x), s.g(x))), "through maximum"),
    "chosen by itself": (
        lambda s, x: s.b(torch.where((z := s.a(x)) > 0, z, 0.0)), "goes through"
    ),
    "times where it is positive": (lambda s, x: s.b((z := s.a(x)) * (z > 0)), "goes through gt"),
    "masked by itself": (lambda s, x: s.b((z := s.a(x)).masked_fill(z < 0, 0.0)), "goes through"),
    "sorted": (lambda s, x: s.b(s.a(x).sort(-1).values), "goes through sort"),
    "largest of two units": (lambda s, x: s.e(s.a(x).view(-1, 8, 2).amax(2)), "goes through amax"),
    "with and without": (
        lambda s, x: s.b(z := s.a(x)) + s.c(F.relu(z)), "several functions: identity, relu"
    ),
    "another function before pooling": (
        lambda s, x: s.b(F.relu(z := s.a(x))) + s.c(F.silu(z).view(-1, 1, 16).mean(1)),
        "functions: relu, silu",
    ),
    "two functions": (
        lambda s, x: s.b(torch.tanh(z := s.a(x))) + s.c(F.relu(z)), "functions: relu, tanh"
    ),
    "in place through a view": (
        lambda s, x: (z := s.a(x), F.relu_(z[:, :8]), s.b(z))[-1], "written in place through a view"
    ),
    "in place under a view": (
        lambda s, x: (v := (z := s.a(x)).unsqueeze(1), F.relu_(z), s.b(v.flatten(0, 1)))[-1],
        "written in place through a view",
    ),
    "not to be seen": (
        lambda s, x: s.b(F.gelu(s.a(x) * s.g(x).sigmoid())), "what goes into its activation .*gelu"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("forward", "reason"), UNKNOWN.values(), ids=UNKNOWN.keys())
def test_what_is_not_known_has_no_figures(forward, reason: str) -> None:
    """A number that looks right would be worse than none."""
    net, x = planted(
        forward, True, g=nn.Linear(6, 16), c=nn.Linear(16, 4), e=nn.Linear(8, 4)
    )  # fmt: skip
    found = measured(net, x)
    text = "; ".join(found.wiring.unknown)
    lost = torch.tensor([name == "unknown" for _, _, name in found.wiring.activations])
    assert lost.any()
    assert re.search(reason, text), text
    unknown = torch.zeros(16, dtype=torch.bool)
    for start, stop, name in found.wiring.activations:
        unknown[start:stop] = name == "unknown"
    assert int(unknown.sum()) == sum(found.wiring.unknown.values())
    assert not (found.dead | found.frozen | found.dormant)[unknown].any()
    assert found.saturated_fraction[unknown].isnan().all()
    assert found.dormant_score[unknown].isnan().all()


class Swish(nn.Module):
    """A function with the name of another."""

    def __init__(self, slope: float) -> None:
        super().__init__()
        self.slope = slope

    def forward(self, z: Tensor) -> Tensor:
        return z * torch.sigmoid(self.slope * z)


@pytest.mark.parametrize(("slope", "function"), [(1.0, "silu"), (4.0, "unknown")])
def test_a_class_is_not_taken_for_what_it_is_named(slope: float, function: str) -> None:
    net, x = planted(lambda s, x: s.b(s.act(s.a(x))), True, act=Swish(slope))
    assert measured(net, x).activation == function


def test_gradients_that_nothing_shows_are_named() -> None:
    net, x = planted(lambda s, x: s.e(F.relu(torch.cat([s.a(x), s.c(x)], 1)).mul(2)), True,
                     c=nn.Linear(6, 16), e=nn.Linear(32, 4))  # fmt: skip
    found = profile(net, [(x, torch.zeros(len(x), dtype=torch.int64))])
    assert found["a"].measured.all() and found["a"].to_dict()["mean_abs_gradient"] is None
    assert found.notes == (
        "no hook can see the gradients of activations of 2 layers (a, c): mean|g| is unknown",
    )
