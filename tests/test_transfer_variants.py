"""The scripts of the study beside its trials: other ways to give a dose, and what is measured."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from helpers.tuned import settings, small, task

import fastplastic
from fastplastic.trials import parse_arm
from fastplastic.trials.prepare import Start

FOLDER = Path(__file__).parent.parent / "benchmarks" / "transfer"
DOSE = parse_arm("dormant@0.5:fresh+max=1").dose


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    yield __import__
    for name in ("measure", "variants", "study", "networks", "data"):
        sys.modules.pop(name, None)


@pytest.fixture
def start():
    return Start(task(), settings(), 0)


def test_the_parts_of_a_plan_are_all_of_it_once(script, start):
    variants = script("variants")
    plan = start.plan(DOSE)
    parts = list(variants._parts(plan, 4))
    assert len(parts) == 4 and sum(part.count for part in parts) == plan.count
    for name, units in plan.units.items():
        found = torch.cat([part.units[name] for part in parts if name in part.units])
        assert torch.equal(found.sort().values, units)


def test_only_fresh_weights_learn_at_another_rate(script, start):
    variants = script("variants")
    model = copy.deepcopy(start.model)
    old = {name: p.detach().clone() for name, p in model.named_parameters()}
    after = variants.rate(0.3)(variants.Run(start, model, DOSE, 10))
    begin = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    after(optimizer, 1)
    for name, p in model.named_parameters():
        fresh = begin[name] != old[name]
        steps = begin[name] - p.detach()
        assert torch.allclose(steps[fresh], torch.tensor(0.3), atol=1e-5)
        assert torch.allclose(steps[~fresh], torch.tensor(1.0), atol=1e-5)
    assert any(bool((begin[name] != old[name]).any()) for name in old)


@pytest.mark.parametrize(("name", "at"), [("spread", [0, 3, 7, 10]), ("rounds", [0, 10, 20])])
def test_later_resets_come_when_they_are_due(script, start, monkeypatch, name, at):
    variants = script("variants")
    counts = []
    monkeypatch.setattr(
        variants, "reinit_", lambda model, plan, **options: counts.append(plan.count)
    )
    after = getattr(variants, name)(variants.Run(start, copy.deepcopy(start.model), DOSE, 100))
    resets = {0: len(counts)}
    for done in range(1, 101):
        before = len(counts)
        after(torch.optim.SGD([torch.zeros(1)], lr=1.0), done)
        resets[done] = len(counts) - before
    assert [done for done, number in resets.items() if number] == at
    total = start.plan(DOSE).count
    assert sum(counts) == total if name == "spread" else abs(sum(counts) - total) <= 3


def test_growth_is_how_much_larger_weights_are_than_fresh_ones(script):
    measure = script("measure")
    fresh, grown = small(), small()
    with torch.no_grad():
        grown[0].weight.mul_(2)
    torch.manual_seed(0)
    found = fastplastic.profile(grown, [(torch.randn(16, 6), torch.arange(16) % 3)])
    weights = dict(fresh.named_parameters())
    growth = {layer.name: measure._growth(layer, weights) for layer in found}
    assert growth["0"] == pytest.approx(2.0) and growth["2"] == pytest.approx(1.0)
