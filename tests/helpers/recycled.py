"""Trainings in several processes, a Recycler in each: functions that another process can find."""

import copy

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import fastplastic
from fastplastic.model import is_spread
from helpers.watched import batch_of, in_words, loss_of, wrapped

METHODS = {
    "redo": {"method": "redo", "threshold": 0.6, "every": 2},
    "cbp": {"method": "cbp", "rate": 0.05, "maturity": 1, "decay": 0.5},
    "grama": {"method": "grama", "threshold": 0.7, "every": 2},
    "swr": {"method": "swr", "threshold": 0.2, "every": 2},
    "random": {"method": "random", "ratio": 0.2, "every": 2},
    "activation_gradient": {
        "method": "custom", "criterion": "activation_gradient", "threshold": 0.7, "every": 3,
    },
    "positions": {"method": "redo", "threshold": 0.6, "every": 2, "sample_positions": 2},
}  # fmt: skip


def net():
    torch.manual_seed(0)
    layers = [nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3)]
    return nn.Sequential(*layers)


def recycled(rank, kind, method, whole=False, size=2, stop=None, state=None):
    """Train for 6 steps, and return what was re-initialised, and what there is in the end.

    Args:
        kind: "ddp", "fsdp", or "" for nothing around the model.
        method: Key of METHODS.
        whole: Whether this process has the batches of all.
        stop: Step behind which to stop.
        state: Of the model, the optimizer and the Recycler, to go on from.
    """
    model = net()
    target = copy.deepcopy(model)
    begin = 0
    if state is not None:
        begin = state[2]["steps"]
        model.load_state_dict(state[0])
    run = wrapped(model, kind, {})
    if kind == "fsdp":
        wrapped(target, kind, {})
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    if state is not None:
        optimizer.load_state_dict(state[1])
    own = METHODS[method]
    example = torch.zeros(2, 6)
    with fastplastic.Recycler(model, example, optimizer, sync=[target], **own) as recycler:
        if state is not None:
            recycler.load_state_dict(state[2])
        for step in range(begin, stop or 6):
            pairs = [batch_of((6,), step, r, 4) for r in (range(size) if whole else [rank])]
            x, y = (torch.cat(values) for values in zip(*pairs, strict=True))
            loss_of(run(x), y, [4] * len(pairs)).backward()
            optimizer.step()
            recycler.step()
            optimizer.zero_grad()
    return {
        "resets": [(reset.step, reset.to_dict()["units"], reset.counts) for reset in recycler.log],
        "overlaps": [reset.overlap for reset in recycler.log],
        "model": gathered(model),
        "target": gathered(target),
        "optimizer": copy.deepcopy(optimizer.state_dict()) if kind != "fsdp" else {},
        "recycler": recycler.state_dict(),
        "skipped": dict(recycler.skipped),
    }


def gathered(model):
    """Return the whole weights."""
    state = model.state_dict()
    return {n: w.full_tensor() if is_spread(w) else w.clone() for n, w in state.items()}


def each(rank, kind, methods, **options):
    """Make a training with each of some methods."""
    return [recycled(rank, kind, method, **options) for method in methods]


def gone_on(rank):
    """Stop a training, go on from its state, and return both ends."""
    found = recycled(rank, "ddp", "cbp", stop=3)
    state = found["model"], found["optimizer"], found["recycler"]
    return recycled(rank, "ddp", "cbp"), recycled(rank, "ddp", "cbp", state=state)


def refused(rank):
    """Return what is said of wrappers, of other arguments and gradients, and of a failure."""
    found = {}
    model = net()
    ddp = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    x, y = batch_of((6,), 0, rank, 4)
    make = fastplastic.Recycler
    found["wrapper"] = in_words(lambda: make(ddp, x, optimizer, "redo"))
    found["seed"] = in_words(lambda: make(model, x, optimizer, "redo", seed=rank))
    found["option"] = in_words(lambda: make(model, x, optimizer, "redo", every=2 + rank))
    # Without the wrapper nothing makes the gradients the same.
    with make(model, x, optimizer, "redo", every=1) as recycler:
        cross_entropy(model(x), y).backward()
        optimizer.step()
        found["gradients"] = in_words(recycler.step)
    optimizer.zero_grad()
    with make(model, x, optimizer, "redo", every=1) as recycler:
        cross_entropy(ddp(x), y).backward()
        optimizer.step()
        if rank:
            recycler._watch.take = None
        try:
            found["failed"] = in_words(recycler.step)
        except TypeError:
            found["failed"] = "by hand"
    with fastplastic.alone(), make(model, x, optimizer, "redo", every=1) as recycler:
        cross_entropy(model(x), y).backward()
        optimizer.step()
        found["alone"] = in_words(recycler.step)
    return found
