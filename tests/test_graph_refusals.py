"""What the unit graph gives up on, and with which reason; and what tracing leaves alone."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.traced import ROWS, Net, columns, graph_of, layer
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from fastplastic.graph import build_graph
from fastplastic.graph.rules import RULES


@pytest.mark.parametrize(
    ("mix", "reason"),
    [
        (lambda x: F.layer_norm(x, (4,)), "mixed by LayerNorm"),
        (lambda x: x.softmax(-1), "mixed by a softmax"),
        (lambda x: x / x.norm(dim=-1, keepdim=True), "mixed by linalg_vector_norm over units"),
        (lambda x: x.sort(-1).values, "passes through sort, which may mix units"),
        (lambda x: x.cumsum(-1), "mixed by cumsum over units"),
    ],
)
def test_operators_that_mix_units_make_them_not_hidden(mix: Any, reason: str) -> None:
    net = Net(lambda s, x: s.b(mix(s.a(x))), a=nn.Linear(6, 4), b=nn.Linear(4, 2))
    a = layer(graph_of(net, ROWS), "a")
    assert not a.hidden.any() and list(a.reasons) == [reason]


def test_a_constant_behind_the_activation_function_goes_with_the_column() -> None:
    net = Net(lambda s, x: s.b(2 * s.a(x).relu() + 1), a=nn.Linear(6, 4), b=nn.Linear(4, 2))
    a = layer(graph_of(net, ROWS), "a")
    assert a.hidden.all() and a.activation == "relu" and columns(a) == {"b": [0, 1, 2, 3]}


def heads(net: nn.Module) -> list[str]:
    return [unit_layer.name for unit_layer in graph_of(net, ROWS).layers if unit_layer.head]


def test_what_makes_the_output_is_the_head() -> None:
    parts = {name: nn.Linear(6, 6) for name in "abcd"}
    assert heads(Net(lambda s, x: s.b(F.relu(s.a(x))), **parts)) == ["layers.b"]
    # Two heads, averaged or not; a stream goes on to both of them.
    several = Net(lambda s, x: (h := x + s.a(x), (s.b(h) + s.c(h.relu())) / 2, s.d(h))[1:], **parts)
    assert heads(several) == ["layers.b", "layers.c", "layers.d"]
    # Its first call is read by its second one.
    assert heads(Net(lambda s, x: s.a(F.relu(s.a(x))), a=parts["a"])) == []


def test_of_a_model_that_cannot_be_traced_the_last_layer_is_the_head() -> None:
    net = Net(lambda s, x: s.b(s.a(x)) if x.sum() > 0 else x, a=nn.Linear(6, 6), b=nn.Linear(6, 6))
    graph = build_graph(net, ROWS)
    assert graph.note is not None
    assert [unit_layer.head for unit_layer in graph.layers] == [False, True]


@pytest.mark.parametrize("wrap", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_transformed_weights_are_not_resettable(wrap: Any) -> None:
    net = Net(
        lambda s, x: s.c(F.relu(s.b(F.relu(s.a(x))))),
        a=nn.Linear(6, 4), b=wrap(nn.Linear(4, 4)), c=nn.Linear(4, 2),
    )  # fmt: skip
    graph = graph_of(net, ROWS)
    assert layer(graph, "b").transformed and not layer(graph, "b").hidden.any()
    assert layer(graph, "a").reasons == {
        "read by layers.b, whose weight is transformed before use": 4
    }


def test_a_layer_called_twice_is_not_resettable() -> None:
    net = Net(
        lambda s, x: s.head(F.relu(s.twice(F.relu(s.twice(x))))),
        twice=nn.Linear(6, 6),
        head=nn.Linear(6, 2),
    )
    graph = graph_of(net, ROWS)
    assert layer(graph, "twice").reasons == {"its weight is used 2 times": 6}
    assert [x.name for x in graph.layers] == ["layers.twice", "layers.head"]
    assert layer(graph, "twice").z_sites


def test_weights_shared_by_two_layers_are_not_resettable() -> None:
    a, b = nn.Linear(6, 6), nn.Linear(6, 6)
    b.weight = a.weight
    graph = graph_of(
        Net(lambda s, x: s.c(s.b(s.a(x).relu()).relu()), a=a, b=b, c=nn.Linear(6, 2)), ROWS
    )
    assert not layer(graph, "a").hidden.any()
    assert graph.skipped == ()


def test_writing_through_a_view_gives_the_units_up() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        x = s.a(x)
        x[:, :2] = 0
        return s.b(x)

    a = layer(graph_of(Net(forward, a=nn.Linear(6, 4), b=nn.Linear(4, 2)), ROWS), "a")
    assert not a.hidden.any() and "written in place through a view" in a.reasons


def test_in_place_activation_is_seen_by_later_readers() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        x = s.a(x)
        F.relu_(x)
        return s.b(x)

    a = layer(graph_of(Net(forward, a=nn.Linear(6, 4), b=nn.Linear(4, 2)), ROWS), "a")
    assert a.hidden.all() and a.activation == "relu"


def test_blur_with_a_fixed_filter_is_no_weight_layer() -> None:
    blur = torch.ones(4, 1, 3, 3) / 9
    net = Net(
        lambda s, x: s.b(F.conv2d(F.relu(s.a(x)), blur, groups=4)),
        a=nn.Conv2d(3, 4, 1),
        b=nn.Conv2d(4, 2, 1),
    )
    graph = graph_of(net)
    assert [x.name for x in graph.layers] == ["layers.a", "layers.b"]
    assert layer(graph, "a").hidden.all()


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (F.relu6, "relu6"), (F.leaky_relu, "leaky_relu"),
        (lambda x: F.leaky_relu(x, 0.1), "leaky_relu:0.1"),
        (F.elu, "elu"), (F.selu, "selu"), (lambda x: F.gelu(x, approximate="tanh"), "gelu_tanh"),
        (F.mish, "mish"), (F.softplus, "softplus"), (F.hardswish, "hardswish"),
        (torch.tanh, "tanh"),
        (F.hardtanh, "hardtanh"), (torch.sigmoid, "sigmoid"), (torch.erf, "unknown"),
        (torch.sin, "unknown"),
        (lambda x: x * torch.sigmoid(x), "unknown"),
    ],
)  # fmt: skip
def test_functional_activations_are_recognised(function: Any, name: str) -> None:
    net = Net(lambda s, x: s.b(function(s.a(x))), a=nn.Linear(6, 4), b=nn.Linear(4, 2))
    a = layer(graph_of(net, ROWS), "a")
    assert a.activation == name and a.hidden.all()
    assert (not a.z_sites) == (name == "unknown")


def test_an_operator_that_its_rule_cannot_read_gives_the_units_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_: Any) -> None:
        raise AttributeError

    monkeypatch.setitem(RULES, "relu", broken)
    net = Net(lambda s, x: s.b(F.relu(s.a(x))), a=nn.Linear(6, 4), b=nn.Linear(4, 2))
    a = layer(graph_of(net, ROWS), "a")
    assert a.reasons == {"passes through relu, which may mix units": 4}


def test_numbers_to_the_power_of_units_are_no_activation_function() -> None:
    net = Net(lambda s, x: s.b(2.0 ** s.a(x)), a=nn.Linear(6, 4), b=nn.Linear(4, 2))
    assert not layer(graph_of(net, ROWS), "a").hidden.any()


def test_layers_that_are_not_run_are_skipped_with_the_reason() -> None:
    net = Net(lambda s, x: s.a(x), a=nn.Linear(6, 4), unused=nn.Linear(4, 2))
    assert graph_of(net, ROWS).skipped == (
        ("layers.unused", "not reached in the traced forward pass"),
    )


def test_without_a_trace_the_modules_are_listed_and_nothing_is_resettable() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        return s.b(s.a(x)) if float(x.sum()) > 0 else s.a(x)

    graph = build_graph(Net(forward, a=nn.Linear(6, 4), b=nn.Linear(4, 2)), ROWS)
    assert graph.note is not None and "could not be traced" in graph.note
    assert [(x.name, x.n_units, int(x.hidden.sum())) for x in graph.layers] == [
        ("layers.a", 4, 0), ("layers.b", 2, 0),
    ]  # fmt: skip


def test_tracing_leaves_modes_and_random_state_alone() -> None:
    net = Net(
        lambda s, x: s.b(s.drop(s.a(x))), a=nn.Linear(6, 4), drop=nn.Dropout(), b=nn.Linear(4, 2)
    )
    net.train()
    net.layers["drop"].eval()
    before = torch.get_rng_state()
    fast = torch.backends.mha.get_fastpath_enabled()
    build_graph(net, ROWS)
    assert [m.training for m in net.modules()] == [True, True, True, False, True]
    assert torch.equal(before, torch.get_rng_state())
    assert torch.backends.mha.get_fastpath_enabled() == fast


class Counting(nn.Module):
    """A net whose forward pass sets attributes, in train mode more of them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.calls, self.cache, self.seen = (
            nn.Linear(6, 4),
            nn.Linear(4, 2),
            0,
            {},
            [],
        )
        self.register_buffer("last", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.a(x))
        self.calls += 1
        self.cache["h"] = h
        if self.training:
            self.seen.append(h)
            self.new = self.last = h.mean(0)
        return self.b(h)


def test_tracing_leaves_what_a_forward_pass_sets() -> None:
    net = Counting()
    buffer = net.last
    graph = build_graph(net, ROWS)
    assert graph.note is None
    assert (net.calls, net.cache, net.seen) == (0, {}, []) and not hasattr(net, "new")
    assert net.last is buffer and not buffer.any() and net.training


def test_a_model_that_cannot_be_traced_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    net = Net(lambda s, x: s.a(x) if float(x.sum()) > 0 else x, a=nn.Linear(6, 4))
    assert build_graph(net, ROWS).note is not None
    assert capfd.readouterr() == ("", "")
