"""Trainings in several processes, a monitor in each: functions that another process can find."""

import os
from contextlib import nullcontext

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import fastplastic
from fastplastic.errors import FastPlasticError
from fastplastic.measure import meeting, together

# Samples of each process in each step: the last batch of the data is smaller.
EVEN, UNEVEN = ((4, 4), (4, 4)), ((4, 4), (4, 1))


class Block(nn.Module):
    """A transformer block."""

    def __init__(self, recompute):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.fc1, self.act, self.fc2 = nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)
        self.recompute = recompute

    def forward(self, x):
        if self.recompute is None:
            return self.body(x)
        return checkpoint(self.body, x, use_reentrant=self.recompute)

    def body(self, x):
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        x = x + self.out(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.fc2(self.act(self.fc1(self.norm2(x))))


class Experts(nn.Module):
    """Each process uses an expert of its own, one process all: the other half of the batch."""

    def __init__(self):
        super().__init__()
        first, second = (
            nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)) for _ in range(2)
        )
        self.experts = nn.ModuleList([first, second])
        self.rank = None

    def forward(self, x):
        if self.rank is not None:
            return self.experts[self.rank](x)
        first, second = x.chunk(2)
        return torch.cat([self.experts[0](first), self.experts[1](second)])


def model_of(name, recompute=None):
    """Return a model in eval mode, the same in each process, and the shape of a sample."""
    torch.manual_seed(0)
    if name == "experts":
        return Experts().eval(), (6,)
    if name == "cnn":
        layers = [nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Conv2d(6, 5, 3)]
        layers += [nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3)]
        return nn.Sequential(*layers).eval(), (2, 8, 8)
    # What is recomputed by a reentrant pass needs an input that has a gradient.
    blocks = [nn.Linear(8, 8), Block(recompute), nn.Flatten(), nn.Linear(40, 7), nn.ReLU()]
    blocks.append(nn.Linear(7, 3))
    return nn.Sequential(*blocks).eval(), (5, 8)


def batch_of(shape, step, rank, size):
    draws = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(size, *shape, generator=draws), torch.arange(size) % 3


def wrapped(model, kind, options):
    """Return what the loop calls."""
    if kind == "ddp":
        return DistributedDataParallel(model, **options)
    if kind == "fsdp":
        # Not the last layer: that is one of the root's.
        fully_shard(model[1 if isinstance(model[1], Block) else 0], **options)
        fully_shard(model, **options)
    return model


def loss_of(output, targets, sizes):
    """Return the mean over processes of the mean over the batch of each that has one."""
    parts = zip(output.split(sizes), targets.split(sizes), strict=True)
    means = [cross_entropy(one.float(), own) for one, own in parts if len(own)]
    return sum(means, start=output.sum() * 0) / len(sizes)


def trained(
    rank, kind, name, sizes=EVEN, recompute=None, options=None, scaler=None, every=1, split=1,
    sync=True, whole=False, by_hand=False, zeros=False,
):  # fmt: skip
    """Train for some steps under a monitor, and return what it says.

    Args:
        kind: "ddp", "fsdp", or "" for nothing around the model.
        sizes: Samples of each process, in each step.
        options: Of what wraps the model.
        scaler: A first scale, under which the second step overflows in one process.
        split: How many batches a step is made of.
        sync: Whether gradients are reduced behind each of them.
        whole: Whether this process has the batches of all.
        zeros: Whether gradients are set to 0, instead of None.
        by_hand: Whether there is no optimizer, and gradients are cleared behind the forward pass.
    """
    model, shape = model_of(name, recompute)
    run = wrapped(model, kind, options or {})
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    amp = torch.amp.GradScaler("cpu", init_scale=scaler or 1.0, enabled=scaler is not None)
    given = amp if scaler else None
    example = batch_of(shape, 0, 0, 2)[0]
    with fastplastic.Monitor(model, example, every=every, grad_scale=given) as monitor:
        if name == "experts" and not whole:
            model.rank = rank
        joining = run.join() if kind == "ddp" and any(0 in own for own in sizes) else nullcontext()
        with joining:
            for number, own in enumerate(sizes):
                mine = range(len(own)) if whole else [rank]
                if kind == "ddp" and not own[rank]:
                    continue
                # One process takes all parts at once: their gradient is that of their mean.
                parts = [range(split)] if whole else [[part] for part in range(split)]
                for part in parts:
                    each = [(number * 9 + p, r) for p in part for r in mine]
                    pairs = [batch_of(shape, step, r, own[r]) for step, r in each]
                    x, y = (torch.cat(values) for values in zip(*pairs, strict=True))
                    with waiting(run, kind, sync or part is parts[-1]):
                        loss = loss_of(run(x), y, [len(b[1]) for b in pairs]) / len(parts)
                        if by_hand:
                            optimizer.zero_grad()
                        bad = float("inf") if scaler and number == 1 and len(own) - 1 in mine else 1
                        amp.scale(loss * bad).backward()
                if by_hand:
                    continue
                amp.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                amp.step(optimizer)
                amp.update()
                optimizer.zero_grad(set_to_none=not zeros)
    return said(monitor)


