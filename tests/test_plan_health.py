"""A plan says how many of the units that it takes are weak by its criterion."""

import json

import pytest
import torch
from helpers.program import SMALL
from torch import nn

from fastplastic import Plan, plan, profile
from fastplastic.criteria import CRITERIA

TAU = CRITERIA["dormant"].threshold


@pytest.fixture(scope="module")
def found():
    """The profile of a layer of 40 units, of which 6 are silent, before another of 20."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(5, 40), nn.ReLU(), nn.Linear(40, 20), nn.ReLU(), nn.Linear(20, 2)
    )
    with torch.no_grad():
        model[0].weight[:6] *= 1e-4
        model[0].bias[:6] *= 1e-4
    return profile(model, [(torch.randn(200, 5), torch.zeros(200).long())])


def test_all_are_weak_where_there_are_enough(found):
    made = plan(found, ratio=0.1)
    assert made.count == made.beyond == 6
    assert made.notes == ()


def test_healthy_ones_are_counted_and_said(found):
    made = plan(found, ratio=0.3)
    scores = torch.cat(list(made.scores.values()))
    assert made.count == 18 and made.beyond == int((scores <= TAU).sum()) == 8
    assert made.notes == (
        "10 of the 18 chosen units are healthy by dormant, whose threshold is 0.025: threshold "
        "0.025 instead of a ratio takes the weak ones alone",
    )
    assert plan(found, threshold=0.025).notes == ()


def test_on_the_other_side_of_the_scale(found):
    made = plan(found, criterion="saturated", ratio=0.2)
    scores = torch.cat(list(made.scores.values()))
    assert made.beyond == int((scores >= 0.95).sum()) < made.count


def test_without_a_threshold_nothing_is_said(found):
    for criterion in ("random", "contribution"):
        made = plan(found, criterion=criterion, ratio=0.3)
        assert made.beyond is None and made.notes == ()


def test_it_is_in_the_file_and_files_without_it_load(found, tmp_path):
    made, path = plan(found, ratio=0.3), tmp_path / "plan.json"
    made.save(path)
    values = json.loads(path.read_text())
    assert values.pop("beyond") == 8
    path.write_text(json.dumps(values))
    assert Plan.load(path).beyond == 8
    plan(found, criterion="random", ratio=0.3).save(path, force=True)
    assert "beyond" not in json.loads(path.read_text())


def test_the_command_line_shows_it(run):
    output = " ".join(run("plan", *SMALL, "--ratio", "0.3").output.split())
    assert "chosen are beyond the threshold of dormant (at most 0.025)" in output
    assert "beyond" not in run("plan", *SMALL, "--ratio", "0.3", "--criterion", "random").output
