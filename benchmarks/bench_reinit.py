"""plan and reinit_ on a large model: against one copy of its parameters, in time and in memory.

pytest benchmarks/bench_reinit.py
"""

from functools import cache

import pytest
import timm
import torch
from interleaved import DEVICE, compare, extra_memory, noise
from torch import nn

import fastplastic

MODEL = "vit_large_patch16_224"
RATIO = 0.05


@cache
def profiled() -> tuple[nn.Module, fastplastic.Profile]:
    """Return the model and its profile on one image; its weights are random."""
    torch.manual_seed(0)
    model = timm.create_model(MODEL).to(DEVICE).eval()
    batches = [(noise(1, 3, 224, 224), torch.zeros(1, dtype=torch.int64))]
    return model, fastplastic.profile(model, batches, gradients=True)


def copy_of(model: nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


# Before anything is written: weights that have changed cannot be planned.
@pytest.mark.parametrize("granularity", ["unit", "weight"])
def test_plan(benchmark, granularity):
    """From a finished profile; the time itself has a target for units, 50 ms."""
    model, profile = profiled()
    arguments = {"ratio": RATIO, "granularity": granularity}
    compare(
        benchmark,
        lambda: fastplastic.plan(profile, **arguments),
        {"copy of the parameters": lambda: copy_of(model)},
    )
    benchmark.extra_info["plan ms"] = round(benchmark.stats.stats.median * 1e3, 1)


@pytest.mark.parametrize(
    ("granularity", "outgoing"), [("unit", "zero"), ("unit", "small"), ("weight", "zero")]
)
def test_reinit(benchmark, granularity, outgoing):
    """All of it, with the copy of what is overwritten."""
    model, profile = profiled()
    if granularity == "weight":
        profiled.cache_clear()
        model, profile = profiled()
    plan = fastplastic.plan(profile, ratio=RATIO, granularity=granularity)

    def ours() -> None:
        fastplastic.reinit_(model, plan, outgoing=outgoing)

    report = fastplastic.reinit_(model, plan, outgoing=outgoing)
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    written = sum(4 * entry.elements for entry in report.written)
    benchmark.extra_info["written %"] = round(100 * written / size, 2)
    benchmark.extra_info["extra memory %"] = round(1e8 * extra_memory(ours) / size, 2)
    compare(benchmark, ours, {"copy of the parameters": lambda: copy_of(model)})
