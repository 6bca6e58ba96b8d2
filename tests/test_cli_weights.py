"""Single weights on the command line: plan, reinit, and what is refused before anything slow."""

from pathlib import Path

import timm
import torch
from safetensors.torch import load_file

from fastplastic.planning import Plan
from fastplastic.sources import create_model

# A model that timm has for tests, on few and small images.
MODEL = "test_resnet"
SMALL = (MODEL, "--no-pretrained", "--img-size", "32", "-b", "4", "--batches", "2")
WEIGHTS = ("--granularity", "weight")


def refused(outcome, text):
    assert (outcome.code, outcome.output) == (2, "") and text in outcome.error


def test_plan_and_reinit_of_single_weights(run):
    outcome = run("plan", *SMALL, *WEIGHTS, "--ratio", "0.1", "-o", "plan.safetensors")
    assert (outcome.code, outcome.error) == (0, "")
    plan = Plan.load("plan.safetensors")
    assert plan.criterion == "swr" and plan.count == int(0.1 * plan.eligible) > 0
    assert f"{plan.count:,} of {plan.eligible:,} eligible weights: swr" in outcome.output
    assert "or lent for the loss): fc.weight" in " ".join(outcome.output.split())
    assert f"reinit {' '.join(SMALL[:1])} " in outcome.output
    assert "--plan plan.safetensors -o" in " ".join(outcome.output.split())
    outcome = run("reinit", *SMALL[:4], "--plan", "plan.safetensors", "-o", "new.safetensors")
    assert (outcome.code, outcome.error) == (0, "")
    assert "init default, seed 0" in outcome.output and "outgoing" not in outcome.output
    new = load_file("new.safetensors")
    old = create_model(MODEL, pretrained=False, img_size=32).model.state_dict()
    timm.create_model(MODEL).load_state_dict(new, strict=True)
    for name, value in old.items():
        mask = plan.masks.get(name, torch.zeros(value.shape, dtype=torch.bool))
        assert torch.equal(new[name][~mask], value[~mask])
        assert (new[name][mask] != value[mask]).all()


def test_reinit_plans_weights_on_the_spot(run):
    more = (*WEIGHTS, "--ratio", "0.05", "--criterion", "magnitude", "--include", "layer1*")
    outcome = run("reinit", *SMALL, *more, "--dry-run")
    assert outcome.code == 0
    assert "magnitude failed in all settings" in " ".join(outcome.output.split())
    assert "layer1.0.conv1.weight" in outcome.output and "layer2" not in outcome.output


def test_a_head_that_was_lent_for_the_loss_is_not_planned(run):
    more = (
        *WEIGHTS,
        "--ratio",
        "0.05",
        "--criterion",
        "random",
        "--include",
        "fc",
        "--include",
        "*",
    )
    outcome = run("plan", *SMALL, *more, "-o", "plan.safetensors")
    assert outcome.code == 0
    assert "or lent for the loss): fc.weight" in " ".join(outcome.output.split())
    assert "fc.weight" not in Plan.load("plan.safetensors").masks


def test_what_does_not_go_with_weights_is_refused_at_once(run, nothing_slow):
    plan = ("plan", MODEL, *WEIGHTS, "--ratio", "0.1", "-o", "plan.json")
    refused(run(*plan), "-o plan.json: expected plan.json for units, plan.safetensors for")
    units = ("plan", MODEL, "--ratio", "0.1", "-o", "plan.safetensors")
    refused(run(*units), "-o plan.safetensors: expected plan.json for units")
    reinit = ("reinit", MODEL, *WEIGHTS, "--ratio", "0.1", "-o", "x.safetensors")
    refused(run(*reinit, "--outgoing", "keep"), "single weights have no outgoing ones: drop it")


def test_criteria_of_units_are_refused_for_weights(run):
    outcome = run("plan", *SMALL, *WEIGHTS, "--ratio", "0.1", "--criterion", "dead")
    refused(outcome, "criterion 'dead' is unknown for granularity 'weight'")
    assert not list(Path().glob("*.safetensors"))
