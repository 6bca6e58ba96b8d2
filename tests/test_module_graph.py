"""What is found of models that cannot be traced: right activation functions or none."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
import torch.nn.functional as F
from helpers.untraceable import (
    DEAD,
    NO_FUNCTION,
    NOT_CALLED,
    UNITS,
    Wild,
    dense,
    dropped,
    found,
    graph_of,
    is_unknown,
    rows,
    wild,
    with_norm,
)
from timm.layers import BatchNormAct2d, ConvNormAct
from torch import Tensor, nn

from fastplastic import profile
from fastplastic.graph import build_graph


def places(sites) -> list[tuple[str, str, int]]:
    return [(site.module, site.where, site.unit_axis) for site in sites]


@pytest.fixture
def measured():
    """Profile a model by its modules, over 64 samples."""

    def measured(model: nn.Module, x: Tensor):
        return profile(model, [(x, torch.arange(len(x)) % 3)])

    return measured


def norm_with_act():
    layers = {"a": nn.Conv2d(3, UNITS, 3), "bn": BatchNormAct2d(UNITS), "b": nn.Linear(UNITS, 3)}
    return wild(lambda s, x: s.b(s.bn(s.a(x)).mean((2, 3))), **layers), rows(64, 3, 6, 6)


def block():
    layers = {"a": ConvNormAct(3, UNITS, 3), "b": nn.Linear(UNITS, 3)}
    return wild(lambda s, x: s.b(s.a(x).mean((2, 3))), **layers), rows(64, 3, 6, 6)


def flattened():
    def forward(s: Wild, x: Tensor) -> Tensor:
        return s.b(s.act(s.flat(s.a(x))))

    layers = {"a": nn.Conv2d(3, UNITS, 3), "flat": nn.Flatten(), "act": nn.ReLU()}
    return wild(forward, **layers, b=nn.Linear(UNITS * 16, 3)), rows(64, 3, 6, 6)


def shared_act():
    def forward(s: Wild, x: Tensor) -> Tensor:
        return s.b(s.act(s.second(s.act(s.a(s.act(s.first(x)))))))

    layers = {"first": nn.Linear(6, UNITS), "a": nn.Linear(UNITS, UNITS), "act": nn.ReLU(True),
              "second": nn.Linear(UNITS, UNITS), "b": nn.Linear(UNITS, 3)}  # fmt: skip
    return wild(forward, **layers), rows(64, 6)


RELU = {
    "relu": lambda: dense(nn.ReLU()),
    "in place": lambda: dense(nn.ReLU(inplace=True)),
    "BatchNorm": with_norm,
    "BatchNormAct2d": norm_with_act,
    "ConvNormAct": block,
    "dropout": dropped,
    "flatten": flattened,
    "shared": shared_act,
}


@pytest.mark.parametrize("build", RELU.values(), ids=RELU)
def test_exactly_the_planted_dead_units_are_found(measured, build):
    model, x = build()
    layer = model.a.conv if isinstance(model.a, ConvNormAct) else model.a
    norm = next((m for m in model.modules() if isinstance(m, nn.BatchNorm2d)), layer)
    with torch.no_grad():
        # Units 0 to 7 alive, 8 to 15 never above zero.
        norm.bias.copy_(torch.where(torch.arange(UNITS) < DEAD, 0.5, -50))
    result = measured(model, x)
    name = "a.conv" if isinstance(model.a, ConvNormAct) else "a"
    profiled = result[name]
    expected = [False] * DEAD + [True] * DEAD
    assert profiled.activation == "relu" and not profiled.hidden.any()
    assert profiled.dead.tolist() == profiled.frozen.tolist() == expected
    assert profiled.dormant.tolist() == expected
    head = result["b"]
    assert head.activation == "identity" and not head.dead.any() and head.wiring.head
    assert result.notes[0].startswith("the model could not be traced (")


def test_a_functional_activation_is_unknown_and_nothing_is_said_of_its_units(measured):
    model, x = dense(nn.Identity(), lambda s, x: s.b(F.relu(s.a(x))))
    with torch.no_grad():
        model.a.bias[DEAD:] = -50
    result = measured(model, x)
    layer = result["a"]
    assert is_unknown(layer.wiring, NO_FUNCTION)
    assert not layer.dead.any() and not layer.frozen.any() and not layer.dormant.any()
    said = f"{NO_FUNCTION}; its weights and their gradients are measured"
    assert result.coverage.skipped == (("a", said),)
    assert result["b"].activation == "identity"


@pytest.mark.parametrize(
    ("act", "name"),
    [
        (nn.GELU(), "gelu"),
        (nn.GELU("tanh"), "gelu_tanh"),
        (nn.LeakyReLU(0.2), "leaky_relu:0.2"),
        (nn.Hardtanh(0, 6), "relu6"),
        (nn.SiLU(inplace=True), "silu"),
        # Several layers deep, and still one function.
        (nn.Sequential(nn.Identity(), nn.Sequential(nn.Tanh())), "tanh"),
    ],
    ids=str,
)
def test_the_rules_of_the_trace_name_the_function(act, name):
    model, x = dense(act)
    layer = found(model, x)
    assert layer.activation == name and layer.unknown == {}
    assert places(layer.z_sites) == [("a", "output", -1)]
    assert len(layer.g_sites) == 1


def test_compiled_modules_are_looked_into():
    model, x = dense(torch.compile(nn.ReLU(), backend="eager"))
    with torch.no_grad():
        model(x)
    assert found(model, x).activation == "relu"


def test_what_runs_on_other_threads_is_unknown():
    def forward(s: Wild, x: Tensor) -> Tensor:
        with ThreadPoolExecutor(1) as pool:
            return s.b(s.act(pool.submit(s.a, x).result()))

    assert is_unknown(found(*dense(nn.ReLU(), forward)), NOT_CALLED)


def test_sites():
    layer = found(*with_norm())
    assert (layer.norm, places(layer.z_sites)) == ("bn", [("bn", "output", -3)])
    assert places(layer.g_sites) == [("act", "output", -3)]
    layer = found(*norm_with_act())
    assert (layer.norm, places(layer.z_sites)) == ("bn", [("bn.drop", "input", -3)])
    assert places(layer.g_sites) == [("bn.act", "output", -3)]
    shared = graph_of(*shared_act())
    # What all calls of the shared module share is no place to look at.
    assert places(shared["a"].z_sites) == [("a", "output", -1)]
    assert places(shared["a"].g_sites) == [("second", "input", -1)]
    head = shared["b"]
    assert places(head.z_sites) == places(head.g_sites) == [("b", "output", -1)]
    # The same elements in another shape: how units lie there is not known.
    layer = found(*flattened())
    assert places(layer.z_sites) == [("a", "output", -3)] and layer.g_sites == ()


def test_layers_that_are_read_by_layers_alone_have_no_function():
    def forward(s: Wild, x: Tensor) -> dict[str, Tensor]:
        value = s.a(x)
        return {"sum": s.b(value) * 2, "more": [s.c(value)]}

    layers = {"a": nn.Linear(6, UNITS), "b": nn.Linear(UNITS, 3), "c": nn.Linear(UNITS, 3)}
    graph = graph_of(wild(forward, **layers), {"x": rows(4, 6)})
    assert [layer.activation for layer in graph.layers] == ["identity", "unknown", "identity"]


def test_a_layer_that_is_called_twice_in_one_way_is_measured_in_both(measured):
    def forward(s: Wild, x: Tensor) -> Tensor:
        return s.b(s.act(s.a(x)) * s.act(s.a(-x)))

    model, x = dense(nn.ReLU(), forward)
    layer = measured(model, x)["a"]
    assert layer.activation == "relu"
    assert set(layer.stats["n"].tolist()) == set(layer.stats["n_g"].tolist()) == {128}


@pytest.mark.parametrize("layer", [nn.Linear(5, 4), nn.Conv1d(6, 4, 2), nn.Conv3d(6, 4, 1),
                                   nn.ConvTranspose1d(6, 4, 2)], ids=str)  # fmt: skip
def test_units_are_on_the_axis_of_the_layer(layer):
    x = rows(2, 6, 5, 5, 5) if isinstance(layer, nn.Conv3d) else rows(2, 6, 5)
    model = wild(lambda s, x: s.act(s.a(x)), a=layer, act=nn.ReLU())
    (site,) = found(model, x).z_sites
    assert layer(x).shape[site.unit_axis] == 4 == len(site.unit_of_channel)


class Conv1D(nn.Module):
    """A layer as Hugging Face has it: its weight is (in, out)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:-1], len(self.bias))
        return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(shape)


