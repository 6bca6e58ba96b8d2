"""`fastplastic plan` and `fastplastic reinit` on a small model."""

import pytest
import timm
import torch
from helpers.program import MODEL, SMALL, refused, weights_before
from safetensors.torch import load_file

from fastplastic.cli.main import main
from fastplastic.planning import Plan


@pytest.fixture(scope="module")
def plan_file(tmp_path_factory):
    """A plan that takes a tenth of the units of the model."""
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    assert main(["plan", *SMALL, "--ratio", "0.1", "-o", str(path), "--quiet"]) == 0
    return path


def test_plan_previews_and_writes(run):
    outcome = run("plan", *SMALL, "--ratio", "0.1", "-o", "plan.json")
    assert (outcome.code, outcome.error) == (0, "")
    plan = Plan.load("plan.json")
    assert plan.count == int(0.1 * plan.eligible) > 0
    assert f"{plan.count} of {plan.eligible} eligible units" in outcome.output
    for name in plan.units:
        assert name in outcome.output
    refused(run("plan", *SMALL, "--ratio", "0.1", "-o", "plan.json"), 3, "plan.json exists")


def test_plan_passes_every_option_on(run):
    more = ("--criterion", "random", "--scope", "layer", "--seed", "3", "--ratio", "0.2")
    filters = ("--include", "layer*", "--exclude", "layer1*", "--max-layer-fraction", "0.25")
    assert run("plan", *SMALL, *more, *filters, "-o", "plan.json").code == 0
    plan = Plan.load("plan.json")
    assert (plan.criterion, plan.scope, plan.seed, plan.ratio) == ("random", "layer", 3, 0.2)
    assert plan.max_layer_fraction == 0.25
    assert plan.units
    assert all(name.startswith("layer") and name[5] != "1" for name in plan.units)


def test_plan_and_reinit_read_some_positions(run):
    """What reads a part gives other scores, and the plan is that of such a profile."""
    some = (*SMALL, "--sample-positions", "1")
    outcome = run("profile", *some)
    following = outcome.output.partition("next: fastplastic ")[2].split()
    assert following[following.index("--sample-positions") + 1] == "1"
    assert run(*following).code == 0
    assert run("plan", *SMALL, "--ratio", "0.05", "-o", "whole.json").code == 0
    found, whole = Plan.load("plan.json"), Plan.load("whole.json")
    assert found.count == whole.count
    assert {n: u.tolist() for n, u in found.units.items()} != {
        n: u.tolist() for n, u in whole.units.items()
    }
    run("reinit", *SMALL[:4], "--plan", "plan.json", "-o", "one.safetensors")
    run("reinit", *some, "--ratio", "0.05", "-o", "two.safetensors")
    one, two = load_file("one.safetensors"), load_file("two.safetensors")
    assert all(torch.equal(one[name], two[name]) for name in one | two)


def test_reinit_writes_a_checkpoint_that_timm_loads(run, plan_file):
    outcome = run("reinit", *SMALL[:4], "--plan", plan_file, "-o", "new.safetensors")
    assert (outcome.code, outcome.error) == (0, "")
    new, old = load_file("new.safetensors"), weights_before()
    timm.create_model(MODEL).load_state_dict(new, strict=True)
    for name, units in Plan.load(plan_file).units.items():
        changed = (new[f"{name}.weight"] != old[f"{name}.weight"]).flatten(1).any(1)
        assert changed[units].all()
        assert name in outcome.output
    assert torch.equal(new["fc.bias"], old["fc.bias"])
    assert "new.safetensors" in outcome.output


def test_reinit_plans_on_the_spot_as_plan_does(run, plan_file):
    run("reinit", *SMALL[:4], "--plan", plan_file, "-o", "one.safetensors")
    run("reinit", *SMALL, "--ratio", "0.1", "-o", "two.safetensors")
    one, two = load_file("one.safetensors"), load_file("two.safetensors")
    assert all(torch.equal(one[name], two[name]) for name in one | two)


def test_reinit_options_matter(run, plan_file):
    written = []
    for index, more in enumerate(([], ["--init", "empirical"], ["--outgoing", "keep"])):
        name = f"{index}.safetensors"
        assert run("reinit", *SMALL[:4], "--plan", plan_file, *more, "-o", name).code == 0
        written.append({key: value.tolist() for key, value in load_file(name).items()})
    assert written[0] != written[1] != written[2] != written[0]


def test_dry_run_writes_nothing(run, plan_file, tmp_path):
    more = ("--plan", plan_file, "--dry-run", "-o", "new.safetensors")
    outcome = run("reinit", *SMALL[:4], *more)
    assert (outcome.code, outcome.error) == (0, "")
    assert "nothing was written" in outcome.output
    assert "next" not in outcome.output
    assert not list(tmp_path.glob("*.safetensors"))


def test_plan_of_another_model(run, plan_file, tmp_path):
    other = (MODEL, "--no-pretrained", "--num-classes", "7", "--plan", plan_file)
    refused(run("reinit", *other, "-o", "new.safetensors"), 3, "the plan is for the model")
    assert not list(tmp_path.glob("*.safetensors"))
