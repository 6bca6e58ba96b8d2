"""`fastplastic reinit` with data: loss before and after, compensation, recalibration."""

import re

import pytest
import torch
from safetensors.torch import load_file

from fastplastic.planning import Plan

# A model that timm has for tests, on few and small images, with a head for the sample's classes.
MODEL = "test_resnet"
OWN = (MODEL, "--no-pretrained", "--img-size", "32", "--num-classes", "10")
SMALL = (*OWN, "-b", "4", "--batches", "2")


def loss(outcome) -> tuple[float, float]:
    found = re.search(r"loss     (\S+) before, (\S+) after", outcome.output)
    return float(found[1]), float(found[2])


def test_the_loss_is_shown_where_the_head_is_for_the_classes(run):
    outcome = run("reinit", *SMALL, "--ratio", "0.3", "--criterion", "random", "--dry-run")
    assert outcome.code == 0, outcome.error
    before, after = loss(outcome)
    assert before == pytest.approx(2.3, abs=0.3) and after == pytest.approx(2.3, abs=0.3)
    assert run("plan", *SMALL, "--ratio", "0.3", "--criterion", "random", "-o", "p.json").code == 0
    # The same on data beside a plan, and not without data.
    outcome = run("reinit", *SMALL, "--plan", "p.json", "--dry-run")
    assert loss(outcome) == (before, after) and "data     sample" in outcome.output
    assert "were beyond the threshold" not in outcome.output
    without = run("reinit", *OWN, "--plan", "p.json", "--dry-run").output
    assert "loss     not measured: pass --data" in without


def test_recalibrated_and_compensated_norms(run):
    plain = (*SMALL, "--ratio", "0.3", "--criterion", "random", "-o")
    assert run("reinit", *plain, "a.safetensors").code == 0
    outcome = run("reinit", *plain, "b.safetensors", "--recalibrate", "--compensate")
    assert outcome.code == 0 and "compensated, recalibrated" in outcome.output
    assert run("plan", *plain, "p.json").code == 0
    old, new = load_file("a.safetensors"), load_file("b.safetensors")
    plan = Plan.load("p.json")
    for name, units in plan.units.items():
        norm = plan.wiring[name].norm
        assert (old[f"{norm}.running_var"][units] == 1).all()
        assert not (new[f"{norm}.running_var"][units] == 1).any()
        assert torch.equal(old[f"{name}.weight"], new[f"{name}.weight"])


def test_another_head_gives_no_loss_but_statistics(run):
    arguments = (*SMALL[:4], "-b", "4", "--batches", "2", "--ratio", "0.1", "--dry-run")
    outcome = run("reinit", *arguments, "--recalibrate")
    assert outcome.code == 0
    assert "not measured: the model has 1000 classes, the data 10" in outcome.output


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--compensate", "--outgoing", "keep"), "--compensate with --outgoing keep: expected ze"),
        (("--granularity", "weight", "--recalibrate"), "--recalibrate: only for units, not for"),
        (("--granularity", "weight", "--compensate"), "--compensate: only for units, not for"),
    ],
)
def test_what_does_not_go_together_is_refused_at_once(run, nothing_slow, arguments, text):
    outcome = run("reinit", MODEL, "--ratio", "0.1", "--dry-run", *arguments)
    assert outcome.code == 2 and text in outcome.error and not outcome.output


def test_the_checkpoint_itself_is_not_overwritten(run, nothing_slow, tmp_path):
    file = tmp_path / "weights.safetensors"
    file.write_bytes(b"weights")
    more = ("--checkpoint", "weights.safetensors", "-o", file, "--force")
    outcome = run("reinit", MODEL, "--ratio", "0.1", *more)
    assert outcome.code == 2 and "is the checkpoint itself: name another file" in outcome.error
    assert file.read_bytes() == b"weights"


def test_what_follows_a_plan_has_the_same_data(run):
    outcome = run("plan", *SMALL, "--data", "noise", "--ratio", "0.1", "-o", "plan.json")
    line = outcome.output.partition("next: ")[2]
    assert all(part in line for part in ("--data noise", "--batches 2", "--plan plan.json"))
