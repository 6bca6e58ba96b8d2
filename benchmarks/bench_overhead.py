"""What watching a model costs: a training step with `Monitor` against the same step without.

pytest benchmarks/bench_overhead.py --benchmark-json results.json
"""

import copy
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext

import naive
import pytest
import timm
import torch
from interleaved import DEVICE, GPU, compare, extra_memory, noise
from torch import Tensor, nn

import fastplastic
from fastplastic import kernels

MODELS = ("resnet50", "vit_small_patch16_224", "convnext_tiny", "efficientnet_b0")
BATCHES = (32, 256) if GPU else (8,)


def step_of(model: nn.Module, images: Tensor) -> Callable[[], None]:
    def step() -> None:
        model.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16) if GPU else nullcontext():
            loss = model(images).float().square().mean()
        loss.backward()

    return step


def model_of(name: str, batch: int) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = timm.create_model(name).to(DEVICE).train()
    images = noise(batch, 3, 224, 224)
    if GPU:
        model = model.to(memory_format=torch.channels_last)
        images = images.contiguous(memory_format=torch.channels_last)
    return model, images


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", MODELS)
def test_step(benchmark, name, batch):
    model, images = model_of(name, batch)
    twin = copy.deepcopy(model)
    step, watched = step_of(model, images), step_of(twin, images)
    monitor = fastplastic.Monitor(twin, images[:2])
    monitor.attach()
    benchmark.extra_info["hooks"] = len(monitor._observer._reads.sites)
    peaks = {}
    for kind, function in {"plain": step, "watched": watched}.items():
        # What may be read later is learned from the first steps.
        for _ in range(3):
            function()
        # Only what a step itself allocates: no gradients from before.
        model.zero_grad(set_to_none=True)
        twin.zero_grad(set_to_none=True)
        peaks[kind] = extra_memory(function)
    for reader in monitor._observer._readers:
        sums = reader.sums
        tables = (sums.activations, sums.gradients, *sums.parameters)
        peaks["watched"] += sum(table.nbytes for table in tables) / 1e6
    benchmark.extra_info |= {f"peak MB {kind}": round(peak, 2) for kind, peak in peaks.items()}
    benchmark.extra_info["extra memory %"] = round(100 * (peaks["watched"] / peaks["plain"] - 1), 3)
    compare(benchmark, watched, {"plain": step}, rounds=11)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("limit", [1024, 4096])
@pytest.mark.parametrize("name", MODELS[:2])
def test_sampled_step(benchmark, name, limit, batch):
    """A step that is read at a sample of its positions, beside one that is read whole."""
    model, images = model_of(name, batch)
    steps = {"plain": step_of(model, images)}
    for kind, positions in {"whole": None, "sampled": limit}.items():
        twin = copy.deepcopy(model)
        fastplastic.Monitor(twin, images[:2], sample_positions=positions).attach()
        steps[kind] = step_of(twin, images)
    compare(benchmark, steps.pop("sampled"), steps, rounds=11)


# By itself: a step after this one has to ask the system for memory that was given back.
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", MODELS)
def test_naive_step(benchmark, name, batch):
    model, images = model_of(name, batch)
    step = step_of(model, images)
    slow = naive.NaiveMonitor(model, images[:2])

    def naively() -> None:
        slow.seen.clear()
        with slow:
            step()

    compare(benchmark, naively, {"plain": step})


def test_fixed_cost_of_a_hook(benchmark):
    """One activation and one gradient of almost no size: what remains is the way there."""
    x = noise(1, 8)
    table = kernels.activation_stats(x, 1, "relu")
    compare(benchmark, lambda: kernels.activation_stats(x, 1, "relu", out=table), {"sum": x.sum})


def test_fixed_cost_in_a_model(benchmark):
    """100 tiny layers: the difference, over the tensors read, is the cost of a hook."""
    layers = [module for _ in range(100) for module in (nn.Linear(8, 8), nn.ReLU())]
    model = nn.Sequential(*layers, nn.Linear(8, 8)).to(DEVICE)
    images = noise(4, 8)
    watched = copy.deepcopy(model)
    with fastplastic.Monitor(watched, images) as monitor:
        compare(benchmark, step_of(watched, images), {"plain": step_of(model, images)})
    reads = sum(
        len(reader.activations) + (reader.gradients is not None)
        for readers in monitor._observer._reads.sites.values()
        for reader in readers
    )
    cost = benchmark.stats.stats.median * 1e3 - benchmark.extra_info["plain ms"]
    benchmark.extra_info["tensors read"] = reads
    benchmark.extra_info["us per tensor"] = round(cost / reads * 1e3, 1)


FIRST_CALL = """
import time
import torch
device = "cuda" if torch.cuda.is_available() else "cpu"
x = torch.ones(64, 32, device=device)
start = time.perf_counter()
from fastplastic import kernels
kernels.activation_stats(x, 1, "relu")
kernels.gradient_stats(x, 1)
kernels.parameter_stats([x], [x])
if device == "cuda":
    torch.cuda.synchronize()
print(time.perf_counter() - start)
"""


def test_first_call(benchmark):
    """Import and first call of the three kernels in a fresh process, compiled code on disk."""

    def run() -> float:
        command = [sys.executable, "-c", FIRST_CALL]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return float(done.stdout)

    run()
    times: list[float] = []
    benchmark.pedantic(lambda: times.append(run()), rounds=5)
    benchmark.extra_info["first call s"] = round(sorted(times)[2], 3)
