"""The commands on models beyond timm, end to end, and what they refuse."""

import json
import sys
from pathlib import Path

import pytest
import torch
from helpers.folders import save_folder_model, write_texts
from helpers.program import refused
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

SMALL = ("-b", "4", "--batches", "2")
TORCHVISION = ("torchvision:squeezenet1_1", "--img-size", "32")
FACTORY = """
from torch import nn

def net(width=8):
    return nn.Sequential(
        nn.Conv2d(3, width, 3), nn.ReLU(), nn.Conv2d(width, width, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10),
    )
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """Put a module with a function into the current folder."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "minenets.py").write_text(FACTORY)
    yield "minenets:net"
    sys.modules.pop("minenets", None)


def following(outcome):
    """Return the words of the command to type next."""
    assert outcome.code == 0, outcome.error
    return outcome.output.partition("next: fastplastic ")[2].split()


def test_from_a_profile_to_a_folder_of_texts(run, tmp_path):
    save_folder_model(tmp_path / "m", "classifier")
    write_texts(tmp_path / "a.jsonl")
    outcome = run("profile", "hf:m", "--data", "a.jsonl", *SMALL)
    assert "a.jsonl (2 classes, at most 32 tokens of a text)" in outcome.output
    assert "padding was left out by the attention mask" in outcome.output
    assert "advice" not in outcome.output
    command = following(outcome)
    assert command[:4] == ["plan", "hf:m", "--data", "a.jsonl"]
    command = following(run(*command))
    assert command[-2:] == ["-o", "m-fresh"]
    outcome = run(*command)
    assert outcome.code == 0 and "next:" not in outcome.output
    assert " before, " in outcome.output
    before, after = load_file("m/model.safetensors"), load_file("m-fresh/model.safetensors")
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    model = AutoModelForSequenceClassification.from_pretrained("m-fresh")
    assert all(torch.equal(tensor, after[name]) for name, tensor in model.state_dict().items())
    assert run("profile", "hf:m-fresh", "--data", "a.jsonl", *SMALL, "-q").code == 0


def test_the_json_names_the_model_as_it_was_given(run, tmp_path):
    save_folder_model(tmp_path / "m", "causal")
    write_texts(tmp_path / "a.txt")
    outcome = run(
        "profile", "hf:./m", "--data", "a.txt", *SMALL, "--max-length", "8", "--json", "-"
    )
    found = json.loads(outcome.output)
    assert (found["model"], found["weights"]) == ("hf:./m", "pretrained")
    assert (found["data"], found["samples"]) == ("a.txt", 4)
    Path("a.json").write_text(outcome.output)
    outcome = run("compare", "a.json", "a.json")
    assert outcome.code == 0 and "hf:./m" in outcome.output


def test_a_page_of_texts_has_a_digest_of_them(run, tmp_path):
    save_folder_model(tmp_path / "m", "encoder")
    write_texts(tmp_path / "a.jsonl")
    pages = []
    for name in ("one.html", "two.html"):
        outcome = run("profile", "hf:m", "--data", "a.jsonl", *SMALL, "--html", name, "-q")
        assert outcome.code == 0, outcome.error
        pages.append(Path(name).read_text())
        write_texts(tmp_path / "a.jsonl", labels=("bad", "good"))
    assert all("hf:m" in page for page in pages)
    assert "a fresh head of 2 classes on the mean of its tokens" in " ".join(pages[0].split())
    digests = [page.partition("sha256")[2].split("<")[0] for page in pages]
    assert digests[0] and pages[0] != pages[1]


def test_texts_without_labels_give_no_gradients(run, tmp_path):
    save_folder_model(tmp_path / "m", "classifier")
    write_texts(tmp_path / "a.txt")
    outcome = run("profile", "hf:m", "--data", "a.txt", *SMALL)
    assert "measured forward only: gradient scores are unknown" in outcome.output
    outcome = run(
        "reinit", "hf:m", "--data", "a.txt", *SMALL, "--ratio", "0.2", "-o", "o.safetensors"
    )
    assert "loss     not measured: the texts have no labels" in outcome.output
    options = ("--ratio", "0.2", "--granularity", "weight", "-o", "p.safetensors")
    refused(
        run("plan", "hf:m", "--data", "a.txt", *SMALL, *options), 2,
        "--granularity weight: the texts in a.txt have no labels, expected some to compute gradie",
    )  # fmt: skip


def test_torchvision_from_a_profile_to_a_file(run):
    outcome = run("profile", *TORCHVISION, "--no-pretrained", *SMALL)
    command = following(outcome)
    assert command[:2] == ["plan", TORCHVISION[0]]
    command = following(run(*command))
    assert command[-2:] == ["-o", "squeezenet1_1-fresh.safetensors"]
    command = following(run(*command))
    assert command[:2] == ["finetune", TORCHVISION[0]]
    assert command[-1] == "squeezenet1_1-tuned.safetensors"
    again = run("profile", *TORCHVISION, "--checkpoint", "squeezenet1_1-fresh.safetensors", *SMALL)
    assert "weights  checkpoint: squeezenet1_1-fresh.safetensors" in again.output


def test_torchvision_s_server_out_of_reach(run, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(Path.cwd() / "torch"))
    monkeypatch.setattr(
        "fastplastic.sources.torchvision_models.answers_not", lambda url: "URLError: refused"
    )
    outcome = run("profile", *TORCHVISION, *SMALL, "--json", "-")
    assert outcome.code == 0 and json.loads(outcome.output)["weights"] == "random"
    assert "RANDOM WEIGHTS: the pretrained weights of torchvision:squeezenet1_1" in outcome.error
    for command in (
        ("profile", *TORCHVISION, *SMALL, "--pretrained"),
        ("reinit", *TORCHVISION, *SMALL, "--ratio", "0.1", "-o", "a.safetensors"),
    ):
        refused(run(*command), 3, "the pretrained weights cannot be had (URLError: refused): check")


