"""Outgoing columns that are drawn afresh, with a small norm or from the law of their reader."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import fastplastic
from fastplastic import FastPlasticError, plan, reinit_
from fastplastic.model import fingerprint
from fastplastic.reinit import transaction as apply_module

MODELS = {
    "linear": (lambda: [nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 40)], (6,)),
    "conv": (lambda: [nn.Conv2d(3, 12, 3), nn.ReLU(), nn.Conv2d(12, 20, 3)], (3, 8, 8)),
    "grouped": (
        lambda: [nn.Conv2d(3, 12, 1), nn.ReLU(), nn.Conv2d(12, 20, 3, groups=4)], (3, 6, 6),
    ),
    "flattened": (
        lambda: [nn.Conv2d(3, 12, 1), nn.ReLU(), nn.Flatten(), nn.Linear(48, 30)], (3, 2, 2),
    ),
    "columns first": (lambda: [Conv1D(12, 6), nn.ReLU(), Conv1D(40, 12)], (5, 6)),
}  # fmt: skip


@pytest.fixture(params=MODELS)
def case(request):
    """Return a model, a plan that takes a quarter of its units, its input and its last layer."""
    torch.manual_seed(0)
    make, shape = MODELS[request.param]
    layers = make()
    model = nn.Sequential(*layers, *([] if len(shape) == 1 else [nn.Flatten()]))
    x = torch.randn(8, *shape)
    found = fastplastic.profile(model, [(x, torch.zeros(8, dtype=torch.long))])
    made = plan(found, criterion="random", ratio=0.25, include="0")
    return model, made, x, f"{len(layers) - 1}.weight"


def after(case, **options):
    """Return the model after a re-initialisation of a copy."""
    model = copy.deepcopy(case[0])
    report = reinit_(model, case[1], **options)
    return model, dict(model.named_parameters()), report


def written(case):
    """Return which outgoing weights are those of the units: what "zero" makes zero."""
    return after(case, outgoing="zero")[1][case[3]] == 0


def by_column(model, name, weight):
    """Return the weight with its columns in front: [columns, the rest]."""
    reader = model.get_submodule(name.rpartition(".")[0])
    groups = getattr(reader, "groups", 1)
    if isinstance(reader, Conv1D):
        return weight
    parts = weight.unflatten(0, (groups, -1))
    return parts.movedim(2, 1).flatten(0, 1).flatten(1)


def test_small_columns_have_a_share_of_the_median_norm(case):
    model, _, _, name = case
    mask = written(case)
    now, weights, report = after(case, outgoing="small")
    old = model.get_parameter(name)
    assert torch.equal(weights[name][~mask], old[~mask])
    columns = by_column(model, name, weights[name].detach())
    chosen = by_column(model, name, mask).all(1)
    assert 0 < chosen.sum() < len(chosen)
    norms = columns.norm(dim=1)
    expected = 0.02 * norms[~chosen].median()
    torch.testing.assert_close(norms[chosen], expected.expand(int(chosen.sum())))
    directions = columns[chosen] / norms[chosen][:, None]
    assert (directions @ directions.T).fill_diagonal_(0).abs().max() < 0.9
    # Unlike with zeros, the first step already moves the incoming weights.
    rows = case[1].units["0"]
    now(case[2]).square().sum().backward()
    unit_dim = 1 if isinstance(model[0], Conv1D) else 0
    gradient = weights["0.weight"].grad.movedim(unit_dim, 0)[rows].flatten(1)
    assert (gradient.abs().sum(1) > 0).any()
    assert {w.name: w.elements for w in report.written}[name] == int(mask.sum())


def test_fresh_columns_have_the_law_of_their_reader(case):
    model, _, _, name = case
    mask = written(case)
    _, weights, _ = after(case, outgoing="fresh")
    old = model.get_parameter(name)
    assert torch.equal(weights[name][~mask], old[~mask])
    fresh = weights[name][mask].detach()
    assert (fresh != old[mask]).all()
    reader = model.get_submodule(name.rpartition(".")[0])
    if isinstance(reader, Conv1D):
        assert abs(float(fresh.std()) / 0.02 - 1) < 0.2
        return
    bound = reader.weight[0].numel() ** -0.5
    assert 0.7 * bound < fresh.abs().max() <= bound and abs(float(fresh.mean())) < bound / 3


@pytest.mark.parametrize("outgoing", ["small", "fresh"])
def test_a_column_depends_on_its_seed_alone(case, outgoing):
    name = case[3]
    one = after(case, outgoing=outgoing, seed=1)[1][name]
    assert torch.equal(one, after(case, outgoing=outgoing, seed=1)[1][name])
    assert not torch.equal(one, after(case, outgoing=outgoing, seed=2)[1][name])


@pytest.mark.parametrize("outgoing", ["small", "fresh"])
def test_a_failure_leaves_everything_as_it_was(case, monkeypatch, outgoing):
    model = case[0]
    before = copy.deepcopy(model.state_dict())
    draw = apply_module._draw_columns

    def failing(*arguments):
        draw(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(apply_module, "_draw_columns", failing)
    with pytest.raises(KeyboardInterrupt):
        reinit_(model, case[1], outgoing=outgoing)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_columns_that_are_drawn_but_have_no_norm_yet_are_put_back(case, monkeypatch):
    model = case[0]
    before = copy.deepcopy(model.state_dict())
    resample, calls = apply_module.resample_, []

    def failing(weights, names, *arguments, **options):
        resample(weights, names, *arguments, **options)
        calls.append(names)
        if names == [case[3]]:
            raise MemoryError

    monkeypatch.setattr(apply_module, "resample_", failing)
    with pytest.raises(MemoryError):
        reinit_(model, case[1], outgoing="small")
    assert len(calls) == 2
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_columns_that_are_not_finite_have_no_median_norm(case):
    model, made, _, name = case
    with torch.no_grad():
        model.get_parameter(name)[~written(case)] = torch.nan
    with pytest.raises(FastPlasticError, match="has columns that are not finite"):
        reinit_(model, made, outgoing="small")


def test_small_columns_in_half_precision(case):
    model, made, _, name = case
    mask = written(case)
    model = copy.deepcopy(model).to(torch.bfloat16)
    made = replace(made, fingerprint=fingerprint(model))
    reinit_(model, made, outgoing="small")
    values = by_column(model, name, model.get_parameter(name).detach().float())
    chosen = by_column(model, name, mask).all(1)
    norms = values.norm(dim=1)
    expected = 0.02 * norms[~chosen].median()
    torch.testing.assert_close(norms[chosen], expected.expand(int(chosen.sum())), rtol=0.01, atol=0)


@pytest.mark.parametrize("outgoing", ["zero", "small"])
def test_the_criterion_gradient_takes_these_units_again(case, outgoing):
    _, made, x, _ = case
    reset = after(case, outgoing=outgoing)[0]
    batches = [(x, torch.zeros(8, dtype=torch.long))]
    scores = fastplastic.profile(reset, batches).score("gradient")["0"][made.units["0"]]
    assert (scores <= 0.1).all()
    assert bool(scores.any()) == (outgoing == "small")
