"""Which criteria find what on real weights, how far they agree, and what a reset does.

Prints Markdown tables for tf_efficientnet_lite0 with ImageNet weights on the Fashion-MNIST images
of the package, after a head for their ten classes has been fitted (linear probe):

    python benchmarks/criteria.py lite0.safetensors
"""

import copy
import itertools
import sys
from collections.abc import Iterable, Sequence

import timm
import torch
from torch import Tensor, nn

import fastplastic
from fastplastic.criteria import CRITERIA, WEIGHT_CRITERIA
from fastplastic.errors import InputError
from fastplastic.files import checkpoint
from fastplastic.sources import batches

MODEL = "tf_efficientnet_lite0"
RATIO = 0.05
BATCH, N_BATCHES, N_LOSS = 16, 16, 4
STEPS = 12

Batches = Sequence[tuple[Tensor, Tensor]]


def fitted(path: str) -> tuple[nn.Module, Batches]:
    """Return the model with a head fitted to the images, and the images."""
    model = timm.create_model(MODEL)
    checkpoint.load_into(model, path)
    model.eval()
    data = list(batches("sample", model=model, batch_size=BATCH, max_batches=N_BATCHES))
    model.reset_classifier(10)
    with torch.no_grad():
        features = torch.cat(
            [model.forward_head(model.forward_features(x), pre_logits=True) for x, _ in data]
        )
    labels = torch.cat([y for _, y in data])
    head = model.get_classifier()
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        decay = 1e-2 * head.weight.square().sum()
        value = nn.functional.cross_entropy(head(features), labels) + decay
        value.backward()
        return value

    optimizer.step(loss)
    return model, data


def chosen(plan: fastplastic.Plan) -> set[tuple[str, int]]:
    """Return what a plan takes as a set of (name, number)."""
    masks = {name: mask.flatten().nonzero().flatten() for name, mask in plan.masks.items()}
    parts = {**plan.units, **masks}
    return {(name, int(i)) for name, numbers in parts.items() for i in numbers}


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table."""
    print(f"\n{title}\n\n| {' | '.join(columns)} |")
    print("|---|" + "--:|" * (len(columns) - 1))
    for row in rows:
        print(f"| {' | '.join(row)} |")


def overlap(one: set[tuple[str, int]], other: set[tuple[str, int]]) -> str:
    """Return the shared part of two choices of one size."""
    return f"{100 * len(one & other) / max(len(one), 1):.0f} %"


def found(profile: fastplastic.Profile) -> None:
    """Print how many units the criteria find at the thresholds of their sources."""
    rows = []
    for rule in CRITERIA.values():
        if rule.threshold is None:
            continue
        made = fastplastic.plan(
            profile, criterion=rule.name, threshold=rule.threshold, max_layer_fraction=1.0
        )
        share = f"{100 * made.count / made.eligible:.1f} %"
        rows.append((rule.name, f"{rule.threshold:g}", f"{made.count:,}", share))
    table("Units found at the threshold", ("criterion", "threshold", "units", "share"), rows)


def agreement(
    names: Iterable[str], granularity: str, whole: fastplastic.Profile, halves: Sequence
) -> None:
    """Print how far criteria agree with each other, and with themselves on other images."""

    def plan(profile: fastplastic.Profile, name: str) -> fastplastic.Plan:
        return fastplastic.plan(profile, criterion=name, ratio=RATIO, granularity=granularity)

    sets = {}
    for name in names:
        try:
            sets[name] = chosen(plan(whole, name))
        except InputError as error:
            print(f"\n{name}: {error}")
    rows = []
    for name in sets:
        one, two = (chosen(plan(half, name)) for half in halves)
        rows.append((name, overlap(one, two), *(overlap(sets[name], sets[o]) for o in sets)))
    table(f"Overlap of {granularity}s at {RATIO:.0%}", ("", "two halves", *sets), rows)


def resets(model: nn.Module, profile: fastplastic.Profile, data: Batches) -> None:
    """Print the loss before and after each kind of reset."""
    kinds = ("zero", "zero, compensated", "small", "fresh", "keep")
    rows = []
    for name, kind in itertools.product(("dormant", "contribution", "random"), kinds):
        plan = fastplastic.plan(profile, criterion=name, ratio=RATIO)
        more = {"outgoing": kind.partition(",")[0], "compensate": "," in kind}
        rows.append((f"units, {name}", kind, *losses(model, plan, data, **more)))
    for name in WEIGHT_CRITERIA:
        plan = fastplastic.plan(profile, criterion=name, ratio=RATIO, granularity="weight")
        rows.append((f"weights, {name}", "", *losses(model, plan, data)))
    table(f"Loss at {RATIO:.0%}", ("what", "outgoing", "before", "after", "difference"), rows)


def losses(model: nn.Module, plan: fastplastic.Plan, data: Batches, **more) -> tuple[str, ...]:
    """Return the loss before, after, and the difference."""
    report = fastplastic.reinit_(copy.deepcopy(model), plan, batches=data, **more)
    jump = report.loss_after - report.loss_before
    return f"{report.loss_before:.3f}", f"{report.loss_after:.3f}", f"{jump:+.3f}"


def taken_again(model: nn.Module, data: Batches) -> None:
    """Print how many units that `gradient` took it takes again, right away and after training."""
    profile = fastplastic.profile(model, data)
    plan = fastplastic.plan(profile, criterion="gradient", ratio=RATIO)
    rows = []
    for kind in ("zero", "small", "fresh", "keep"):
        reset = copy.deepcopy(model)
        report = fastplastic.reinit_(reset, plan, outgoing=kind, batches=data)
        now = share_again(reset, plan, data)
        train(reset, data)
        rows.append((kind, f"{report.loss_after:.3f}", now, share_again(reset, plan, data)))
    columns = ("outgoing", "loss after the reset", "right away", f"after {STEPS} steps")
    table(f"Taken again by gradient at its threshold, of {plan.count} units", columns, rows)


def share_again(model: nn.Module, plan: fastplastic.Plan, data: Batches) -> str:
    """Return the share of the units of a plan that `gradient` takes at its threshold."""
    rule = CRITERIA["gradient"]
    scores = fastplastic.profile(model.eval(), data).score(rule.name)
    found = torch.cat([scores[name][units] for name, units in plan.units.items()])
    return f"{float((found <= rule.threshold).double().mean()):.0%}"


def train(model: nn.Module, data: Batches) -> None:
    """Take a few steps of SGD."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    torch.manual_seed(0)
    for x, y in itertools.islice(itertools.cycle(data), STEPS):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def main(path: str) -> None:
    """Print all tables."""
    model, data = fitted(path)
    print(f"{MODEL}, {len(data) * BATCH} images, torch {torch.__version__}")
    whole = fastplastic.profile(model, data, gradients=True)
    found(whole)
    half = len(data) // 2
    halves = [
        fastplastic.profile(model, part, gradients=True) for part in (data[:half], data[half:])
    ]
    agreement(CRITERIA, "unit", whole, halves)
    agreement(WEIGHT_CRITERIA, "weight", whole, halves)
    resets(model, whole, data[:N_LOSS])
    taken_again(model, data[:N_LOSS])


if __name__ == "__main__":
    main(sys.argv[1])
