"""Models that cannot be traced."""

import torch
from torch import Tensor, nn

from fastplastic.graph import build_graph
from fastplastic.graph.module_graph import module_graph
from fastplastic.wiring import UnitGraph, UnitLayer
from helpers import Net

UNITS, DEAD = 16, 8


NO_FUNCTION = "the model could not be traced, and no activation module reads its output"


NOT_CALLED = "the model could not be traced, and this module was not called"


class Wild(Net):
    """A net that asks for the value of its input, which no trace knows."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if float(x.abs().sum()) > 0 else x


def wild(forward, **layers: nn.Module) -> Wild:
    torch.manual_seed(0)
    for layer in layers.values():
        for module in layer.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
    return Wild(forward, **layers).eval()


def rows(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def graph_of(model: nn.Module, x: object) -> UnitGraph:
    return module_graph(model, x, "no reason", build_graph)


def found(model: nn.Module, x: object, name: str = "a") -> UnitLayer:
    return graph_of(model, x)[name]


def is_unknown(layer: UnitLayer, reason: str) -> bool:
    nothing = not layer.z_sites and not layer.g_sites
    units = layer.n_units
    return layer.activation == "unknown" and layer.unknown == {reason: units} and nothing


def dense(act: nn.Module, forward=lambda s, x: s.b(s.act(s.a(x)))):
    layers = {"a": nn.Linear(6, UNITS), "act": act, "b": nn.Linear(UNITS, 3)}
    return wild(forward, **layers), rows(64, 6)


def with_norm():
    def forward(s: Wild, x: Tensor) -> Tensor:
        return s.b(s.act(s.bn(s.a(x))).mean((2, 3)))

    layers = {"a": nn.Conv2d(3, UNITS, 3), "bn": nn.BatchNorm2d(UNITS), "act": nn.ReLU(True)}
    return wild(forward, **layers, b=nn.Linear(UNITS, 3)), rows(64, 3, 6, 6)


def dropped():
    def forward(s: Wild, x: Tensor) -> Tensor:
        return s.b(s.act(s.drop(s.a(x))))

    model, x = dense(nn.ReLU(), forward)
    model.drop = nn.Dropout(0.5).eval()
    return model, x
