"""`fastplastic profile` on a small model."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.program import MODEL, SMALL, fastplastic_model, refused, weights_before
from safetensors.torch import load_file


def test_profile_prints_the_report(run):
    outcome = run("profile", *SMALL, "--layers")
    assert (outcome.code, outcome.error) == (0, "")
    for word in ("model", MODEL, "weights", "random", "eval", "8 in 2 batches", "layer2", "relu"):
        assert word in outcome.output
    for word in (
        "dead",
        "dormant",
        "saturated",
        "resettable",
        "coverage",
        "next: fastplastic plan",
    ):
        assert word in outcome.output
    assert "fresh head of 10 was used" in " ".join(outcome.output.split())


def test_the_next_command_of_each_command_can_be_typed(run):
    outcome = run("profile", *SMALL)
    command = outcome.output.partition("next: fastplastic ")[2].split()
    outcome = run(*command)
    assert outcome.code == 0
    command = outcome.output.partition("next: fastplastic ")[2].split()
    assert run(*command).code == 0
    assert Path(f"{MODEL}-fresh.safetensors").is_file()


SCHEMA = {
    "schema_version", "fastplastic_version", "model", "weights", "data", "device", "dtype", "mode",
    "samples", "seed", "coverage", "totals", "layers",
}  # fmt: skip


LAYER = {
    "name", "kind", "activation", "units", "hidden", "dead", "frozen", "dormant",
    "saturated_fraction", "mean_abs_activation", "mean_abs_gradient",
}  # fmt: skip


def test_json_on_stdout_is_all_there_is_on_stdout(run):
    outcome = run("profile", *SMALL, "--json", "-")
    assert (outcome.code, outcome.error) == (0, "")
    schema = json.loads(outcome.output)
    assert set(schema) >= SCHEMA
    assert set(schema["layers"][0]) >= LAYER
    assert schema["schema_version"] == 1
    assert (schema["model"], schema["weights"], schema["mode"]) == (MODEL, "random", "eval")
    assert schema["samples"] == 8
    assert schema["coverage"]["found"] == schema["coverage"]["measured"] == len(schema["layers"])
    assert set(schema["totals"]) >= {
        "layers", "units", "hidden_units", "dead", "frozen", "dormant",
    }  # fmt: skip


def test_json_to_a_file_beside_the_report(run):
    assert "coverage" in run("profile", *SMALL, "--json", "new.json").output
    first = Path("new.json").read_bytes()
    assert json.loads(first)["model"] == MODEL
    refused(run("profile", *SMALL, "--json", "new.json"), 3, "new.json exists")
    assert run("profile", *SMALL, "--json", "new.json", "--force", "--quiet") == (0, "", "")
    assert Path("new.json").read_bytes() == first


def test_without_a_hub_profile_goes_on_with_random_weights_under_a_warning(run):
    outcome = run("profile", MODEL, *SMALL[2:], "--json", "-")
    assert outcome.code == 0
    assert json.loads(outcome.output)["weights"] == "random"
    assert "fastplastic: warning: RANDOM WEIGHTS" in outcome.error
    assert outcome.error.count("\n") == 1


def test_without_a_hub_pretrained_and_reinit_refuse(run):
    refused(run("profile", MODEL, "--pretrained"), 3, "pretrained weights cannot be had")
    arguments = ("--ratio", "0.1", "-o", "new.safetensors")
    refused(run("reinit", MODEL, *arguments), 3, "pretrained weights cannot be had")
    assert not Path("new.safetensors").exists()


def test_without_a_hub_plan_does_not_lead_to_reinit(run):
    outcome = run("plan", MODEL, *SMALL[2:], "--ratio", "0.1")
    assert outcome.code == 0
    assert "RANDOM WEIGHTS" in outcome.error
    assert "next" not in outcome.output


@pytest.mark.parametrize(
    ("more", "tolerance"),
    [
        (["--channels-last"], 1e-4),
        (["--amp"], 0.05),
        (["--amp", "--amp-dtype", "float16"], 0.01),
    ],
)
def test_other_precision_and_layout_measure_the_same(run, more, tolerance):
    def layers(*more):
        outcome = run("profile", *SMALL, *more, "--json", "-")
        assert outcome.code == 0, outcome.error
        return json.loads(outcome.output)["layers"]

    for plain, other in zip(layers(), layers(*more), strict=True):
        for key in ("name", "units", "hidden", "activation"):
            assert other[key] == plain[key]
        for key in ("mean_abs_activation", "mean_abs_gradient", "saturated_fraction"):
            assert other[key] == pytest.approx(plain[key], rel=tolerance, abs=1e-3 * tolerance)


def test_amp_is_named_in_the_header(run):
    assert "amp bfloat16" in run("profile", *SMALL, "--amp").output


@pytest.mark.parametrize("data", ["noise", "sample"])
def test_input_size_and_classes_reach_model_and_data(run, data):
    shape = ("--input-size", "1", "160", "96", "--num-classes", "7", "--data", data)
    arguments = ("test_vit", "--no-pretrained", "-b", "2", "--batches", "1", *shape)
    outcome = run("reinit", *arguments, "--ratio", "0.1", "-o", "new.safetensors")
    assert outcome.code == 0, outcome.error
    assert "samples  2 in 1 batch," in outcome.output
    new = load_file("new.safetensors")
    assert new["patch_embed.proj.weight"].shape[1] == 1
    assert new["pos_embed"].shape[1] == 1 + 10 * 6
    assert new["head.bias"].shape == (7,)


def test_checkpoint_is_used(run):
    torch.save(weights_before(seed=5), "weights.pth")
    arguments = (MODEL, "--checkpoint", "weights.pth", *SMALL[2:], "--json", "-")
    schema = json.loads(run("profile", *arguments).output)
    assert schema["weights"] == "checkpoint: weights.pth"
    assert schema["layers"] != json.loads(run("profile", *SMALL, "--json", "-").output)["layers"]


def test_checkpoint_that_does_not_fit(run):
    torch.save(fastplastic_model(num_classes=3).state_dict(), "weights.pth")
    refused(run("profile", MODEL, "--checkpoint", "weights.pth"), 3, "does not fit the model")
    Path("broken.pth").write_bytes(b"broken")
    refused(run("profile", MODEL, "--checkpoint", "broken.pth"), 3, "broken.pth: ")


def test_folders_of_images_that_are_not_there(run, tmp_path):
    (tmp_path / "empty").mkdir()
    refused(run("profile", *SMALL, "--data", "empty"), 3, "empty: ")
    refused(run("profile", *SMALL, "--data", "none/such"), 3, "none/such: no such folder")


@pytest.mark.parametrize("argument", ["--version", "--help"])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_goes_away_is_no_traceback(argument, unbuffered):
    program = [sys.executable, "-m", "fastplastic", argument]
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(program, env=environment, **pipes) as process:
        process.stdout.close()
        error = process.stderr.read()
    assert (process.returncode, error) == (1, b"")


def test_narrow_terminals(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    outcome = run("profile", *SMALL)
    *report, following = outcome.output.splitlines()
    assert max(map(len, report)) <= 60
    assert following.startswith("next: fastplastic plan")
    assert len(following) > 60


def test_no_color(run, monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b[33m" in run("profile", *SMALL).output
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[33m" not in run("profile", *SMALL).output


def test_trained_weights_get_advice(run):
    torch.save(weights_before(seed=5), "weights.pth")
    trained = (MODEL, "--checkpoint", "weights.pth", *SMALL[2:])
    text = " ".join(run("profile", *trained).output.split())
    assert re.search(
        r"advice (with the norms .*, )?re-initialisation is (not )?likely to help: \d+ % of", text
    )
    advice = json.loads(run("profile", *trained, "--json", "-").output)["advice"]
    assert 0 <= advice["share"] <= 1 and advice["helps"] == (advice["share"] >= advice["limit"])
    assert advice["text"] in text
    assert "advice" not in run("profile", *SMALL).output
    assert "advice" not in json.loads(run("profile", *SMALL, "--json", "-").output)


def test_the_json_tells_other_batches_and_a_head_that_was_lent(run):
    for size, name in ((32, "a.json"), (48, "b.json")):
        own = ("--img-size", str(size), "--batches", "2", "-b", "8", "--quiet")
        assert run("profile", MODEL, "--no-pretrained", *own, "--json", name).code == 0
    first, second = (json.loads(Path(name).read_text()) for name in ("a.json", "b.json"))
    assert len(first["data_sha256"]) == 64 and first["data_sha256"] != second["data_sha256"]
    assert "a fresh head of 10 was used" in first["lent_head"]
    text = run("compare", "a.json", "b.json").output
    assert "the batches differ" in text and "a fresh head was lent" in text
