"""A checkpoint of other classes than the data: all but its head is taken."""

import json
import shlex

import pytest
import timm
import torch
from helpers.pictures import folder

from fastplastic.cli.main import main
from fastplastic.files import load_state_dict

SMALL = ("--img-size", "32", "--batches", 1, "-b", 8)
HEAD = "head     fresh, of 3 classes: that of the weights has 1000; gradients say little until"


@pytest.fixture
def base(tmp_path):
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "base.pt")
    return ("test_resnet", "--checkpoint", "base.pt", *SMALL)


@pytest.fixture
def data(tmp_path):
    return folder(tmp_path / "data")


def test_profile_plan_and_reinit_take_all_but_the_head(run, base, data, tmp_path):
    options = (*base, "--data", data, "--num-classes", 3)
    profile = run("profile", *options)
    assert profile.code == 0 and HEAD in profile.output and profile.error == ""
    plan = run("plan", *options, "--ratio", "0.1", "-o", "plan.json")
    assert plan.code == 0 and HEAD in plan.output
    following = plan.output.splitlines()[-1].removeprefix("next: fastplastic ")
    assert main(shlex.split(following)) == 0
    assert (tmp_path / "test_resnet-fresh.safetensors").exists()
    reinit = run("reinit", *options, "--plan", "plan.json", "-o", "b.safetensors")
    assert reinit.code == 0 and "head     fresh, of 3 classes: that of the weights" in reinit.output
    model = timm.create_model("test_resnet", num_classes=3, checkpoint_path="b.safetensors")
    old, new = load_state_dict("base.pt"), model.state_dict()
    same = [name for name in old if old[name].shape == new[name].shape]
    assert len(same) == len(old) - 2
    assert sum(torch.equal(old[name], new[name]) for name in same) > len(same) / 2


def test_without_a_number_of_classes_it_is_measured_behind_another_head(run, base, data):
    outcome = run("profile", *base, "--data", data)
    assert outcome.code == 0
    said = " ".join(outcome.output.split())
    assert "the model has 1000 classes: a fresh head of 3 was used for the loss only" in said
    assert "the statistics of BatchNorm are those of the weights" in said


def test_advice_is_by_what_is_dead_behind_norms_of_the_new_images(run, tmp_path, data):
    """Wrong statistics make every unit look dead, and fine-tuning measures them anew."""
    model = timm.create_model("test_resnet")
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean += 1e4
    torch.save(model.state_dict(), tmp_path / "base.pt")
    options = ("test_resnet", "--checkpoint", "base.pt", *SMALL, "--data", data)
    code, _, error = run("profile", *options, "--json", "a.json", "-q")
    assert code == 0, error
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["totals"]["dead"] > 0.5 * found["totals"]["units"]
    assert found["advice"]["share"] < 0.1


def test_the_next_command_leads_to_a_tuned_model(run, base, data):
    options = (*base, "--data", data, "--num-classes", 3)
    last = run("profile", *options).output.splitlines()[-1]
    start = "next: fastplastic trial test_resnet --checkpoint base.pt --num-classes 3 --img-size 32"
    assert last == f"{start} --data {data}"
    last = run("reinit", *options, "--ratio", "0.1", "-o", "b.safetensors").output.splitlines()[-1]
    assert last == (
        "next: fastplastic finetune test_resnet --checkpoint b.safetensors --num-classes 3 "
        f"--img-size 32 --data {data} --no-reinit -o test_resnet-tuned.safetensors"
    )
    more = ("--epochs", "1", "-b", "8", "--evals", "1", "--val-split", "0.25")
    tuned = run(*shlex.split(last)[2:], *more)
    assert tuned.code == 0
    assert "of the weights, which was not fitted yet; fitted to the training" in tuned.output


def test_a_file_says_whether_its_head_was_fitted(run, base, data):
    """Also through a second re-initialisation, and no longer when it was fine-tuned."""
    written = ("test_resnet", "--num-classes", 3, *SMALL, "--data", data)
    dose = ("--ratio", "0.1", "-o")
    run("reinit", *base, "--num-classes", 3, "--data", data, *dose, "b.safetensors")
    again = run("reinit", *written, "--checkpoint", "b.safetensors", *dose, "c.safetensors")
    assert "head     of the weights, which was not fitted yet" in again.output
    profile = run("profile", *written, "--checkpoint", "c.safetensors")
    assert "head     of the weights, which was not fitted yet" in profile.output
    learn = ("--epochs", "1", "-b", "8", "--evals", "1", "--val-split", "0.25", "--no-reinit")
    given = [x for x in written if x not in ("--batches", 1)]
    run("finetune", *given, "--checkpoint", "c.safetensors", *learn, "-o", "d.safetensors")
    assert "head " not in run("profile", *written, "--checkpoint", "d.safetensors").output


def test_the_sample_stands_for_no_data_of_the_user(run, base, data):
    outcome = run("profile", *base)
    assert outcome.code == 0
    assert "warning: the images are the Fashion-MNIST sample of the package" in outcome.error
    assert "next: fastplastic plan" in outcome.output
    assert run("profile", *base, "--data", data).error == ""
    assert run("profile", "test_resnet", "--no-pretrained", *SMALL).error == ""


def test_a_checkpoint_that_differs_elsewhere_is_refused(run, data, tmp_path):
    other = timm.create_model("test_resnet", in_chans=1)
    torch.save(other.state_dict(), tmp_path / "base.pt")
    code, _, error = run(
        "profile", "test_resnet", "--checkpoint", "base.pt", *SMALL, "--data", data,
        "--num-classes", 3,
    )  # fmt: skip
    assert code == 3 and "does not fit the model" in error
