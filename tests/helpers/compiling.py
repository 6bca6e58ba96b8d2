"""What tests of compiled models share."""

import gc

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from .monitored import net

WAYS = ("wrapped", "in place", "function")
# The compiler itself looks at .grad of tensors inside the graph.
WARNINGS = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def nothing_compiled():
    """Code that was compiled for one model is used for others of its class."""
    # Monitors of other tests may still let measured steps run eagerly.
    gc.collect()
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def graphs():
    return counters["stats"].get("unique_graphs", 0)


def compiled(model, way="wrapped", **options):
    options = {"backend": "aot_eager", "fullgraph": True} | options
    if way == "in place":
        model.compile(**options)
        return model
    if way == "function":
        return torch.compile(lambda x: model(x) * 1, **options)
    return torch.compile(model, **options)


def eager(model):
    """Return the same model, with no compiled code of its own."""
    model._compiled_call_impl = None
    return model


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = net(), nn.Linear(3, 2)

    def forward(self, x):
        return self.head(self.body(x))
