"""Small models and what their graphs say."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastplastic.graph import build_graph
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
