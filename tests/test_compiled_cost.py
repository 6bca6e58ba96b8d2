"""What a monitor adds to compiled code: operators alone."""

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from helpers.compiling import WARNINGS, WAYS, compiled, eager, nothing_compiled
from helpers.monitored import Net, by_hand, close, inputs, step
from torch import nn
from torch._dynamo.backends.common import aot_autograd

from fastplastic import Monitor

__all__ = ["nothing_compiled"]
pytestmark = WARNINGS


@pytest.mark.parametrize("name", ["add_activations", "add_gradients", "add_call"])
def test_operators_are_called_without_a_way_for_gradients(name):
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    assert has_kernel(f"fastplastic::{name}", "CompositeExplicitAutograd")
    for key in ("AutogradCPU", "AutogradCUDA", "ADInplaceOrView"):
        assert not has_kernel(f"fastplastic::{name}", key)


def kept_by(model, x):
    """Return how many bytes the forward graph hands on, and how often it copies a tensor."""
    found = []

    def forward(graph, _):
        outputs = next(node for node in graph.graph.nodes if node.op == "output").args[0]
        values = [node.meta["val"] for node in outputs if node is not None]
        # Tables of statistics are float64 and int64.
        values = [value for value in values if value.dtype not in (torch.float64, torch.int64)]
        copies = [node for node in graph.graph.nodes if node.target == torch.ops.aten.clone.default]
        found.append((sum(value.numel() * value.itemsize for value in values), len(copies)))
        return make_boxed_func(graph)

    backend = aot_autograd(
        fw_compiler=forward,
        bw_compiler=lambda graph, _: make_boxed_func(graph),
        partition_fn=min_cut_rematerialization_partition,
    )
    torch.compile(model, backend=backend, fullgraph=True)(x).square().mean().backward()
    return found[0]


# A mask for ReLU and factors of GELU would be kept.
@pytest.mark.parametrize("function", [nn.ReLU, nn.GELU])
def test_no_more_is_kept_for_the_backward_pass(function):
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), function(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(8 * 7 * 7, 4),
    )  # fmt: skip
    x = torch.randn(2, 3, 16, 16)
    expected, _ = kept_by(model, x)
    torch.compiler.reset()
    with Monitor(model, x):
        found, copies = kept_by(model, x)
    assert found == expected
    # Of z before the function, which inductor takes out; none of what the model returns.
    assert copies == 1


class Broken(Net):
    """The graph ends between the activation function and the next hook."""

    def body(self, x):
        h = self.act1(self.fc1(x))
        torch._dynamo.graph_break()
        z = self.fc2(h)
        torch._dynamo.graph_break()
        return self.act2(z)


# A table whose version changed would stop the backward pass of the other graphs.
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_what_is_left_for_later_is_read_where_a_graph_ends(backend):
    torch.manual_seed(0)
    model = Broken().eval()
    with Monitor(model, inputs(9, 2)) as monitor:
        function = compiled(model, fullgraph=False, backend=backend)
        for seed in (1, 2):
            step(function, seed)
    close(monitor.compute(), by_hand(model, [1, 2]))


class Last(nn.Module):
    """No hook follows the last activation function."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, 5), nn.Linear(5, 4)

    def forward(self, x):
        return self.fc2(self.fc1(x).tanh()).relu_()


@pytest.mark.parametrize("way", WAYS)
def test_what_no_hook_follows_is_read_when_the_model_returns(way):
    torch.manual_seed(0)
    model = Last()
    tables = []
    for build in (compiled, eager):
        with Monitor(model, inputs(9, 2)) as monitor:
            function = build(model, way) if build is compiled else build(model)
            for seed in (1, 2):
                step(function, seed)
        tables.append({layer.name: layer.stats.table for layer in monitor.compute().layers})
    assert torch.equal(tables[0]["fc2"][0], torch.full((4,), 32.0, dtype=torch.float64))
    close(monitor.compute(), tables[0])
