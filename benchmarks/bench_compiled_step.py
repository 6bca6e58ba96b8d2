"""What watching a compiled model costs: a compiled step with `Monitor` against one without.

pytest benchmarks/bench_compiled_step.py --benchmark-json results.json
"""

import copy

import pytest
import timm
import torch
from bench_overhead import step_of
from interleaved import DEVICE, compare, noise

import fastplastic

SIZES = {"resnet18": 112, "vit_tiny_patch16_224": 112}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SIZES)
def test_compiled_step(benchmark, name):
    torch.manual_seed(0)
    options = {"img_size": SIZES[name]} if name.startswith("vit") else {}
    watched = timm.create_model(name, **options).to(DEVICE).train()
    images = noise(8, 3, SIZES[name], SIZES[name])
    plain = copy.deepcopy(watched)
    # The compiler takes the code of one model for another of the same class.
    plain.__class__ = type("Plain", (type(plain),), {})
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    with fastplastic.Monitor(watched, images[:2]) as monitor:
        steps = [
            step_of(torch.compile(model, fullgraph=True), images) for model in (watched, plain)
        ]
        compare(benchmark, steps[0], {"plain": steps[1]}, rounds=21)
    benchmark.extra_info["graph breaks"] = sum(torch._dynamo.utils.counters["graph_break"].values())
    benchmark.extra_info["layers measured"] = monitor.compute().coverage.measured
