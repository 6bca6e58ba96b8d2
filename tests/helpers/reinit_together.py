"""What several processes re-initialise together: functions that another process can find."""

import os
import time
from contextlib import contextmanager
from unittest import mock

import timm
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode

import fastplastic
from fastplastic.errors import FastPlasticError
from fastplastic.model import local_of, part_of
from fastplastic.reinit import run
from helpers.together import batches_of
from helpers.together import model_of as small_model


def grouped():
    """Return convolutions in groups that no number of processes divides."""
    return nn.Sequential(
        nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 12, 3, groups=3),
        nn.ReLU(), nn.Conv2d(12, 10, 3, groups=2, bias=False), nn.BatchNorm2d(10), nn.ReLU(),
        nn.Flatten(), nn.Linear(40, 9), nn.ReLU(), nn.Linear(9, 3),
    )  # fmt: skip


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_layer=2, n_embd=24, n_head=2, vocab_size=50, n_positions=16, attn_implementation="eager"
    )
    return GPT2LMHeadModel(config)


MODELS = {
    "mlp": lambda: small_model("mlp"),
    "grouped": grouped,
    "gpt2": gpt2,
    "vit": lambda: timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=5),
    "resnet18": lambda: timm.create_model("resnet18", num_classes=3),
}


def model_of(name):
    torch.manual_seed(0)
    return MODELS[name]().eval()


def example_of(name):
    """Return one batch to make a plan with."""
    torch.manual_seed(1)
    if name == "gpt2":
        tokens = torch.randint(50, (2, 8))
        return [{"input_ids": tokens, "labels": tokens}]
    shape = {"mlp": (6,), "grouped": (3, 8, 8)}.get(name, (3, 32, 32))
    return [(torch.randn(2, *shape), torch.zeros(2, dtype=torch.int64))]


def plan_of(name, ratio=0.3, seed=0):
    with fastplastic.alone():
        profile = fastplastic.profile(model_of(name), example_of(name), backward=False)
    return fastplastic.plan(profile, criterion="random", ratio=ratio, seed=seed)


def spread(model, size, kind):
    """Spread the parameters of a model: "fsdp", "mixed", "hybrid", "tensor" or "both"."""
    shape = (2, size // 2) if kind in ("hybrid", "both") else (size,)
    if kind == "copies":
        return model
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("data", "parts")[-len(shape) :])
    if kind in ("tensor", "both"):
        ways = {"0": ColwiseParallel(), "3": RowwiseParallel()}
        parallelize_module(model, mesh["parts"], ways)
    if kind != "tensor":
        names = ("BasicBlock", "Block", "GPT2Block")
        blocks = [module for module in model.modules() if type(module).__name__ in names]
        policy = MixedPrecisionPolicy(torch.bfloat16 if kind == "mixed" else None)
        for module in [*blocks, model]:
            fully_shard(module, mesh=mesh["data"] if kind == "both" else mesh, mp_policy=policy)
    return model


def trained(model):
    """Return an optimizer that remembers something else than 0 of each weight."""
    optimizer = torch.optim.AdamW(model.parameters())
    for number, weight in enumerate(model.parameters()):
        optimizer.state[weight] = {
            "step": torch.tensor(3.0),
            "exp_avg": torch.full_like(weight, number + 1.0),
            "exp_avg_sq": torch.full_like(weight, number + 2.0),
        }
    return optimizer


class _NothingWhole(TorchDispatchMode):
    """Refuses operations that gather anything, and numbers as many as a whole weight has."""

    def __init__(self, limit):
        super().__init__()
        self._limit = limit

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert "gather" not in str(func), func
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, torch.Tensor) and value.is_floating_point() and not value.is_meta:
                own = local_of(value)
                # Expanded ones take no memory.
                held = own.untyped_storage().nbytes() // own.itemsize
                assert held < self._limit, (func, tuple(value.shape))
        return result


@contextmanager
def nothing_whole(model):
    """Let no process hold as much as the largest of the weights that are cut."""
    cut = [p.numel() for name, p in model.named_parameters() if part_of(name, p).cut]

    def refused(*args, **kwargs):
        raise AssertionError("a whole weight is asked for")

    limit = max(cut, default=1 << 40)
    with mock.patch.object(DTensor, "full_tensor", refused), _NothingWhole(limit):
        yield


def state_of(model, optimizer, copy):
    """Return everything that `reinit_` may write to, by name."""
    found = dict(model.state_dict())
    found |= {f"copy {name}": value for name, value in copy.state_dict().items()}
    names = {id(weight): name for name, weight in model.named_parameters()}
    for weight, state in optimizer.state.items():
        found |= {f"{names[id(weight)]}: {key}": value for key, value in state.items()}
    return found


