"""What only a GPU can show: 64-bit offsets, no waiting, CUDA graphs, bits equal to the CPU's."""

import warnings

import pytest
import torch
from helpers import NUMBA as cpu
from helpers import REFERENCE as reference
from helpers import TRITON as gpu
from torch import nn
from torch.nn import functional

from fastplastic import Monitor
from fastplastic.kernels import Law

pytestmark = pytest.mark.gpu

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MANY = 2**31


def noise(*shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(device="cuda", dtype=dtype)


def network():
    """Weights in the layouts that occur, and gradients in those of their weights."""
    weights = [
        noise(256, 512),
        noise(64, 3, 7, 7),
        noise(64, 32, 3, 3).contiguous(memory_format=torch.channels_last),
        noise(96, 80).t(),
    ]
    return weights, [torch.empty_like(w).copy_(noise(*w.shape)) for w in weights]


@pytest.fixture(autouse=True)
def memory():
    yield
    torch.cuda.empty_cache()


@pytest.fixture
def must_not_wait():
    """Let everything that synchronises raise."""
    before = torch.cuda.get_sync_debug_mode()

    def set_mode(mode):
        # torch says that this is a prototype.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.cuda.set_sync_debug_mode(mode)

    def arm(on=True):
        torch.cuda.synchronize()
        set_mode("error" if on else before)

    yield arm
    set_mode(before)


@pytest.mark.parametrize("units_adjacent", [True, False])
def test_activations_and_gradients_past_2_31_elements(units_adjacent):
    rows = MANY // 1024 + 1
    x = torch.zeros(rows, 1024, dtype=torch.bfloat16, device="cuda")
    x[-1, -3] = 3
    axis = 1 if units_adjacent else 0
    unit = 1024 - 3 if units_adjacent else rows - 1
    g = gpu.gradient_stats(x, axis)
    h = gpu.activation_stats(x, axis, "relu")
    positions = x.shape[1 - axis]
    assert g[:, unit].tolist() == [positions, 3, 9, 0]
    assert h[:, unit].tolist() == [positions, 3, 3, 9, 0, 3, positions - 1, positions - 1, 0]
    assert g[0].sum().item() == x.numel() and g[1].sum().item() == 3


def test_one_unit_past_2_31_positions():
    x = torch.zeros(MANY + 77, 1, dtype=torch.bfloat16, device="cuda")
    x[-1] = 2
    assert gpu.gradient_stats(x)[:, 0].tolist() == [MANY + 77, 2, 4, 0]


def test_parameters_and_selection_past_2_31_elements():
    w = torch.ones(MANY // 1024 + 1, 1024, dtype=torch.bfloat16, device="cuda")
    w[-1, -2] = 0.5
    rows, columns = gpu.parameter_stats([w], [None])
    assert rows[:3, -1].tolist() == [1024, 1023.5, 1023.25]
    assert columns[:3, -2].tolist() == [w.shape[0], w.shape[0] - 0.5, w.shape[0] - 0.75]
    chosen = gpu.select([w], None, ["w"], 1, criterion="magnitude")
    law = Law("uniform", 7.0, 0.0)
    masks = gpu.selection_masks(chosen, [w], None)
    gpu.resample_([w], ["w"], [law], masks=masks)
    assert w[-1, -2].item() == 7
    assert (w == 1).sum().item() == w.numel() - 1


def test_the_host_does_not_wait(must_not_wait):
    x, (weights, gradients) = noise(8, 64, 14, 14), network()
    masks = [noise(*weight.shape) > 0 for weight in weights]
    law = [Law("normal", 0.0, 0.02)] * len(weights)
    names = [str(i) for i in range(len(weights))]
    table = torch.zeros(9, 64, dtype=torch.float64, device="cuda")

    def step(gradients):
        gpu.activation_stats(x, 1, "gelu", out=table)
        gpu.gradient_stats(x.to(memory_format=torch.channels_last))
        gpu.parameter_stats(weights, gradients)
        gpu.resample_(weights, names, law, masks=masks)

    step(gradients)
    must_not_wait()
    # Gradients at other addresses: the table of addresses is sent again.
    step([gradient.clone() for gradient in gradients])


class Tokens(nn.Module):
    """Two layers over tokens, some of which are padding."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x, attention_mask=None):
        return self.down(functional.gelu(self.up(x)))


@pytest.mark.parametrize("scaled", [False, True])
def test_a_watched_step_does_not_wait(must_not_wait, scaled):
    model = Tokens().cuda()
    scaler = torch.amp.GradScaler("cuda", enabled=scaled)
    mask = (torch.arange(16, device="cuda") < 9).expand(8, 16).long()
    inputs = {"x": noise(8, 16, 64), "attention_mask": mask}
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    with Monitor(model, inputs, grad_scale=scaler if scaled else None) as monitor:
        for step in range(6):
            if step == 3:
                must_not_wait()
            scaler.scale(model(**inputs).square().mean()).backward()
            optimizer.step()
            optimizer.zero_grad()
    must_not_wait(False)
    profile = monitor.compute()
    assert profile["up"].stats["n"].tolist() == [6 * 8 * 9] * 128


class Aside(nn.Module):
    """A layer that runs on a stream of its own, if it has one."""

    def __init__(self):
        super().__init__()
        self.inner, self.stream = nn.Linear(512, 512), None

    def forward(self, x):
        if self.stream is None:
            return self.inner(x)
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            z = self.inner(x)
        torch.cuda.current_stream().wait_stream(self.stream)
        z.record_stream(torch.cuda.current_stream())
        return z


def test_layers_on_another_stream_are_read():
    """The tables are cleared on one stream and added to on two."""
    model, x = nn.Sequential(Aside(), nn.ReLU()).cuda(), noise(4096, 512)
    monitor = Monitor(model, x[:2])
    model[0].stream = torch.cuda.Stream()
    with monitor:
        for _ in range(5):
            model(x).sum().backward()
            monitor.compute()
            monitor.reset()
            model(x).sum().backward()
    found = monitor.compute()["0.inner"].stats.table[:9]
    expected = gpu.activation_stats(model[0](x).detach(), 1, "relu").cpu()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-2)


def test_cuda_graph_replays_with_what_it_was_captured_with():
    z, (weights, gradients) = noise(512, 64), network()
    tables = [
        gpu.activation_stats(z, 1, "gelu"),
        gpu.gradient_stats(z),
        *gpu.parameter_stats(weights, gradients),
    ]
    once = [table.clone() for table in tables]

    def step():
        gpu.activation_stats(z, 1, "gelu", out=tables[0])
        gpu.gradient_stats(z, out=tables[1])
        gpu.parameter_stats(weights, gradients, out=(tables[2], tables[3]))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        step()
    # Others use the launchers in between, with other shapes and addresses.
    others = [[gradient.clone() for gradient in gradients] for _ in range(6)]
    for other in others:
        gpu.parameter_stats(weights, other)
    gpu.gradient_stats(noise(4096, 4096))
    for _ in range(2):
        graph.replay()
    # Eager twice (once on the side stream), replayed twice.
    for table, first in zip(tables, once, strict=True):
        sums = [i for i in range(len(table)) if len(table) != 9 or i not in (4, 5)]
        torch.testing.assert_close(table[sums], 4 * first[sums])
    assert torch.equal(tables[0][4:6], once[0][4:6])


def test_capture_without_a_warm_up_is_refused():
    weights, gradients = network()
    graph = torch.cuda.CUDAGraph()
    gpu.parameter_stats([noise(4, 4)], [None])
    with pytest.raises(RuntimeError, match="warm up on the stream"), torch.cuda.graph(graph):
        gpu.parameter_stats(weights, gradients)


def test_every_stream_has_its_own_scratch_memory():
    x = noise(4096, 256)
    expected = gpu.gradient_stats(x)
    torch.cuda.synchronize()
    streams, found = [torch.cuda.Stream() for _ in range(4)], []
    for _ in range(10):
        for stream in streams:
            with torch.cuda.stream(stream):
                found.append(gpu.gradient_stats(x))
    torch.cuda.synchronize()
    assert all(torch.equal(table, expected) for table in found)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_initial_values_are_those_of_the_cpu(dtype):
    """The same bits, for laws of every kind, on enough elements to reach the tails."""
    laws = [
        Law("normal", 0.0, 0.02),
        Law("normal", 0.1, 1.5, 0.02275, 0.97725, -2.0, 2.0),
        Law("uniform", -0.1, 0.2),
        Law("uniform", 3.0, 0.0),
    ]
    names = [f"layer{i}.weight" for i in range(len(laws))]
    ours = [torch.zeros(1024, 1025, dtype=dtype, device="cuda") for _ in laws]
    theirs = [torch.zeros(1024, 1025, dtype=dtype) for _ in laws]
    gpu.resample_(ours, names, laws, seed=3)
    cpu.resample_(theirs, names, laws, seed=3)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one.cpu(), other)


@pytest.mark.parametrize("criterion", ["swr", "gradient", "magnitude", "random"])
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_selections_are_those_of_the_cpu(criterion, dtype):
    weights = [noise(512, 300, dtype=dtype), noise(64, 33, dtype=dtype).t()]
    gradients = [noise(*weight.shape, dtype=dtype) for weight in weights]
    names, count = ["a", "b"], 20_000
    found = gpu.select(weights, gradients, names, count, criterion=criterion)
    ours = gpu.selection_masks(found, weights, gradients)
    on_cpu = [w.cpu() for w in weights], [g.cpu() for g in gradients]
    theirs = cpu.selection_masks(cpu.select(*on_cpu, names, count, criterion=criterion), *on_cpu)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one.cpu(), other)


def test_sums_are_those_of_the_reference_on_the_cpu():
    """At sizes that take many programs; on the GPU's own exp and erf."""
    z = noise(64, 128, 28, 28)
    for name in ("relu", "gelu", "silu", "mish", "softplus", "tanh", "elu"):
        found = gpu.activation_stats(z, 1, name).cpu()
        expected = reference.activation_stats(z.cpu(), 1, name)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-2)
    weights, gradients = network()
    found = gpu.parameter_stats(weights, gradients)
    expected = reference.parameter_stats([w.cpu() for w in weights], [g.cpu() for g in gradients])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=1e-5, atol=1e-3)
