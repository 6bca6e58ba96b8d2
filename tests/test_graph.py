"""The unit graph on hand-made models: one per wiring rule, with the units that must come out."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.traced import ROWS, Net, columns, graph_of, layer
from torch import Tensor, nn

from fastplastic.graph import build_graph


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


@pytest.mark.parametrize(
    ("first", "images"),
    [
        (nn.Linear(3, 1), torch.zeros(64, 3)), (nn.Linear(1, 1), torch.zeros(2, 1)),
        (nn.Linear(3, 1), torch.zeros(4, 7, 3)), (nn.Conv2d(3, 1, 1), torch.zeros(5, 3, 4, 4)),
    ],
)  # fmt: skip
def test_a_single_unit_is_not_along_the_batch(first: nn.Module, images: Tensor) -> None:
    a = build_graph(nn.Sequential(first, nn.ReLU()), images)["0"]
    site = a.z_sites[0]
    assert site.unit_of_channel.tolist() == [0]
    assert site.unit_axis % images.ndim == (images.ndim - 1 if isinstance(first, nn.Linear) else 1)


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