def written(rank, size, kind, name, plan, options):
    """Return what differs from one process alone, and the report."""

    def ready(kind):
        model, copy = (spread(model_of(name), size, kind) for _ in range(2))
        return model, trained(model), copy

    whole, remembered, copy = ready("copies")
    with fastplastic.alone():
        expected = fastplastic.reinit_(
            whole, plan, optimizer=remembered, copies=[copy], reset_steps=True, **options
        )
    wanted = state_of(whole, remembered, copy)
    untouched = model_of(name).state_dict()
    model, remembered, copy = ready(kind)
    with nothing_whole(model):
        report = fastplastic.reinit_(
            model, plan, optimizer=remembered, copies=[copy], reset_steps=True, **options
        )
    found = state_of(model, remembered, copy)
    assert found.keys() == wanted.keys()
    differs = [
        key for key, value in found.items()
        if not torch.equal(local_of(value), slice_of(wanted[key], part_of(key, value)))
    ]  # fmt: skip
    changed = sum(not torch.equal(wanted[key], value) for key, value in untouched.items())
    assert report.to_dict() == expected.to_dict()
    return differs, changed


def slice_of(whole, part):
    """Return what of a whole tensor a process holds."""
    return whole[tuple(slice(at, at + n) for at, n in zip(part.offsets, part.sizes, strict=True))]


def measured(rank, size, kind, name, plan, count):
    """Return state, losses and notes of what is adjusted on batches; each has its share."""
    model = spread(model_of(name), size, kind)
    batches = [(x[:, :, :8, :8] if name == "grouped" else x, y) for x, y in batches_of(name, count)]
    report = fastplastic.reinit_(
        model, plan, batches=batches[rank::size], compensate=True, recalibrate=True
    )
    state = {key: local_of(value) for key, value in model.state_dict().items()}
    parts = {key: part_of(key, value) for key, value in model.state_dict().items()}
    return state, parts, report.to_dict()


def failing(rank, size, kind, plan, who, error):
    """Let the loss fail in one process when all is written; return what is said and changed."""
    model = spread(model_of("mlp"), size, kind)
    before = {key: local_of(value).clone() for key, value in model.state_dict().items()}
    losses = []

    def bad(output, targets):
        losses.append(1)
        if rank == who and len(losses) == 4:
            raise error
        return output.sum()

    said = attempt(model, plan, batches=batches_of("mlp", 2), loss_fn=bad)
    kept = [torch.equal(local_of(value), before[key]) for key, value in model.state_dict().items()]
    return said, all(kept), attempt(model, plan)


def attempt(model, plan, **options):
    """Return the error of a re-initialisation, in words."""
    try:
        fastplastic.reinit_(model, plan, **options)
    except (FastPlasticError, ValueError, KeyboardInterrupt) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def differing(rank, size, plan, other):
    """Return what is said where one process was called with something else."""
    last = rank == size - 1
    model = model_of("mlp")
    optimizer = trained(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    said = [
        attempt(model, plan, seed=1 if last else 0),
        attempt(model, other if last else plan),
        attempt(model, plan, outgoing="keep" if last else "zero"),
        attempt(model, plan, optimizer=optimizer if last else None),
        # What is wrong in one process alone.
        attempt(model, plan, outgoing="nothing" if last else "zero"),
        attempt(model if rank else model_of("grouped"), plan),
    ]
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    return said


def alone_with_parts(rank, size, plan):
    """Return what one process that works alone is told of a model that is cut."""
    model = spread(model_of("mlp"), size, "fsdp")
    parallel = spread(model_of("mlp"), size, "tensor")
    batches = batches_of("mlp", 1)
    with fastplastic.alone():
        said = [attempt(model, plan, outgoing="small"), attempt(model, plan, batches=batches)]
    return [*said, attempt(parallel, plan, batches=batches, compensate=True)]


def ending(rank, size, plan):
    """Let one process end without a word while it writes; return what the others are told."""
    model = spread(model_of("mlp"), size, "fsdp")
    before = {key: local_of(value).clone() for key, value in model.state_dict().items()}
    start = time.monotonic()

    def end(*args):
        os._exit(1)

    with mock.patch.object(run, "apply", end if rank == 2 else run.apply):
        said = attempt(model, plan, outgoing="small")
    kept = [torch.equal(local_of(value), before[key]) for key, value in model.state_dict().items()]
    return said, all(kept), time.monotonic() - start
