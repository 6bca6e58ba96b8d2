"""Attention that is one function: its weights are read without a call of a module."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import Net, check_wiring, output
from torch import Tensor, nn

from fastplastic import Profile, plan, profile, reinit_
from fastplastic.graph import build_graph

E = 16
X = torch.randn(2, 5, E, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def no_fast_path(monkeypatch: pytest.MonkeyPatch) -> None:
    # Forced activations are seen by hooks, which the fused path of eval mode passes by.
    monkeypatch.setattr(torch.backends.mha, "_is_fastpath_enabled", False)


def attends(attention: Callable[[Any, Tensor], Any], **layers: nn.Module) -> Net:
    """Return a model with a residual attention and an MLP behind it."""
    return Net(
        lambda s, x: s.h(torch.relu(s.m(x + attention(s, x)[0]))),
        m=nn.Linear(E, 8), h=nn.Linear(8, 3), **layers,
    )  # fmt: skip


def heads(**options: Any) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    return nn.MultiheadAttention(E, 4, **{"batch_first": True, **options})


def itself(need_weights: bool = True, **options: Any) -> Net:
    return attends(lambda s, x: s.a(x, x, x, need_weights=need_weights), a=heads(**options))


def crossed() -> Net:
    return attends(lambda s, x: s.a(s.q(x), (y := s.k(x)), y),
                   a=heads(), q=nn.Linear(E, E), k=nn.Linear(E, E))  # fmt: skip


def of_three() -> Net:
    return attends(lambda s, x: s.a(s.q(x), s.k(x), s.v(x)),
                   a=heads(), q=nn.Linear(E, E), k=nn.Linear(E, E), v=nn.Linear(E, E))  # fmt: skip


def decoder() -> Net:
    layer = nn.TransformerDecoderLayer(E, 4, 32, batch_first=True)
    return attends(lambda s, x: s.d(x, s.k(x)).unsqueeze(0), d=layer, k=nn.Linear(E, E))


def profiled(model: nn.Module) -> Profile:
    batch = X, torch.zeros(2, 5, dtype=torch.int64)
    return profile(model.eval(), [batch], loss_fn=lambda out, y: out.square().mean())


MODELS = {
    "itself": itself,
    "without scores": lambda: itself(need_weights=False),
    "sequence first": lambda: itself(batch_first=False),
    "a zero": lambda: itself(add_zero_attn=True),
    "crossed": crossed,
    "of three": of_three,
    "decoder": decoder,
}


@pytest.mark.parametrize("name", MODELS)
def test_value_units_have_both_properties(name: str) -> None:
    case = check_wiring(MODELS[name](), X.double())
    for layer in case.graph.layers:
        if layer.name.endswith("in_proj"):
            assert layer.weight == f"{layer.name}_weight" and layer.bias == f"{layer.name}_bias"
            assert layer.n_units == 3 * E
            assert layer.hidden.tolist() == [False] * 2 * E + [True] * E
            (reader,) = layer.consumers
            assert reader.name == layer.name.replace("in_proj", "out_proj")
            assert reader.unit_of_column.tolist() == list(range(2 * E, 3 * E))


def test_a_bias_of_all_values_goes_with_the_column() -> None:
    model = itself(add_bias_kv=True).eval()
    graph = build_graph(model, X)
    assert graph["a.in_proj"].hidden.tolist() == [False] * 2 * E + [True] * E
    with torch.no_grad():
        model.a.out_proj.weight[:, 3] = 0
        before = output(model, X)
        model.a.in_proj_weight[2 * E + 3] += 1
        assert torch.equal(output(model, X), before)
        model.a.in_proj_weight[2 * E + 4] += 1
        assert not torch.equal(output(model, X), before)


@pytest.mark.parametrize("model", [crossed, of_three])
def test_columns_that_read_several_inputs_are_none_to_zero(model: Callable[[], Net]) -> None:
    graph = build_graph(model(), X)
    for name in {"q", "k", "v"} & {layer.name for layer in graph.layers}:
        assert not graph[name].hidden.any()
        assert graph[name].reasons == {"read by a.in_proj, whose columns read other units, too": E}


def test_rows_that_are_read_twice_are_not_resettable() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        first, second = s.w.weight.chunk(2)
        one, two = s.w.bias.chunk(2)
        linear = nn.functional.linear
        left = s.b(linear(x, first, one))
        if s.twice:
            left = left + s.c(linear(x, first, one))
        return left + s.c(linear(x, second, two))

    net = Net(forward, w=nn.Linear(E, 8), b=nn.Linear(4, 3), c=nn.Linear(4, 3))
    net.twice = False
    graph = build_graph(net, X)
    assert graph["w"].hidden.all() and graph["w"].bias == "w.bias"
    why = "no hook sees all of its rows together: Net computes it without calling a module"
    assert graph["w"].unknown == {f"{why} of its own": 8} and not graph["w"].z_sites
    check_columns(net, graph)
    net.twice = True
    graph = build_graph(net, X)
    assert not graph["w"].hidden.any()
    assert graph["w"].reasons == {"its weight is used 2 times": 8}


def check_columns(net: Net, graph: Any) -> None:
    """Zeroing the columns of a unit makes its row count for nothing."""
    columns = {c.name: c.unit_of_column.tolist() for c in graph["w"].consumers}
    assert columns == {"b": [0, 1, 2, 3], "c": [4, 5, 6, 7]}
    with torch.no_grad():
        net.c.weight[:, 1] = 0
        before = output(net, X)
        net.w.weight[5] += 1
        assert torch.equal(output(net, X), before)
        net.w.weight[4] += 1
        assert not torch.equal(output(net, X), before)


def test_rows_with_another_bias_keep_it() -> None:
    """Of what is written afresh together, the rows are the same."""

    def forward(s: Any, x: Tensor) -> Tensor:
        first, second = s.w.weight.chunk(2)
        one, two = s.w.bias.chunk(2)
        linear = nn.functional.linear
        return s.b(linear(x, first, two)) + s.c(linear(x, second, one))

    net = Net(forward, w=nn.Linear(E, 8), b=nn.Linear(4, 3), c=nn.Linear(4, 3))
    assert build_graph(net, X)["w"].bias is None


def test_what_is_measured_of_attention() -> None:
    found = profiled(itself())
    row = found["a.in_proj"]
    assert not row.no_gradient and bool((row.stats["n_dw"] > 0).all())
    assert row.measured.all() and bool((row.stats["n_g"] > 0).all())
    assert found.coverage.measured == found.coverage.found == 4 and not found.coverage.skipped


def test_gradients_of_rows_are_those_of_queries_keys_and_values() -> None:
    model = itself()
    stats = profiled(model)["a.in_proj"].stats
    weight = model.a.in_proj_weight
    (gradient,) = torch.autograd.grad(model(X).square().mean(), weight)
    expected = gradient.abs().sum(1).double()
    torch.testing.assert_close(stats["sum_abs_dw"], expected, rtol=1e-4, atol=1e-9)
    norms = weight.detach().square().sum(1).double()
    torch.testing.assert_close(stats["sum_sq_w"], norms, rtol=1e-5, atol=0)


def test_the_output_of_attention_is_measured_where_it_is_exact() -> None:
    model = itself()
    row = profiled(model)["a.out_proj"]
    with torch.no_grad():
        out = model.a(X, X, X)[0].flatten(0, 1).double()
    torch.testing.assert_close(row.stats["sum_abs_h"], out.abs().sum(0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("model", [itself, crossed])
def test_a_reset_writes_value_rows_and_their_columns_alone(model: Callable[[], Net]) -> None:
    net = model()
    nn.init.normal_(net.a.in_proj_bias)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    chosen = plan(profiled(net), criterion="gradient", include=["a.in_proj"], ratio=0.25)
    units = chosen.units["a.in_proj"]
    assert len(units) == E // 4 and bool((units >= 2 * E).all())
    reinit_(net, chosen)
    changed = {name: value != before[name] for name, value in net.state_dict().items()}
    assert changed["a.in_proj_weight"].any(1).nonzero().flatten().tolist() == units.tolist()
    assert changed["a.in_proj_bias"].nonzero().flatten().tolist() == units.tolist()
    columns = changed["a.out_proj.weight"].any(0).nonzero().flatten()
    assert (columns + 2 * E).tolist() == units.tolist()
    assert not net.a.out_proj.weight[:, columns].any()
    rest = {"a.in_proj_weight", "a.in_proj_bias", "a.out_proj.weight"}
    assert not any(mask.any() for name, mask in changed.items() if name not in rest)


def test_state_of_the_optimizer_is_that_of_value_rows() -> None:
    net = itself()
    chosen = plan(profiled(net), criterion="gradient", include=["a.in_proj"], ratio=0.25)
    optimizer = torch.optim.Adam(net.parameters())
    net(X).square().mean().backward()
    optimizer.step()
    reinit_(net, chosen, optimizer=optimizer)
    state = optimizer.state[net.a.in_proj_weight]["exp_avg_sq"]
    zero = (state == 0).all(1).nonzero().flatten()
    assert zero.tolist() == chosen.units["a.in_proj"].tolist()