def test_layers_of_hugging_face():
    layers = {"a": Conv1D(6, UNITS), "act": nn.GELU(), "b": Conv1D(UNITS, 3)}
    layer = found(wild(lambda s, x: s.b(s.act(s.a(x))), **layers), rows(2, 5, 6))
    assert (layer.kind, layer.n_units, layer.unit_dim) == ("conv1d", UNITS, 1)
    assert (layer.activation, places(layer.z_sites)) == ("gelu", [("a", "output", -1)])


def test_kinds_and_tied_weights():
    kinds = {"a": nn.Conv1d(4, 4, 1, groups=4), "b": nn.ConvTranspose1d(4, 4, 1)}
    model = wild(lambda s, x: s.d(s.c(s.b(s.a(x)))), **kinds, c=nn.Linear(4, 4), d=nn.Linear(4, 4))
    model.d.weight = model.c.weight
    graph = graph_of(model, rows(2, 4, 4))
    assert [layer.kind for layer in graph.layers] == [
        "depthwise conv", "conv transpose", "linear", "linear",
    ]  # fmt: skip
    assert [layer.head for layer in graph.layers] == [False, False, False, True]
    assert [layer.tied for layer in graph.layers] == [(), (), ("d",), ("c",)]


def tiny() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.SiLU(True), nn.Conv2d(8, 8, 3, groups=8),
        nn.Hardswish(), nn.Conv2d(8, 6, 1), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten(),
        nn.Linear(216, 10), nn.Dropout(), nn.Sigmoid(), nn.Linear(10, 4), nn.Linear(4, 3),
    ).eval()  # fmt: skip


@pytest.mark.parametrize(
    ("build", "known", "layers"),
    [(tiny, 5, 6), (lambda: timm.create_model("resnet18", num_classes=5).eval(), 10, 21)],
    ids=["tiny", "resnet18"],
)
def test_no_function_is_another_than_in_the_trace(build, known, layers):
    model, x = build(), rows(2, 3, 16, 16)
    traced = {layer.name: layer for layer in build_graph(model, x).layers}
    by_modules = graph_of(model, x).layers
    pairs = [(layer, traced[layer.name]) for layer in by_modules if layer.activation != "unknown"]
    assert [(a.activation, a.norm) for a, _ in pairs] == [(b.activation, b.norm) for _, b in pairs]
    assert (len(pairs), len(by_modules)) == (known, layers)