def waiting(run, kind, reduces):
    """Let gradients be accumulated in this process alone."""
    if kind == "fsdp":
        run.set_requires_gradient_sync(reduces)
    return run.no_sync() if kind == "ddp" and not reduces else nullcontext()


def said(monitor, *, alone=False):
    with fastplastic.alone() if alone else nullcontext():
        profile = monitor.compute()
    return {
        "tables": {layer.name: layer.stats.table for layer in profile},
        "plan": {
            name: units.tolist()
            for name, units in fastplastic.plan(profile, criterion="gradient", ratio=0.3)
            .units.items()
        },
        "figures": (profile.samples, profile.mode, profile.notes, profile.seed),
    }  # fmt: skip


def several(rank, calls):
    """Make several trainings in one trip."""
    return [trained(rank, **call) for call in calls]


def in_words(call):
    """Return what a call raises, and of which type it is."""
    try:
        call()
    except FastPlasticError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def mixed(dtype):
    return {"mp_policy": MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)}


def refused(rank):
    """Return what is said of wrappers, of other options, and of calls that do not fit."""
    found = {}
    model, shape = model_of("cnn")
    x, y = batch_of(shape, 0, rank, 4)
    ddp = DistributedDataParallel(model)
    found["wrapper"] = in_words(lambda: fastplastic.Monitor(ddp, x))
    found["options"] = in_words(lambda: fastplastic.Monitor(model, x, every=1 + rank))
    found["models"] = in_words(
        lambda: fastplastic.Monitor(model_of("cnn" if rank else "block")[0], x)
    )
    with fastplastic.Monitor(model, x) as monitor:
        # Without the wrapper nothing makes the gradients the same.
        cross_entropy(model(x), y).backward()
    profile = monitor.compute()
    found["apart"] = [note for note in profile.notes if "differed" in note]
    found["apart counts"] = (
        float(profile["0"].stats["n_dw"].sum()), float(profile["0"].stats["n_in"].sum()),
        float(profile["0"].stats["n_g"].sum()),
    )  # fmt: skip
    found["alone"] = said(monitor, alone=True)["figures"][0]
    spread = model_of("cnn")[0]
    fully_shard(spread)
    with fastplastic.Monitor(spread, x) as own:
        cross_entropy(spread(x), y).backward()
    with fastplastic.alone():
        found["a part"] = in_words(own.compute)
    if rank:
        monitor._observer.own_observation = None
    try:
        found["failed"] = in_words(monitor.compute)
    except TypeError:
        found["failed"] = "by hand"
    found["again"] = own.compute().samples
    return found


def dying(rank):
    """Let one process end in the middle of compute()."""
    model, shape = model_of("cnn")
    x, y = batch_of(shape, 0, rank, 4)
    with fastplastic.Monitor(model, x) as monitor:
        cross_entropy(DistributedDataParallel(model)(x), y).backward()
    if rank == 1:
        together._reduced = lambda *_: os._exit(1)
    assert meeting.put_together is together.put_together
    return in_words(monitor.compute)
