"""Advice from a profile, and the record of the criteria."""

import torch
from torch import nn

import fastplastic
from fastplastic.trials import advise, better_than_random
from fastplastic.trials.evidence import FILE, _evidence


def network(dead: int) -> nn.Sequential:
    """Return a network of 40 hidden units, some of which are dead."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 40), nn.ReLU(), nn.Linear(40, 4))
    with torch.no_grad():
        model[0].bias.fill_(3.0)
        model[0].bias[:dead] = -50.0
    return model


def profiled(model):
    torch.manual_seed(1)
    return fastplastic.profile(model, [(torch.randn(32, 8), torch.arange(32) % 4)])


def test_dead_units_are_what_it_goes_by():
    limit = _evidence()["advice"]["limit"]
    assert 0 < limit < 0.75
    damaged, healthy = (advise(profiled(network(dead))) for dead in (30, 0))
    assert damaged.share == 0.75 and damaged.helps
    assert healthy.share == 0.0 and not healthy.helps
    assert damaged.text.startswith("re-initialisation is likely to help: 75 % of the units")
    assert healthy.text.startswith("re-initialisation is not likely to help: 0 % of the units")
    helped, cases = _evidence()["advice"]["above"]
    assert f"it helped in {helped} of {cases} cases of the project's own trials" in damaged.text
    helped, cases = _evidence()["advice"]["below"]
    assert f"it helped in {helped} of {cases}" in healthy.text


def test_units_that_cannot_die_say_little():
    model = network(0)
    assert "says little here" not in advise(profiled(model)).text
    model[1] = nn.GELU()
    assert advise(profiled(model)).text.endswith("so that this says little here")


def test_there_is_none_without_units_to_re_initialise():
    assert advise(profiled(nn.Sequential(nn.Linear(8, 4)))) is None


def test_the_record_of_criteria():
    for granularity, names in _evidence()["criteria"].items():
        for name, (better, networks) in names.items():
            assert better_than_random(granularity, name) == (better, networks)
            assert 0 <= better <= networks and networks > 0
    assert better_than_random("unit", "random") is None
    assert FILE.name == "evidence.json"
