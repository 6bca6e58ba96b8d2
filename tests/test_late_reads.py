"""Tensors that wait to be read by one launch: the same figures, few launches, nothing wrong."""

import importlib
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from fastplastic import Monitor
from fastplastic.measure import late, parameters, sums

# NumPy says so of the interpreter of Triton 3.6.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")

UNIT = importlib.import_module("fastplastic.kernels.gpu.unit_launch")
WEIGHT = importlib.import_module("fastplastic.kernels.gpu.parameter_stats")
KERNELS = {
    UNIT: ("unit_kernel", "fold_kernel"),
    WEIGHT: ("_parameter_kernel", "_parameter_fold_kernel"),
}


# Where models are; with a GPU, on_triton moves them there.
PLACE = {"device": "cpu"}


@pytest.fixture
def on_triton(monkeypatch):
    """Train on a GPU; without one, let tensors on the CPU go to the Triton kernels too."""
    if torch.cuda.is_available():
        monkeypatch.setitem(PLACE, "device", "cuda")
    else:
        monkeypatch.setattr("fastplastic.kernels.dispatch._backend", lambda kind: "triton")
    with np.errstate(all="ignore"):
        yield


def here(value):
    return value.to(PLACE["device"])


@pytest.fixture
def launches(monkeypatch, on_triton):
    """Count launches by the name of the kernel instead of running any."""
    count = Counter()

    class Kernel:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return lambda *arguments, **options: count.update([self.name])

    for module, names in KERNELS.items():
        for name in names:
            monkeypatch.setattr(module, name, Kernel(name))
    return count


