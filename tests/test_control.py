import pytest
import torch
from helpers.tuned import data, small
from torch import nn

import fastplastic
from fastplastic.errors import InputError
from fastplastic.planning import control
from fastplastic.reinit import removal, shrink_perturb_


@pytest.fixture(scope="module")
def profile():
    return fastplastic.profile(small(), list(data().plain), gradients=True)


@pytest.mark.parametrize("granularity", ["unit", "weight"])
@pytest.mark.parametrize("how", [{"ratio": 0.3}, {"threshold": 0.6}])
def test_a_control_takes_as_many_of_each_layer_at_random(profile, granularity, how):
    plan = fastplastic.plan(profile, granularity=granularity, **how)
    first, second = (control(plan, profile, seed=seed) for seed in (1, 2))
    assert plan.count > 2
    assert first.counts == second.counts == plan.counts
    assert first.criterion == "random" and first.fingerprint == plan.fingerprint
    chosen = "units" if granularity == "unit" else "masks"
    names = list(getattr(plan, chosen))

    def same(one, other):
        return all(torch.equal(getattr(one, chosen)[x], getattr(other, chosen)[x]) for x in names)

    assert not same(first, second) and not same(first, plan)
    assert same(first, control(plan, profile, seed=1))
    fastplastic.reinit_(small(), first)


def test_a_control_chooses_evenly(profile):
    plan = fastplastic.plan(profile, ratio=0.2)
    seen = torch.zeros(16)
    for seed in range(300):
        seen[control(plan, profile, seed=seed).units["0"]] += 1
    expected = 300 * plan.counts["0"] / 16
    assert (seen / expected).min() > 0.6 and (seen / expected).max() < 1.4


def test_a_control_of_a_capped_layer(profile):
    plan = fastplastic.plan(profile, ratio=0.9, max_layer_fraction=1.0)
    assert control(plan, profile, seed=0).counts == plan.counts


def test_removal_writes_nothing_before_it_is_called(profile):
    model = small()
    plan = fastplastic.plan(profile, ratio=0.2)
    remove = removal(model, plan)
    assert torch.equal(model[2].weight, small()[2].weight)
    remove()
    units = plan.units["0"]
    assert not model[2].weight[:, units].any()
    live = torch.ones(16, dtype=torch.bool)
    live[units] = False
    assert torch.equal(model[2].weight[:, live], small()[2].weight[:, live])
    assert torch.equal(model[0].weight, small()[0].weight)


def test_shrink_and_perturb():
    model = nn.Sequential(nn.Linear(60, 50), nn.Linear(50, 3))
    before = model[0].weight.detach().clone()
    head = model[1].weight.detach().clone()
    state = torch.get_rng_state()
    shrink_perturb_(model, shrink=0.3, noise=0.1, exclude=["1"], seed=4)
    noise = (model[0].weight - 0.3 * before) / 0.1
    assert abs(noise.mean()) < 0.1 and abs(noise.std() - 1) < 0.05
    assert torch.equal(model[1].weight, head)
    assert torch.equal(torch.get_rng_state(), state)
    again = nn.Sequential(nn.Linear(60, 50), nn.Linear(50, 3))
    again[0].weight.data = before
    shrink_perturb_(again, shrink=0.3, noise=0.1, seed=4)
    assert torch.equal(again[0].weight, model[0].weight)


@pytest.mark.parametrize(("shrink", "noise"), [(1.0, 0.0), (-0.1, 0.0), (0.5, -1.0)])
def test_numbers_that_do_not_shrink(shrink, noise):
    with pytest.raises(InputError, match=f"shrink {shrink}, noise {noise}: expected a factor"):
        shrink_perturb_(nn.Linear(2, 2), shrink=shrink, noise=noise)


def test_shrink_and_perturb_leaves_out_patterns_and_lets_the_optimizer_forget():
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(4, 6)).sum().backward()
    optimizer.step()
    head = model[2].weight.detach().clone()
    shrink_perturb_(model, exclude=["[12]"], optimizer=optimizer)
    assert torch.equal(model[2].weight, head)
    first, last = (optimizer.state[model[number].weight] for number in (0, 2))
    assert first["step"] == 0 and not first["exp_avg"].any() and last["step"] == 1
    with pytest.raises(InputError, match="exclude: no module 'hed' among 3"):
        shrink_perturb_(model, exclude=["hed"])
