"""The unit graph on hand-made models: one per wiring rule, with the units that must come out."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from fastplastic.graph import build_graph
from fastplastic.graph.rules import RULES
from fastplastic.wiring import UnitGraph, UnitLayer


class Net(nn.Module):
    """A model from named layers and a forward function of (self, x)."""

    def __init__(self, forward: Callable[[Any, Tensor], Any], **layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(layers)
        self._forward = forward

    def __getattr__(self, name: str) -> Any:
        layers = self.__dict__.get("_modules", {}).get("layers")
        return layers[name] if layers is not None and name in layers else super().__getattr__(name)

    def forward(self, x: Tensor) -> Any:
        return self._forward(self, x)


IMAGE = torch.randn(2, 3, 8, 8)
ROWS = torch.randn(2, 6)


def graph_of(model: nn.Module, x: Any = IMAGE) -> UnitGraph:
    graph = build_graph(model, x)
    assert graph.note is None, graph.note
    return graph


def layer(graph: UnitGraph, name: str) -> UnitLayer:
    return graph[f"layers.{name}"]


def columns(unit_layer: UnitLayer) -> dict[str, list[int]]:
    return {c.name.removeprefix("layers."): c.unit_of_column.tolist() for c in unit_layer.consumers}


def test_conv_norm_activation_is_one_unit_read_by_the_next_conv() -> None:
    net = Net(
        lambda s, x: s.b(F.relu(s.norm(s.a(x)))),
        a=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(4), b=nn.Conv2d(4, 2, 1),
    )  # fmt: skip
    a = layer(graph_of(net), "a")
    assert a.hidden.all() and a.activation == "relu" and a.norm == "layers.norm"
    assert columns(a) == {"b": [0, 1, 2, 3]}
    assert [n.name for n in a.norms] == ["layers.norm"]
    assert (a.z_sites[0].module, a.z_sites[0].where, a.z_sites[0].unit_axis) == (
        "layers.norm",
        "output",
        1,
    )
    assert (a.g_sites[0].module, a.g_sites[0].where) == ("layers.b", "input")
    assert not layer(graph_of(net), "b").hidden.any()
    assert layer(graph_of(net), "b").reasons == {"leaves the network": 2}


def test_units_of_a_token_model_are_channels_not_tokens() -> None:
    net = Net(lambda s, x: s.b(F.gelu(s.a(x))), a=nn.Linear(6, 5), b=nn.Linear(5, 3))
    a = layer(graph_of(net, torch.randn(2, 37, 6)), "a")
    assert a.n_units == 5 and a.z_sites[0].unit_axis == 2 and a.activation == "gelu"


@pytest.mark.parametrize(
    ("flatten", "expected"),
    [
        (lambda x: x.flatten(1), [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]),
        (lambda x: x.permute(0, 2, 3, 1).flatten(1), [0, 1, 2] * 4),
        (lambda x: x.mean((2, 3)), [0, 1, 2]),
        (lambda x: F.adaptive_max_pool2d(x, 1).flatten(1), [0, 1, 2]),
    ],
    ids=["NCHW repeats", "NHWC tiles", "mean pool", "max pool"],
)
def test_flatten_repeats_each_channel(flatten: Any, expected: list[int]) -> None:
    net = Net(
        lambda s, x: s.head(flatten(F.relu(s.conv(x)))),
        conv=nn.Conv2d(3, 3, 3, stride=3), head=nn.Linear(len(expected), 2),
    )  # fmt: skip
    conv = layer(graph_of(net), "conv")
    assert conv.hidden.all() and columns(conv) == {"head": expected}


def test_concat_shifts_and_split_takes_a_slice() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        joined = torch.cat([s.a(x), s.b(x)], 1)
        left, right = joined.split([3, 2], 1)
        return s.c(left) + s.d(right)

    net = Net(forward, a=nn.Linear(6, 2), b=nn.Linear(6, 3), c=nn.Linear(3, 1), d=nn.Linear(2, 1))
    graph = graph_of(net, ROWS)
    assert columns(layer(graph, "a")) == {"c": [0, 1, -1]}
    assert columns(layer(graph, "b")) == {"c": [-1, -1, 0], "d": [1, 2]}
    assert layer(graph, "b").hidden.all()


def test_residual_sum_makes_both_sides_streams() -> None:
    net = Net(
        lambda s, x: s.head(s.stem(x) + s.b(F.relu(s.a(s.stem(x))))),
        stem=nn.Linear(6, 4), a=nn.Linear(4, 5), b=nn.Linear(5, 4), head=nn.Linear(4, 2),
    )  # fmt: skip
    graph = graph_of(net, ROWS)
    assert layer(graph, "a").hidden.all()
    assert layer(graph, "b").reasons == {"summed into a residual stream": 4}
    assert not layer(graph, "stem").hidden.any()


def test_depthwise_filter_and_both_norms_belong_to_the_expansion_unit() -> None:
    net = Net(
        lambda s, x: s.project(F.silu(s.n2(s.dw(F.silu(s.n1(s.expand(x))))))) + x,
        expand=nn.Conv2d(3, 6, 1), n1=nn.BatchNorm2d(6), dw=nn.Conv2d(6, 6, 3, padding=1, groups=6),
        n2=nn.BatchNorm2d(6), project=nn.Conv2d(6, 3, 1),
    )  # fmt: skip
    graph = graph_of(net)
    expand, dw = layer(graph, "expand"), layer(graph, "dw")
    assert expand.hidden.all() and [c.name for c in expand.coupled] == ["layers.dw"]
    assert expand.coupled[0].row_of_unit.tolist() == list(range(6))
    assert dw.kind == "depthwise conv" and not dw.hidden.any()
    assert dw.reasons == {"re-initialised together with layers.expand": 6}
    assert columns(dw) == {"project": list(range(6))} and columns(expand) == {}
    assert [n.name for n in dw.norms] == ["layers.n2"]


def test_depthwise_on_a_stream_has_units_of_its_own() -> None:
    net = Net(
        lambda s, x: s.pw(F.relu(s.dw(s.stem(x)))) + s.stem(x),
        stem=nn.Conv2d(3, 4, 1), dw=nn.Conv2d(4, 4, 3, padding=1, groups=4), pw=nn.Conv2d(4, 4, 1),
    )  # fmt: skip
    graph = graph_of(net)
    assert layer(graph, "dw").hidden.all() and not layer(graph, "stem").hidden.any()


def test_squeeze_excite_reads_the_unit_and_its_gate_is_not_hidden() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        x = F.relu(s.a(x))
        gate = s.expand(F.relu(s.reduce(x.mean((2, 3), keepdim=True)))).sigmoid()
        return s.b(x * gate)

    net = Net(
        forward, a=nn.Conv2d(3, 4, 1), reduce=nn.Conv2d(4, 2, 1), expand=nn.Conv2d(2, 4, 1),
        b=nn.Conv2d(4, 2, 1),
    )  # fmt: skip
    graph = graph_of(net)
    assert columns(layer(graph, "a")) == {"reduce": [0, 1, 2, 3], "b": [0, 1, 2, 3]}
    assert layer(graph, "a").hidden.all() and layer(graph, "reduce").hidden.all()
    assert layer(graph, "expand").reasons == {"gates other units by multiplication": 4}


def test_gated_mlp_couples_two_rows() -> None:
    net = Net(
        lambda s, x: s.out(F.silu(s.gate(x)) * s.up(x)),
        gate=nn.Linear(6, 4), up=nn.Linear(6, 4), out=nn.Linear(4, 3),
    )  # fmt: skip
    graph = graph_of(net, ROWS)
    gate, up = layer(graph, "gate"), layer(graph, "up")
    assert gate.hidden.all() and [c.name for c in gate.coupled] == ["layers.up"]
    assert up.reasons == {"re-initialised together with layers.gate": 4}
    assert gate.activation == "silu" and up.activation == "identity"


def test_packed_gated_mlp_couples_two_rows_of_one_layer() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        value, gate = s.packed(x).chunk(2, -1)
        return s.out(value * F.silu(gate))

    graph = graph_of(Net(forward, packed=nn.Linear(6, 8), out=nn.Linear(4, 3)), ROWS)
    packed = layer(graph, "packed")
    assert packed.hidden.tolist() == [True] * 4 + [False] * 4
    assert packed.coupled[0].name == "layers.packed"
    assert packed.coupled[0].row_of_unit.tolist() == [4, 5, 6, 7, -1, -1, -1, -1]
    assert packed.activations == ((0, 4, "identity"), (4, 8, "silu"))
    assert packed.g_sites[0].unit_of_channel.tolist() == [0, 1, 2, 3, -1, -1, -1, -1]


def test_fused_qkv_hides_value_channels_only() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        q, k, v = s.qkv(x).reshape(2, 5, 3, 2, 3).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v)
        return s.proj(x.transpose(1, 2).reshape(2, 5, 6))

    net = Net(forward, qkv=nn.Linear(6, 18), proj=nn.Linear(6, 6))
    qkv = layer(graph_of(net, torch.randn(2, 5, 6)), "qkv")
    assert qkv.hidden.tolist() == [False] * 12 + [True] * 6
    assert columns(qkv) == {"proj": list(range(12, 18))}
    assert qkv.reasons == {"query of an attention": 6, "key of an attention": 6}


def test_grouped_conv_keeps_its_columns_apart() -> None:
    net = Net(
        lambda s, x: s.b(F.relu(s.a(x))), a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(4, 6, 1, groups=2)
    )
    consumer = layer(graph_of(net), "a").consumers[0]
    assert consumer.groups == 2 and consumer.unit_of_column.tolist() == [0, 1, 2, 3]


def test_hugging_face_conv1d_has_its_units_in_columns() -> None:
    from transformers.pytorch_utils import Conv1D

    net = Net(lambda s, x: s.b(F.gelu(s.a(x))), a=Conv1D(5, 6), b=Conv1D(3, 5))
    a = layer(graph_of(net, torch.randn(2, 7, 6)), "a")
    assert a.kind == "conv1d" and a.unit_dim == 1 and a.n_units == 5
    assert a.consumers[0].column_dim == 0 and a.hidden.all()


def test_transposed_conv_has_its_units_in_dimension_one() -> None:
    net = Net(
        lambda s, x: s.b(F.relu(s.a(x))),
        a=nn.ConvTranspose2d(3, 5, 2),
        b=nn.ConvTranspose2d(5, 2, 2),
    )
    a = layer(graph_of(net), "a")
    assert a.unit_dim == 1 and a.n_units == 5 and a.consumers[0].column_dim == 0


def test_parallel_branches_are_one_unit_and_an_identity_branch_a_stream() -> None:
    convs = {
        "stem": nn.Conv2d(3, 4, 1), "wide": nn.Conv2d(4, 4, 3, padding=1),
        "narrow": nn.Conv2d(4, 4, 1),
        "out": nn.Conv2d(4, 2, 1),
    }  # fmt: skip

    def branches(s: Any, x: Tensor) -> Tensor:
        x = F.relu(s.stem(x))
        return s.out(F.relu(s.wide(x) + s.narrow(x)))

    def with_identity(s: Any, x: Tensor) -> Tensor:
        x = F.relu(s.stem(x))
        return s.out(F.relu(s.wide(x) + s.narrow(x) + x))

    graph = graph_of(Net(branches, **convs))
    assert layer(graph, "wide").hidden.all()
    assert layer(graph, "wide").coupled[0].name == "layers.narrow"
    assert layer(graph, "wide").activation == layer(graph, "narrow").activation == "relu"
    graph = graph_of(Net(with_identity, **convs))
    for name in ("stem", "wide", "narrow"):
        assert layer(graph, name).reasons == {"summed into a residual stream": 4}, name


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