class Block(nn.Module):
    """Activation functions in place and not, an addition in place, a freed pre-activation."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.second, self.third = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 12)
        self.head = nn.Linear(12, 5)
        self.harm = False

    def forward(self, x):
        x = functional.relu(self.norm(self.first(x)), inplace=True)
        y = functional.silu(self.second(x), inplace=True)
        y = self.third(y)
        y += x
        y = functional.relu(y).mean((2, 3))
        z = self.up(y)
        h = functional.gelu(z)
        if self.harm:
            with torch.no_grad():
                z.add_(1)
            h = h.detach().requires_grad_()
        return self.head(functional.relu6(self.down(h)))


def trained(model, steps, *, measured=lambda step: None, **options):
    """Train a model under a monitor, and return that."""
    torch.manual_seed(0)
    monitor = Monitor(here(model), here(torch.zeros(2, 3, 4, 4)), **options)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with monitor:
        for step in range(steps):
            measured(step)
            loss = model(here(torch.randn(2, 3, 4, 4))).square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return monitor


def new_block():
    torch.manual_seed(1)
    return Block()


def same(one, other):
    for layer in one:
        theirs = other[layer.name].stats.table
        torch.testing.assert_close(layer.stats.table, theirs, rtol=1e-4, atol=1e-4)


def check(request, figures):
    """Compare what is read by launches with what Numba reads at once; nothing must be lost."""
    expected = figures().compute()
    request.getfixturevalue("on_triton")
    monitor = figures()
    same(monitor.compute(), expected)
    assert lost(monitor) == 0


def lost(monitor):
    return monitor._observer._readers.lost


def test_figures_are_those_of_reading_at_once(monkeypatch, request):
    expected = trained(new_block(), 4)
    request.getfixturevalue("on_triton")
    monitor = trained(new_block(), 4)
    found = monitor.compute()
    same(found, expected.compute())
    assert lost(monitor) == 0
    # Every bit, where nothing waits.
    monkeypatch.setattr(late.LateReads, "take", lambda *_: False)
    monkeypatch.setattr(late.LateWeights, "take", lambda *_: False)
    for layer in trained(new_block(), 4).compute():
        assert torch.equal(layer.stats.table, found[layer.name].stats.table)


def test_most_wait_from_the_second_step_on(launches):
    steps = []
    trained(new_block(), 4, measured=lambda _: (steps.append(dict(launches)), launches.clear()))
    first, second, third = steps[1:]
    assert sum(first.values()) > 30
    # Two functions, gradients, weights, and what the addition overwrites.
    assert second == third
    assert third["_parameter_kernel"] == third["_parameter_fold_kernel"] == 1
    assert third["fold_kernel"] == 3


@pytest.mark.parametrize("name", ["resnet50", "vit_tiny_patch16_224", "efficientnet_b0"])
def test_launches_of_a_step(launches, name):
    """A residual addition in place must be read before: there are 16 in a ResNet-50 of timm."""
    timm = pytest.importorskip("timm")
    size = {"img_size": 32} if name.startswith("vit") else {}
    model = here(timm.create_model(name, **size))
    images = here(torch.zeros(2, 3, 32, 32))
    with Monitor(model, images):
        for _ in range(3):
            launches.clear()
            model.zero_grad()
            model(images).sum().backward()
    assert sum(launches.values()) <= 10 + (32 if name == "resnet50" else 0)


def test_weights_wait_on_the_cpu_too(monkeypatch):
    """One call for all of them, from the second step on."""
    calls = []

    def counted(function, weights, *arguments, **options):
        calls.append(len(weights))
        return function(weights, *arguments, **options)

    for module in (parameters, sums):
        function = partial(counted, module.parameter_stats)
        monkeypatch.setattr(module, "parameter_stats", function)
    trained(new_block(), 3)
    assert calls == [1] * 6 + [6, 6]


def test_a_backward_pass_that_ends_early(on_triton):
    """What it left is read, if it is still there, before the next step."""
    model = new_block()
    images = here(torch.randn(2, 3, 4, 4))
    with Monitor(here(model), images) as monitor:
        for step in range(5):
            model.zero_grad()
            loss = model(images).square().sum()
            handle = None
            if step == 3:
                handle = model.first.weight.register_hook(lambda gradient: 1 / 0)
            try:
                loss.backward()
            except ZeroDivisionError:
                handle.remove()
    profile = monitor.compute()
    counts = {layer.name: layer.stats["n_dw"].max().item() for layer in profile}
    # Four whole passes; of the one that failed, what came before the failure.
    per_pass = {name: model.get_submodule(name).weight[0].numel() for name in counts}
    assert counts["first"] == 4 * per_pass["first"]
    assert counts["head"] in (4 * per_pass["head"], 5 * per_pass["head"])


def test_what_is_overwritten_against_expectation_is_not_read(on_triton):
    model = new_block()

    def harm(step):
        model.harm = step == 3

    monitor = trained(model, 5, measured=harm)
    profile = monitor.compute()
    assert lost(monitor) == 1
    # One batch of two is missing of the layer that was overwritten, and of no other.
    seen = {layer.name: layer.stats["n"].max().item() for layer in profile}
    assert seen["up"] == 4 * 2 and seen["down"] == 5 * 2
    assert any("1 tensor" in note and "overwritten" in note for note in profile.notes)


def test_gradients_that_accumulate(request):
    """From the second backward pass on, `.grad` is a sum."""

    def figures():
        model = new_block()
        with Monitor(here(model), here(torch.zeros(2, 3, 4, 4))) as monitor:
            for step in range(6):
                if step % 2 == 0:
                    model.zero_grad()
                torch.manual_seed(step)
                model(here(torch.randn(2, 3, 4, 4))).square().sum().backward()
        return monitor

    check(request, figures)


def test_an_optimizer_within_the_backward_pass(request):
    """It frees and writes what would be read at the end."""

    def figures():
        model = here(new_block())
        for parameter in model.parameters():
            optimizer = torch.optim.SGD([parameter], 0.01)

            def step(parameter, optimizer=optimizer):
                optimizer.step()
                optimizer.zero_grad()

            parameter.register_post_accumulate_grad_hook(step)
        with Monitor(here(model), here(torch.zeros(2, 3, 4, 4))) as monitor:
            for step in range(4):
                torch.manual_seed(step)
                model(here(torch.randn(2, 3, 4, 4))).square().sum().backward()
        return monitor

    check(request, figures)


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_activations(request, reentrant):
    """What is saved is packed by hooks: looking at it would recompute it."""

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.block = nn.Conv2d(3, 3, 1), new_block()

        def forward(self, x):
            return checkpoint(self.block, self.stem(x), use_reentrant=reentrant)

    def figures():
        torch.manual_seed(2)
        return trained(Checkpointed(), 4)

    check(request, figures)


def test_evaluation_in_between(request):
    """Without gradients an in-place function leaves no trace in the graph."""

    def figures():
        model = new_block()

        def evaluate(step):
            model.eval()
            with torch.no_grad():
                model(here(torch.randn(2, 3, 4, 4)))
            model.train()

        return trained(model, 4, measured=evaluate)

    check(request, figures)


def test_bytes_that_wait_are_bounded(monkeypatch, launches):
    """Of tensors that the network frees, read where there are too many."""
    monkeypatch.setattr(late, "LEAST", 1 << 12)

    class Freed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(32))

        def forward(self, x):
            for layer in self.layers:
                x = x + layer(x).relu()
            return x

    held, take = [], late.LateReads.take

    def taken(self, *arguments):
        waits = take(self, *arguments)
        held.append(sum(waiting.tensor.nbytes for waiting in self._waiting))
        return waits

    monkeypatch.setattr(late.LateReads, "take", taken)
    model, images = here(Freed()), here(torch.ones(8, 16))
    with Monitor(model, images):
        for _ in range(4):
            held.clear()
            launches.clear()
            model.zero_grad()
            model(images).sum().backward()
    # 512 bytes each: an eighth of what passes is less than the least.
    assert max(held) == 1 << 12
    assert launches["fold_kernel"] == 4


def test_padding_is_left_out(request):
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(6, 9), nn.Linear(9, 6)

        def forward(self, x, attention_mask=None):
            return self.down(functional.gelu(self.up(x)))

    def figures():
        torch.manual_seed(3)
        model = here(Tokens())
        mask = here(torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]]))
        inputs = {"x": here(torch.randn(2, 4, 6)), "attention_mask": mask}
        with Monitor(model, inputs) as monitor:
            for step in range(4):
                model.zero_grad()
                model(**inputs).square().sum().backward()
                # Who decides by the number of calls need not wait for the sums.
                assert monitor._observer.calls.steps == step + 1
        assert "padding was left out by the attention mask" in monitor.compute().notes
        return monitor

    check(request, figures)


def test_a_write_without_gradients_is_no_activation_function():
    """It leaves the node of what made the tensor, which may be the same function."""
    read = []
    reads = late.LateReads(read.extend, lambda _: ["relu"], share=1, keeps=False)
    for value in (0, 0, 1):
        z = torch.randn(3, requires_grad=True).relu()
        waits = reads.take("layer", None, z)
        with torch.no_grad():
            z += value
        reads.finish()
        assert not waits and not read and reads.lost == 0
    z = torch.randn(3, requires_grad=True) * 1
    for _ in range(2):
        z = torch.randn(3, requires_grad=True) * 1
        reads.take("other", None, z)
        z.relu_()
        reads.finish()
    assert [waiting.tensor for waiting in read] == [z]