@pytest.mark.parametrize("name", ["hf:m", "torchvision:mobilenet_v2", "minenets:net"])
def test_finetune_models_of_images(run, tmp_path, mine, name):
    tiny = "inverted_residual_setting=[[1, 8, 1, 2], [2, 8, 1, 2]]"
    weights = ("--no-pretrained", "--model-kwargs", tiny) if name[0] == "t" else ()
    if name == "hf:m":
        save_folder_model(tmp_path / "m", "resnet")
    options = ("--img-size", "32", *weights)
    # It has 1280 features, and fitting the head to them takes most of the time.
    probe = ("--no-probe-first",) if name[0] == "t" else ()
    outcome = run(
        "finetune", name, "--data", "sample", "--epochs", "1", "--evals", "1", "--no-aug", "-o",
        "t.safetensors", "--ratio", "0.1", "--mixup", "0.2", "--profile-images", "32",
        *options, *probe,
    )  # fmt: skip
    assert outcome.code == 0, outcome.error
    classes = ("--num-classes", "10")
    outcome = run(
        "profile",
        name,
        "--checkpoint",
        "t.safetensors",
        *classes,
        *options[:2],
        *weights[1:],
        *SMALL,
    )
    assert outcome.code == 0, outcome.error
    assert "head" not in [line.split(" ")[0] for line in outcome.output.splitlines()]


def test_a_trial_of_a_function_s_model_has_no_fresh_arm(run, mine):
    options = ("--data", "sample", "--epochs", "1", "--img-size", "16", "--seeds", "1")
    outcome = run("trial", mine, *options, "--arm", "fresh", "--evals", "1")
    refused(outcome, 2, "arm fresh: no way to make random weights")


def test_explain(run, tmp_path, mine):
    save_folder_model(tmp_path / "m", "causal")
    outcome = run("explain", "hf:m", "model.layers.0.mlp.gate_proj")
    assert outcome.code == 0 and "16 of 16 units" in outcome.output
    outcome = run("explain", mine, "0", "--img-size", "16")
    assert outcome.code == 0 and "8 of 8 units" in outcome.output
    outcome = run("explain", *TORCHVISION, "features.0")
    assert outcome.code == 0 and "features.0: conv" in outcome.output


def test_list_models(run):
    outcome = run("list", "models", "torchvision:resnet*")
    lines = outcome.output.splitlines()
    assert "torchvision:resnet18" in lines and "torchvision:resnet50.IMAGENET1K_V2" in lines
    assert outcome.error == (
        "fastplastic: MODEL can also be hf:FOLDER, package.module:factory, hf-hub:OWNER/NAME, "
        "local-dir:FOLDER\n"
    )
    found = json.loads(run("list", "models", "torchvision:resnet18*", "--json").output)
    assert found[0] == {"name": "torchvision:resnet18", "pretrained": True}


# What is refused before anything is loaded


@pytest.mark.parametrize("command", ["trial", "finetune"])
def test_models_of_texts_are_not_fine_tuned(run, tmp_path, nothing_slow, command):
    save_folder_model(tmp_path / "m", "classifier")
    output = ("-o", "a.safetensors")
    refused(
        run(command, "hf:m", "--data", "sample", *output), 2,
        "hf:m: takes texts, expected a model of images: fine-tune it with a Trainer of transfor",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (("hf:m", "--data", "sample"), 2, "--data sample: hf:m takes texts, expected a text file"),
        (
            ("hf:m",),
            2,
            "--data sample: hf:m takes texts, expected a text file with one text a line",
        ),
        (
            ("hf:v", "--data", "a.txt"),
            3,
            "hfds/NAME: the model takes images, and texts are for models of",
        ),
        (
            ("hf:v", "--max-length", "8"),
            2,
            "--max-length 8: hf:v takes images, expected a model of",
        ),
        (("hf:none", "--data", "a.txt"), 3, "hf:none: no such folder, expected a Hugging Face mod"),
        (("hug:a/b",), 2, "unknown model 'hug:a/b': expected NAME, torchvision:NAME, hf:FOLDER, "),
        (("torch:a/b",), 2, "unknown model 'torch:a/b': expected NAME, torchvision:NAME, hf:FO"),
        (("hf:",), 2, "unknown model 'hf:': expected hf:FOLDER"),
    ],
)
def test_models_and_data_that_do_not_suit_each_other(run, tmp_path, arguments, code, text):
    save_folder_model(tmp_path / "m", "classifier")
    save_folder_model(tmp_path / "v", "resnet")
    write_texts(tmp_path / "a.txt")
    refused(run("profile", *arguments, *SMALL), code, text)


def test_a_folder_with_files_is_not_written_to(run, tmp_path, nothing_slow):
    save_folder_model(tmp_path / "m", "resnet")
    refused(
        run("reinit", "hf:m", "--ratio", "0.1", "-o", "m"), 3,
        "m has files in it: give another name, or --force to overwrite",
    )  # fmt: skip
    refused(
        run("reinit", "resnet50", "--ratio", "0.1", "-o", "m"), 2,
        "-o m: expected a name that ends in .safetensors",
    )  # fmt: skip
