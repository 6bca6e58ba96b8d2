"""`fastplastic reinit` onto a checkpoint: in place with a backup, or with all that was in it."""

import argparse
import json
import os

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from fastplastic.files import read_metadata

MODEL = "test_resnet"
OWN = (MODEL, "--num-classes", "10", "--img-size", "32")
SMALL = (*OWN, "-b", "2", "--batches", "1", "--data", "noise", "--criterion", "random")
RESET = ("reinit", *SMALL, "--ratio", "0.1")
ARGS = argparse.Namespace(lr=0.1)


def weights(add=0.0):
    torch.manual_seed(0)
    state = timm.create_model(MODEL, num_classes=10).state_dict()
    return {name: x + add if x.is_floating_point() else x for name, x in state.items()}


@pytest.fixture
def safe(tmp_path):
    path = tmp_path / "w.safetensors"
    save_file(weights(), path, {"format": "pt", "label_names": '["a"]', "validation": "0.9"})
    path.chmod(0o600)
    return path


@pytest.fixture
def training(tmp_path):
    path = tmp_path / "last.pth.tar"
    content = {"epoch": 3, "state_dict": weights(), "state_dict_ema": weights(1e-3), "args": ARGS}
    torch.save(content, path)
    return path


def load(path):
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, weights_only=True)


def test_in_place_keeps_the_old_file(run, safe):
    before = safe.read_bytes()
    outcome = run(*RESET, "--checkpoint", safe.name, "--in-place")
    assert outcome.code == 0, outcome.error
    backup = safe.with_name("w.safetensors.bak")
    assert f"file     {safe.name}; the old one is kept as {backup.name}" in outcome.output
    assert f"--checkpoint {safe.name}" in outcome.output.partition("next: ")[2]
    assert backup.read_bytes() == before != safe.read_bytes()
    assert [file.stat().st_mode & 0o777 for file in (backup, safe)] == [0o600, 0o600]
    assert load_file(safe).keys() == weights().keys()
    # What is no longer true of the weights is gone.
    told = read_metadata(safe)
    assert told["label_names"] == '["a"]' and "validation" not in told
    # A second time the first backup would be lost.
    written = safe.read_bytes()
    outcome = run(*RESET, "--checkpoint", safe.name, "--in-place")
    assert outcome.code == 3 and safe.read_bytes() == written and backup.read_bytes() == before
    assert outcome.error == (
        f"fastplastic: error: {backup.name} exists, an older copy of the file: move it away, or "
        "replace it with --force\n"
    )
    assert run(*RESET, "--checkpoint", safe.name, "--in-place", "--force", "-q").code == 0
    assert backup.read_bytes() == written


def test_in_place_by_a_link(run, safe, tmp_path):
    (tmp_path / "deep").mkdir()
    link = tmp_path / "deep" / "link.safetensors"
    link.symlink_to("../w.safetensors")
    before = safe.read_bytes()
    assert run(*RESET, "--checkpoint", link, "--in-place", "-q").code == 0
    assert link.is_symlink() and safe.read_bytes() != before
    assert safe.with_name("w.safetensors.bak").read_bytes() == before


@pytest.mark.parametrize(
    "broken", ["fastplastic.files.backup.shutil.copyfile", "fastplastic.files.checkpoint.save_file"]
)
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_in_place_broken_off_leaves_the_old_file_alone(run, safe, monkeypatch, broken, error):
    def fail(*given):
        raise error

    before = safe.read_bytes()
    monkeypatch.setattr(broken, fail)
    outcome = run(*RESET, "--checkpoint", safe.name, "--in-place")
    said = {3: "No space left on device", 130: "interrupted"}
    assert outcome.code in said and said[outcome.code] in outcome.error
    assert safe.read_bytes() == before and [x.name for x in safe.parent.iterdir()] == [safe.name]


def test_the_backup_is_there_before_the_file_is_replaced(run, safe, monkeypatch):
    before, seen, replace = safe.read_bytes(), [], os.replace

    def spy(old, new):
        seen.append(safe.with_name("w.safetensors.bak").read_bytes() == before)
        replace(old, new)

    monkeypatch.setattr(os, "replace", spy)
    assert run(*RESET, "--checkpoint", safe.name, "--in-place", "-q").code == 0
    assert seen == [True]


def test_a_training_checkpoint_keeps_the_rest(run, training):
    outcome = run(*RESET, "--checkpoint", training.name, "-o", "new.pth.tar")
    assert outcome.code == 0, outcome.error
    assert "weights  checkpoint: last.pth.tar (averaged weights, state_dict_ema)" in outcome.output
    assert "rest     epoch, args: kept; state_dict: re-initialised alike" in outcome.output
    old, new = load(training), load("new.pth.tar")
    assert list(new) == list(old) and (new["epoch"], new["args"]) == (3, ARGS)
    changed = {
        key: {n: (new[key][n] != x).nonzero().tolist() for n, x in old[key].items()}
        for key in ("state_dict", "state_dict_ema")
    }
    weight = "layer4.0.conv1.weight"
    assert changed["state_dict"][weight] == changed["state_dict_ema"][weight] != []
    assert run(*RESET, "--checkpoint", training.name, "--in-place", "-q").code == 0
    assert list(load(training)) == list(old) and training.with_name("last.pth.tar.bak").exists()


