import json
import re

import pytest
import timm
import torch
from helpers.pictures import folder

from fastplastic.files import load_state_dict, read_metadata

MODEL = ("test_resnet", "--no-pretrained", "--img-size", "32")
QUICK = ("--epochs", "1", "-b", "8", "--evals", "2", "--profile-images", "16")


@pytest.fixture
def data(tmp_path):
    folder(tmp_path / "data" / "train")
    folder(tmp_path / "data" / "val", each=4, first=100)
    return tmp_path / "data"


def test_from_a_checkpoint_of_other_classes_to_a_tuned_model(run, data, tmp_path):
    """A head of 1,000 classes and data of 3: the normal case."""
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "base.pt")
    code, output, error = run(
        "finetune", "test_resnet", "--checkpoint", "base.pt", "--img-size", "32", "--data", data,
        *QUICK, "--ratio", "0.1", "-o", "tuned.safetensors", "--json", "report.json",
    )  # fmt: skip
    assert code == 0, error
    assert (
        "fresh, of 3 classes: that of the weights has 1000; fitted to the training images" in output
    )
    chosen, eligible = map(int, re.search(r"0\.1:zero: (\d+) of (\d+) eligible", output).groups())
    assert 0 < chosen == eligible // 10
    for name in ("accuracy", "loss", "dead units", "dormant units", "curve", "time"):
        assert f"\n{name}" in output
    tuned = timm.create_model("test_resnet", num_classes=3, checkpoint_path="tuned.safetensors")
    assert tuned.get_classifier().out_features == 3
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["run"]["count"] == chosen and set(report["before"]) == set(report["after"])
    before = report["untreated"]["accuracy"]
    (row,) = re.findall(r"^accuracy +(\S+) % +(\S+) % +(\S+) %$", output, re.MULTILINE)
    curve = report["run"]["accuracy"]
    assert row == tuple(f"{100 * share:.1f}" for share in (before, curve[0], curve[-1]))
    assert json.loads(read_metadata("tuned.safetensors")["label_names"]) == ["a", "b", "c"]


def test_without_reinit_it_is_the_baseline_of_a_trial(run, data, tmp_path):
    arguments = (*MODEL, "--data", data, *QUICK)
    code, output, _ = run("finetune", *arguments, "--no-reinit", "-o", "plain.safetensors")
    assert code == 0 and "none (--no-reinit)" in output and "re-initialised" not in output
    run("trial", *arguments, "--seeds", 1, "--json", "trial.json", "-q", "--arm", "dormant@0.1")
    run("finetune", *arguments, "--no-reinit", "-o", "b.safetensors", "--json", "b.json", "-q")
    trial = json.loads((tmp_path / "trial.json").read_text())
    report = json.loads((tmp_path / "b.json").read_text())
    assert trial["runs"][0]["arm"] == "baseline"
    assert trial["runs"][0]["train_loss"] == report["run"]["train_loss"]
    one, other = load_state_dict("plain.safetensors"), load_state_dict("b.safetensors")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_plan_is_applied(run, data, tmp_path):
    options = (*MODEL, "--num-classes", "3")
    code, _, error = run(
        "plan", *options, "--data", data, "--batches", 1, "--ratio", "0.1", "-o", "p.json"
    )
    assert code == 0, error
    code, output, error = run(
        "finetune", *options, "--data", data, *QUICK, "--plan", "p.json", "--outgoing", "small",
        "-o", "tuned.safetensors",
    )  # fmt: skip
    assert code == 0, error
    assert re.search(r"reinit   p\.json: \d+ of \d+ eligible units", output)
    with open("p.json") as file:
        count = json.load(file)["count"]
    assert f"p.json: {count} of" in output


def test_a_plan_for_another_head_says_what_it_has_to_be_made_with(run, data):
    run("plan", *MODEL, "--batches", 1, "--ratio", "0.1", "-o", "p.json")
    code, _, error = run(
        "finetune", *MODEL, "--data", data, *QUICK, "--plan", "p.json", "-o", "t.safetensors"
    )
    assert code == 3 and "--plan p.json: the plan is for the model with fingerprint" in error
    assert "fastplastic plan test_resnet --num-classes 3" in error


def test_options_say_the_same_as_an_arm(run, data):
    arguments = (*MODEL, "--data", data, *QUICK)
    options = ("--ratio", "0.1", "--outgoing", "fresh", "--shrink", "0.5", "--refit")
    code, _, error = run("finetune", *arguments, *options, "-o", "a.safetensors")
    assert code == 0, error
    run(
        "finetune", *arguments, "--arm", "dormant@0.1:fresh+refit+shrink=0.5", "-o", "b.safetensors"
    )
    one, other = load_state_dict("a.safetensors"), load_state_dict("b.safetensors")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_default_is_that_of_a_trial(run, data):
    from fastplastic.trials import DEFAULT_ARMS

    code, output, error = run("finetune", *MODEL, "--data", data, *QUICK, "-o", "t.safetensors")
    assert code == 0, error
    assert f"reinit   {DEFAULT_ARMS[0]}: " in output


def test_a_rate_that_diverges_writes_nothing(run, data, tmp_path):
    code, _, error = run(
        "finetune", *MODEL, "--data", data, *QUICK, "--lr", "1e30", "--opt", "sgd", "--no-reinit",
        "-o", "t.safetensors",
    )  # fmt: skip
    assert code == 2 and "the loss was not finite at update" in error
    assert not (tmp_path / "t.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "Missing option '-o'"),
        (("-o", "a.bin"), "expected a name that ends in .safetensors"),
        (("-o", "a.safetensors", "--no-reinit", "--ratio", "0.1"), "--ratio beside --no-reinit"),
        (("-o", "a.safetensors", "--arm", "swr@0.1", "--ratio", "0.1"), "--ratio beside --arm"),
        (("-o", "a.safetensors", "--arm", "swr@0.1", "--no-reinit"), "--arm beside --no-reinit"),
        (("-o", "a.safetensors", "--ratio", "7"), "--ratio 7: expected a share"),
        (("-o", "a.safetensors", "--ratio", "0.1", "--shrink", "1"), "--shrink 1: expected from 0"),
        (("-o", "a.safetensors", "--arm", "swr@0.1", "--shrink", "0.5"), "--shrink beside --arm"),
        (("-o", "a.safetensors", "--ratio", "0.1", "--threshold", "1"), "both of --ratio"),
        (("-o", "a.safetensors", "--criterion", "dormant"), "neither of --ratio and --threshold"),
        (("-o", "a.safetensors", "--recalibrate"), "neither of --ratio and --threshold"),
        (("-o", "a.safetensors", "--shrink", "0.5"), "neither of --ratio and --threshold"),
    ],
)
def test_bad_options_are_refused_before_anything_slow(run, data, monkeypatch, arguments, said):
    def load(*arguments, **keywords):
        raise AssertionError("a model was built")

    monkeypatch.setattr("fastplastic.cli.training.load", load)
    code, output, error = run("finetune", "test_resnet", "--data", data, *arguments)
    assert code == 2 and output == "" and said in error


def test_a_missing_plan(run, data):
    code, _, error = run(
        "finetune", "test_resnet", "--data", data, "--plan", "p.json", "-o", "a.safetensors"
    )
    assert code == 3 and "--plan p.json: no such file" in error
