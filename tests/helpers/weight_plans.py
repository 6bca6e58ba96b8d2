"""Plans of single weights that several processes make: functions that another process can find."""

import os
import time
from dataclasses import replace
from unittest.mock import patch

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import fastplastic
from fastplastic import processes
from fastplastic.errors import FastPlasticError
from fastplastic.graph import build_graph
from fastplastic.planning import control

# Rows and columns of all are cut unevenly by four processes, and some of these have none.
WIDTHS = (6, 10, 9, 3)
# What reads no gradients, and what does.
REQUESTS = {
    "ratio": {"criterion": "magnitude", "ratio": 0.3},
    "ties": {"criterion": "random", "ratio": 0.31, "seed": 3},
    "layer": {"criterion": "magnitude", "ratio": 0.2, "scope": "layer"},
    "threshold": {"criterion": "magnitude", "threshold": 0.4},
    "capped": {"criterion": "magnitude", "threshold": 1.1, "max_layer_fraction": 0.2},
    "named": {"criterion": "magnitude", "ratio": 0.4, "include": ("0", "1.weight", "3.bias")},
    "swr": {"ratio": 0.3, "max_layer_fraction": 0.35},
    "gradient": {"criterion": "gradient", "threshold": 0.7, "include": ("*", "1.weight", "3.bias")},
}


def net(widths=WIDTHS):
    """Return a model in eval mode, the same in each process."""
    torch.manual_seed(0)
    first, second, third, last = widths
    model = nn.Sequential(
        nn.Linear(first, second), nn.BatchNorm1d(second), nn.ReLU(),
        nn.Linear(second, third), nn.GELU(), nn.Linear(third, last),
    )  # fmt: skip
    nn.init.uniform_(model[1].weight)
    return model.eval()


def wiring(widths=WIDTHS):
    """Return the wiring of the model, so that not each process traces it."""
    return build_graph(net(widths), batches(0, 1, widths)[0][0])


def batches(rank, size, widths=WIDTHS):
    """Return the share of a process of four batches."""
    torch.manual_seed(1)
    return [(torch.randn(4, widths[0]), torch.arange(4) % 3) for _ in range(4)][rank::size]


