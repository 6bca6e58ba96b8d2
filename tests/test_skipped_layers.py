"""Layers whose activations no hook sees: what is measured of them, and what is said."""

import pytest
import torch
from helpers import Net
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

from fastplastic import Profile, plan, profile
from fastplastic.cli import render
from fastplastic.cli.report import report_of
from fastplastic.graph import build_graph

X = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(0))
OWN = "computes it without calling a module of its own"


class Fused(nn.Module):
    """Attention with a bias that is put together of two, as in EVA, BEiT and SwinV2."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(6, 18, bias=False), nn.Linear(6, 6)
        self.q_bias, self.v_bias = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        bias = torch.cat([self.q_bias, torch.zeros(6), self.v_bias])
        q, k, v = F.linear(x, self.qkv.weight, bias).chunk(3, -1)
        return self.proj(F.scaled_dot_product_attention(q, k, v))


class Relative(nn.Module):
    """A product with a bare parameter, as with the relative positions of HaloNet."""

    def __init__(self) -> None:
        super().__init__()
        self.width_rel, self.out = nn.Parameter(torch.randn(5, 6)), nn.Linear(5, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.out((x @ self.width_rel.T).relu() * 2.0)


def net(part: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return Net(lambda s, x: s.head(s.part(x).mean(1)), part=part, head=nn.Linear(6, 3)).eval()


def measured(model: nn.Module) -> Profile:
    return profile(model, [(X, torch.zeros(4, dtype=torch.int64))])


@pytest.mark.parametrize(
    ("part", "name", "what"),
    [
        (Fused, "part.qkv", f"its value: Fused {OWN}"),
        (
            Relative,
            "part.width_rel",
            f"what goes into its activation function (relu): Relative {OWN}",
        ),
    ],
)
def test_weights_and_gradients_are_measured_without_a_hook(
    part: type[nn.Module], name: str, what: str
) -> None:
    model = net(part())
    found = measured(model)
    row = found[name]
    assert bool((row.stats["n_dw"] > 0).all()) and not row.no_gradient
    weight = model.get_parameter(row.wiring.weight)
    (gradient,) = torch.autograd.grad(
        F.cross_entropy(model(X), torch.zeros(4, dtype=torch.int64)), weight
    )
    expected = gradient.abs().sum(1).double()
    torch.testing.assert_close(row.stats["sum_abs_dw"], expected, rtol=1e-4, atol=1e-9)
    figures = row.to_dict()
    keys = ("dead", "frozen", "dormant", "saturated_fraction", "mean_abs_activation")
    assert [figures[key] for key in keys] == [None] * 5
    assert figures["unknown"] == {f"no hook can see {what}": row.n_units}
    assert (found.coverage.found, found.coverage.measured) == (3, 2)
    reason = f"no hook can see {what}; its weights and their gradients are measured"
    assert found.coverage.skipped == ((name, reason),)


def test_scores_of_gradients_choose_units_without_activations() -> None:
    found = measured(net(Fused()))
    chosen = plan(found, criterion="gradient", include=["part.qkv"], ratio=0.5)
    units = chosen.units["part.qkv"]
    assert len(units) == 3 and bool((units >= 12).all())
    assert torch.isnan(found.score("dormant")["part.qkv"]).all()


def test_a_frozen_weight_has_no_gradient() -> None:
    model = net(Fused())
    model.part.qkv.weight.requires_grad_(False)
    ((_, reason),) = measured(model).coverage.skipped
    assert reason == f"no hook can see its value: Fused {OWN}; its weights are measured"


def test_computed_weights_are_not_called_measured() -> None:
    model = net(Fused())
    nn.utils.parametrizations.weight_norm(model.part.qkv)
    assert dict(measured(model).coverage.skipped)["part"] == "no hook can see its value"


def test_the_note_says_that_activations_are_missing() -> None:
    (note,) = measured(net(Fused())).notes
    assert note.startswith("activations of 18 units are not measured, in 1 layer (part.qkv): ")


def test_the_report_counts_layers_with_activations() -> None:
    console = Console(width=400)
    with console.capture() as capture:
        console.print(render.summary(report_of(measured(net(Fused())), ())))
    assert "2 of 3 weight layers measured; part.qkv skipped: no hook can" in capture.get()


class Computed(nn.Module):
    """Two layers of different sizes with weights that are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(3, 6)), nn.Parameter(torch.randn(6, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.a * 2).relu(), self.b * 2)


def test_computed_weights_of_one_module_are_several_layers() -> None:
    graph = build_graph(net(Computed()), X)
    assert [(layer.name, layer.n_units) for layer in graph.layers] == [
        ("part", 3), ("part.b", 6), ("head", 3),
    ]  # fmt: skip
    for name in ("part", "part.b"):
        assert graph[name].reasons == {"its weight is transformed before use": graph[name].n_units}
