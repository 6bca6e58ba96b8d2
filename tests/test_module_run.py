"""Models that run once instead of being traced: what is unknown then, and why."""

import copy
import random
import warnings

import numpy
import pytest
import torch
import torch.nn.functional as F
from helpers.untraceable import (
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
from torch import Tensor, nn

from fastplastic.graph.module_graph import module_graph
from fastplastic.wiring import UnitGraph

SEVERAL = "the model could not be traced, and its output is read in several ways"


class Function(nn.Module):
    """A module without parameters that computes any function."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, *values: Tensor) -> Tensor:
        return self.function(*values)


class ReluLinear(nn.Linear):
    """A layer that has its activation function inside."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x))


NO_ACTIVATION = {
    "PReLU": nn.PReLU(),
    "Softmax": nn.Softmax(-1),
    "LayerNorm": nn.LayerNorm(UNITS),
    "shifted": Function(lambda z: F.relu(z + 3)),
    "negative": Function(lambda z: F.relu(-z)),
    "square of a ReLU": Function(lambda z: F.relu(z) ** 2),
    "with a shortcut": Function(lambda z: F.relu(z) + z),
    "reversed": Function(lambda z: F.relu(z.flip(-1))),
    "asks for values": Function(lambda z: F.relu(z) if float(z.sum()) > 0 else z),
}


@pytest.mark.parametrize("act", NO_ACTIVATION.values(), ids=NO_ACTIVATION)
def test_what_is_no_known_function_is_unknown(act):
    model, x = dense(act)
    assert is_unknown(found(model, x), NO_FUNCTION)


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (lambda s, x: s.b((z := s.a(x)) + s.act(z)), NO_FUNCTION),
        (lambda s, x: s.b(s.act(z := s.a(x))) + s.b(z), SEVERAL),
        (lambda s, x: s.b(s.act(z := s.a(x))) + s.b(s.tanh(z)), SEVERAL),
        (lambda s, x: s.b(s.act(s.a(x).mul_(-1))), NO_FUNCTION),
        (lambda s, x: s.b((z := s.a(x), z.clamp_(min=0))[0]), NO_FUNCTION),
        (lambda s, x: s.b((z := s.a(x), s.inplace(z.view(-1)))[0]), SEVERAL),
        (lambda s, x: s.b(s.two(s.a(x), x.sum())), NO_FUNCTION),
        (lambda s, x: s.b(s.cut(s.a(x)).repeat(1, 2)), NO_FUNCTION),
        (lambda s, x: s.b(s.act(s.a(x)) + s.tanh(s.a(-x))), SEVERAL),
        (lambda s, x: s.b(F.relu(s.a(x)) + s.act(s.a(-x))), NO_FUNCTION),
        (lambda s, x: s.b((s.a(x), torch.ones(len(x), UNITS))[1]), NO_FUNCTION),
        (lambda s, x: s.b(torch.ones(len(x), UNITS)), NOT_CALLED),
        (lambda s, x: s.b(s.act(F.linear(x, s.a.weight))), NOT_CALLED),
    ],
    ids=("sum", "layer", "functions", "written", "clamped", "view", "two", "cut", "calls",
         "one call", "unread", "never", "weight"),
)  # fmt: skip
def test_several_and_unseen_readers_are_unknown(forward, reason):
    model, x = dense(nn.ReLU(), forward)
    model.tanh, model.inplace = nn.Tanh(), nn.ReLU(inplace=True)
    model.two = Function(lambda z, y=None: F.relu(z) if y is None else F.relu(z + y))
    model.cut = Function(lambda z: F.relu(z)[:, : UNITS // 2])
    assert is_unknown(found(model, x), reason)


def test_a_layer_with_its_function_inside_is_not_taken_for_a_plain_one():
    model, x = dense(nn.Identity())
    model.a = ReluLinear(6, UNITS)
    assert is_unknown(found(model, x), NO_FUNCTION)


def test_a_norm_over_positions_is_none_of_units():
    def forward(s: Wild, x: Tensor) -> Tensor:
        return s.b(s.act(s.bn(s.a(x))))

    layers = {"a": nn.Linear(6, UNITS), "bn": nn.BatchNorm1d(5), "act": nn.ReLU()}
    model = wild(forward, **layers, b=nn.Linear(UNITS, 3))
    assert is_unknown(found(model, rows(4, 5, 6)), NO_FUNCTION)


def test_where_nothing_can_be_traced_no_function_is_known():
    def refuse(model: nn.Module, x: Tensor) -> UnitGraph:
        raise ValueError("no")

    graph = module_graph(*dense(nn.ReLU()), "no reason", refuse)
    assert is_unknown(graph["a"], NO_FUNCTION) and graph["b"].activation == "identity"


def test_a_function_that_cannot_be_traced_is_not_looked_into_again():
    traced = []

    def fall_back(model: nn.Module, x: Tensor) -> UnitGraph:
        traced.append(model)
        return module_graph(model, x, "no reason", fall_back)

    assert is_unknown(fall_back(*dense(nn.ReLU()))["a"], NO_FUNCTION)
    assert len(traced) == 2


def test_a_model_that_warns_is_run_all_the_same():
    def forward(s: Wild, x: Tensor) -> Tensor:
        warnings.warn("of nothing", stacklevel=1)
        return s.b(s.act(s.a(x)))

    assert found(*dense(nn.ReLU(), forward)).activation == "relu"


def test_fused_layers_run_module_by_module():
    layer = nn.TransformerEncoderLayer(8, 2, UNITS, batch_first=True, activation=nn.GELU()).eval()
    assert found(layer, rows(2, 5, 8), "linear1").activation == "gelu"


def test_modules_of_one_class_are_told_apart():
    """What they print is equal, what they compute is not."""

    def forward(s: Wild, x: Tensor) -> Tensor:
        return s.b(s.tanh(s.second(s.act(s.a(x)))))

    model, x = dense(Function(F.relu), forward)
    model.second, model.tanh = nn.Linear(UNITS, UNITS), Function(torch.tanh)
    graph = graph_of(model, x)
    assert [layer.activation for layer in graph.layers] == ["relu", "identity", "tanh"]


def test_norms_and_dropouts_do_not_train_while_one_looks():
    model, x = dropped()
    model.train()
    assert found(model, x).activation == "relu"
    model, x = with_norm()
    model.train()
    # One position in each channel, of which a BatchNorm that trains makes an error.
    assert found(model, x[:1, :, :3, :3]).activation == "relu"


def test_a_model_that_cannot_run_has_unknown_layers():
    def forward(s: Wild, x: Tensor) -> Tensor:
        s.a(x)
        raise RuntimeError("out of luck\nand more")

    model, x = dense(nn.ReLU(), forward)
    graph = graph_of(model, x)
    reason = "the model could not be traced, and running it failed (RuntimeError: out of luck)"
    assert len(graph.layers) == 2 and all(is_unknown(layer, reason) for layer in graph.layers)
    assert graph.note == "the model could not be traced (no reason)"
    assert graph_of(dense(nn.ReLU())[0], rows(2, 5)).layers[0].activation == "unknown"


@pytest.mark.parametrize(
    ("act", "reason"), [(nn.ReLU(), None), (F.relu, NO_FUNCTION)], ids=["module", "function"]
)
def test_an_exception_that_the_model_catches_does_no_harm(act, reason):
    def forward(s: Wild, x: Tensor) -> Tensor:
        value = s.a(x)
        try:
            return s.c(value)
        except RuntimeError:
            return s.b(act(value))

    model, x = dense(act if reason is None else nn.Identity(), forward)
    # It would read the units if it could.
    model.c = nn.Linear(UNITS + 1, 3)
    layer = found(model, x)
    assert layer.activation == "relu" if reason is None else is_unknown(layer, reason)


def raising(s: Wild, x: Tensor) -> Tensor:
    x = s.act(s.bn(s.a(x)))
    torch.rand(1), random.random(), numpy.random.rand()
    s.bn.running_mean = s.bn.running_mean + 1
    raise KeyboardInterrupt


@pytest.mark.parametrize("forward", [None, raising], ids=["returns", "is interrupted"])
def test_the_model_is_left_as_found(forward):
    model, x = with_norm()
    model.train()
    model.act.eval()
    model.bn.register_forward_hook(lambda *values: None)
    model.a.weight.grad = torch.ones_like(model.a.weight)
    model._forward = forward or model._forward
    before = copy.deepcopy(model.state_dict())
    attributes = [
        {key: copy.copy(value) for key, value in vars(m).items()} for m in model.modules()
    ]
    states = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()
    if forward is None:
        assert found(model, x).activation == "relu"
    else:
        with pytest.raises(KeyboardInterrupt):
            graph_of(model, x)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), numpy.random.get_state()[1].tolist()) == states[1:]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(model.a.weight.grad, torch.ones_like(model.a.weight))
    for module, kept in zip(model.modules(), attributes, strict=True):
        assert all(value == kept[key] or value is kept[key] for key, value in vars(module).items()
                   if not key.startswith(("_parameters", "_buffers")))  # fmt: skip
        assert vars(module).keys() == kept.keys()