def spread(model, size, kind):
    """Spread a model over all processes, in two copies, or only some of its layers."""
    shape = (2, size // 2) if kind == "hybrid" else (size,)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("copies", "parts")[-len(shape) :])
    fully_shard(model[3] if kind == "some" else model, mesh=mesh)


def profiled(rank, size, kind, graph, widths=WIDTHS):
    """Return a model and its profile with the mean gradients of the batches of all processes."""
    model = net(widths)
    if kind not in ("whole", "copies"):
        spread(model, size, kind)
    own = batches(rank, size, widths)
    return model, fastplastic.profile(model, own, gradients=True, example_inputs=graph)


def gradients_made_up(profile):
    """Return the profile with gradients that are the same however many processes there are.

    Some are equal, some NaN, and of a part those of the whole.
    """
    found = {}
    for name, weight in profile.weights.items():
        part = profile.weights.parts.get(name)
        torch.manual_seed(sum(name.encode()))
        whole = torch.randn(part.shape if part else weight.shape).round(decimals=1)
        whole.flatten()[2] = float("nan")
        found[name] = whole[box(part)] if part else whole
    return replace(profile, gradients=found)


def box(part):
    """Return what to index a whole tensor with."""
    sides = zip(part.offsets, part.sizes, strict=True)
    return tuple(slice(begin, begin + size) for begin, size in sides)


def told(plan):
    """Return all that a plan says."""
    return {
        "masks": plan.masks,
        "parts": {name: (part.shape, box(part)) for name, part in plan.parts.items()},
        "says": (
            plan.counts, plan.sizes, plan.count, plan.eligible, repr(plan), plan._repr_html_(),
            plan.notes, sorted(plan.wiring),
        ),
    }  # fmt: skip


def planned(rank, size, kind, graph):
    """Return what plans say, the control of one, and the weights after two of them."""
    model, profile = profiled(rank, size, kind, graph)
    made_up = gradients_made_up(profile)
    plans = {
        name: fastplastic.plan(made_up, granularity="weight", **request)
        for name, request in REQUESTS.items()
    }
    plans["control"] = control(plans["swr"], made_up, seed=5)
    said = {name: told(plan) for name, plan in plans.items()}
    parts = {name: (part.shape, box(part)) for name, part in profile.weights.parts.items()}
    reports = [fastplastic.reinit_(model, plans[name], seed=7) for name in ("swr", "ties")]
    # The profile refers to the weights as they are now.
    return said, dict(profile.weights), parts, [(repr(one), one.shares) for one in reports]


def own_gradients(rank, size, kind, graph):
    """Return gradients, weights, their parts, and the plans of units and of weights."""
    _, profile = profiled(rank, size, kind, graph)
    parts = {name: (part.shape, box(part)) for name, part in profile.weights.parts.items()}
    said = [fastplastic.plan(profile, granularity="weight", ratio=r).counts for r in (0.1, 0.4)]
    return profile.gradients, dict(profile.weights), parts, said


def text_of(function):
    """Return what a call raises, in words."""
    try:
        function()
    except FastPlasticError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def refusals(rank, size, path, graph):
    """Return the texts of all that is refused, by what was done."""
    model, profile = profiled(rank, size, "fsdp", graph)
    weights = {"granularity": "weight", "criterion": "magnitude"}
    plan = fastplastic.plan(profile, **weights, ratio=0.2)
    asked = {
        "ratio": {"ratio": 0.2 if rank else 0.1},
        "seed": {"ratio": 0.2, "seed": rank},
        "ratio out of range": {"ratio": 1.2},
        "caps": {"ratio": 0.9},
        "names": {"ratio": 0.1, "exclude": ("nothing",)},
    }
    said = {
        name: text_of(lambda request=request: fastplastic.plan(profile, **weights, **request))
        for name, request in asked.items()
    }
    said["save"] = text_of(lambda: plan.save(f"{path}/plan{rank}.safetensors"))
    said["save profile"] = text_of(lambda: profile.save(f"{path}/{rank}.safetensors"))
    with processes.alone():
        said["alone"] = text_of(lambda: fastplastic.plan(profile, **weights, ratio=0.2))
    other = replace(profile, layers=profile.layers[rank == 1 :])
    said["layers"] = text_of(lambda: fastplastic.plan(other, **weights, ratio=0.2))
    if rank == 1:
        model[0].weight.to_local().data[0, 0] += 1
    said["changed"] = text_of(lambda: fastplastic.plan(profile, **weights, ratio=0.2))
    return said


def wire(rank, size, kind, widths, granularity, graph):
    """Return the bytes of each table that was added up for a plan."""
    _, profile = profiled(rank, size, kind, graph, widths)
    sent, reduce = [], torch.distributed.all_reduce

    def counting(table, *arguments, **options):
        sent.append(table.numel() * table.element_size())
        return reduce(table, *arguments, **options)

    request = {"criterion": "magnitude" if granularity == "weight" else "dormant", "ratio": 0.3}
    with patch.object(torch.distributed, "all_reduce", counting):
        plan = fastplastic.plan(profile, granularity=granularity, **request)
    return sent, len(profile.layers) - 1, plan.count


def one_fails(rank, size, how, graph):
    """Let process 2 of four end, or run out of memory, in the middle of a plan."""
    _, profile = profiled(rank, size, "fsdp", graph)
    reduce = torch.distributed.all_reduce

    def failing(table, *arguments, **options):
        if rank == 2 and table.ndim == 2:
            if how == "ends":
                os._exit(1)
            raise MemoryError("by hand")
        return reduce(table, *arguments, **options)

    begun = time.monotonic()
    with patch.object(torch.distributed, "all_reduce", failing):
        try:
            said = text_of(lambda: fastplastic.plan(profile, granularity="weight", ratio=0.1))
        except MemoryError as error:
            said = f"MemoryError: {error}"
    after = text_of(lambda: fastplastic.plan(profile, granularity="weight", ratio=0.1))
    return said, after, time.monotonic() - begun