def test_safetensors_say_what_they_leave_out(run, training):
    outcome = run(*RESET, "--checkpoint", training.name, "-o", "new.safetensors")
    assert outcome.code == 0, outcome.error
    text = " ".join(outcome.output.split())
    assert "rest left out: epoch, state_dict, args; a file of this kind holds weights only" in text
    assert "rest" not in run(*RESET, "--no-pretrained", "--dry-run").output


def test_pytorch_files_of_other_weights(run, safe):
    assert run(*RESET, "--checkpoint", safe.name, "-o", "new.pth", "-q").code == 0
    assert run(*RESET, "--checkpoint", safe.name, "-o", "new.safetensors", "-q").code == 0
    new, same = load("new.pth"), load_file("new.safetensors")
    assert new.keys() == same.keys() and all(torch.equal(new[name], same[name]) for name in new)


def test_a_fresh_head_cannot_be_said_in_a_pytorch_file(run, training):
    more = ("--num-classes", "7", "--checkpoint", training.name)
    outcome = run(*RESET, *more, "-o", "new.pth")
    assert outcome.code == 2
    assert outcome.error.splitlines()[-1] == (
        "fastplastic: error: new.pth: the head is fresh, of 7 classes: that of the weights has 10; "
        "a PyTorch file cannot say so: pass -o with a name that ends in .safetensors"
    )


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--in-place",), "--in-place: expected --checkpoint FILE, which is the file to write"),
        (
            ("--in-place", "--checkpoint", "w.safetensors", "-o", "b.safetensors"),
            "-o beside --in-place: both say where to write: drop one",
        ),
        (
            ("--checkpoint", "w.safetensors", "-o", "hard.safetensors", "--force"),
            "-o hard.safetensors is the checkpoint itself: name another file, or pass --in-place "
            "instead, which keeps the old one",
        ),
        (("--checkpoint", "w.safetensors", "-o", "link.safetensors", "--force"), "itself"),
        (("--checkpoint", "w.safetensors", "-o", "a/../w.safetensors", "--force"), "itself"),
        (("-o", "a.tar",), "-o a.tar: expected a name that ends in .safetensors or .pth or .pt"),
    ],
)  # fmt: skip
def test_bad_usage_is_refused_before_anything_slow(run, nothing_slow, safe, arguments, text):
    os.link(safe, "hard.safetensors")
    os.symlink(safe, "link.safetensors")
    os.mkdir("a")
    before = safe.read_bytes()
    outcome = run("reinit", MODEL, "--ratio", "0.1", *arguments)
    assert outcome.code == 2 and text in outcome.error and safe.read_bytes() == before


@pytest.mark.parametrize(
    "arguments",
    [
        ("profile", MODEL, "--json"),
        ("plan", MODEL, "--ratio", "0.1", "--granularity", "weight", "-o"),
        ("finetune", MODEL, "--data", "x", "-o"),
        ("trial", MODEL, "--data", "x", "-o"),
    ],
)
def test_nothing_that_is_read_is_overwritten(run, nothing_slow, safe, arguments):
    before = safe.read_bytes()
    outcome = run(*arguments, safe.name, "--checkpoint", safe.resolve(), "--force")
    assert outcome.code == 2, outcome.error
    assert outcome.error == (
        "fastplastic: error: w.safetensors is read here, and would be overwritten: name another "
        "file\n"
    )
    assert safe.read_bytes() == before


def test_a_read_only_file_is_not_written_in_place(run, nothing_slow, safe, monkeypatch):
    """As root may write everything, the answer of the system is replaced."""
    monkeypatch.setattr(os, "access", lambda path, mode: path != safe or mode != os.W_OK)
    outcome = run("reinit", MODEL, "--ratio", "0.1", "--checkpoint", safe, "--in-place")
    assert outcome.code == 3
    assert outcome.error == (
        f"fastplastic: error: {safe}: is read-only: allow writing, or pass -o instead\n"
    )


def test_a_plan_that_is_applied_is_not_overwritten(run, nothing_slow, tmp_path):
    file = tmp_path / "plan.safetensors"
    file.write_text(json.dumps({}))
    outcome = run("reinit", MODEL, "--plan", file, "-o", file, "--force")
    assert outcome.code == 2 and "is read here, and would be overwritten" in outcome.error
    outcome = run("trial", MODEL, "--data", "x", "--json", "r.jsonl", "--results", "r.jsonl")
    assert outcome.code == 2 and "r.jsonl is read here" in outcome.error
