"""The program in two processes, as torchrun starts it: what is printed, written and returned."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.launched import Launcher, measured
from helpers.program import MODEL
from PIL import Image
from safetensors.torch import load_file

from fastplastic.files import read_metadata

FEW = (MODEL, "--no-pretrained", "--img-size", "32", "-b", "4", "--batches", "5")
SILENT = (0, "", "")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("launched")


@pytest.fixture(scope="module")
def launched(folder):
    launcher = Launcher(2, folder)
    yield launcher
    launcher.close()


def images(folder, count, broken):
    """Make a folder of images in two classes, of which some cannot be read."""
    for number in range(count):
        file = folder / "ab"[number % 2] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        if number in broken:
            file.write_text("no image")
        else:
            pixels = np.random.default_rng(number).integers(0, 255, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(file)
    return folder


def warnings_in(error):
    """Return the lines of warnings: kernels may have to be compiled or not."""
    return [line for line in error.splitlines() if "warning" in line]


def close(one, other):
    """Tell whether two values of JSON are the same but for rounding; whole numbers are the same."""
    if isinstance(one, float) and isinstance(other, float):
        return one == pytest.approx(other, rel=1e-4, abs=1e-12)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(close(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(close, one, other))
    return one == other


@pytest.mark.parametrize(
    "more",
    [
        ("--html", "page.html", "--csv", "table.csv"),
        ("--sample-positions", "20", "--amp"),
        ("--batches", "1"),  # none for the second process
    ],
    ids=["whole", "sampled", "one batch"],
)
def test_a_profile_is_that_of_one_process(run, launched, folder, more):
    line = ("profile", *FEW, *more, "--json", "new.json", "--force")
    alone, (first, other) = run(*line), launched(*line)
    assert first[0] == alone.code == 0 and not warnings_in(first[2]) and other == SILENT
    samples = " batch" + "es" * ("--batches" not in more[:1])
    assert f"{samples} on 2 processes, seed 0" in first[1]
    # Lines are broken elsewhere.
    words = first[1].replace(" on 2 processes", "").split()
    assert words == alone.output.split()
    mine, theirs = (json.loads((at / "new.json").read_text()) for at in (Path(), folder))
    assert mine["data_sha256"] and mine["layers"] and close(mine, theirs)
    for file in [file for file in more if "." in file]:
        assert (folder / file).stat().st_size


def test_advice_with_norms_measured_anew_is_that_of_one_process(run, launched, folder):
    assert run("reinit", *FEW, "--ratio", "0.2", "-o", "made.safetensors", "--quiet").code == 0
    shutil.copy("made.safetensors", folder)
    line = ("profile", MODEL, "--checkpoint", "made.safetensors", *FEW[2:], "--json", "a.json")
    alone, (first, other) = run(*line), launched(*line)
    assert first[0] == alone.code == 0 and other == SILENT
    assert len(warnings_in(first[2])) == 1 and warnings_in(first[2]) == warnings_in(alone.error)
    mine, theirs = (json.loads((at / "a.json").read_text()) for at in (Path(), folder))
    assert mine["advice"] == theirs["advice"]
    assert "with the norms measured anew" in " ".join(first[1].split())


def test_norms_are_averaged_over_batches(launched):
    expected = measured(range(5)).state_dict()
    for found in launched.averaged():
        assert found.keys() == expected.keys() and found["num_batches_tracked"] == 5
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor)


def test_plans_and_weights_are_the_same_bits(run, launched, folder):
    # Two that wrote one file without --force would meet there.
    ratio = (*FEW, "--ratio", "0.3")
    lines = [
        ("plan", *ratio, "-o", "plan.json"),
        ("reinit", *ratio, "--compensate", "--recalibrate", "-o", "new.safetensors"),
        ("reinit", *FEW[:4], "--plan", "plan.json", "-o", "applied.safetensors"),
        ("plan", *ratio, "--granularity", "weight", "-o", "masks.safetensors"),
    ]
    for line in lines:
        alone, (first, other) = run(*line), launched(*line)
        assert (alone.code, first[0], other) == (0, 0, SILENT), first
        assert line[-1] in first[1]
    for name in ("new.safetensors", "applied.safetensors", "masks.safetensors"):
        mine, theirs = load_file(name), load_file(folder / name)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in mine), name
        assert read_metadata(Path(name)) == read_metadata(folder / name)
    for kind in ("units", "count", "layers"):
        mine, theirs = (json.loads((at / "plan.json").read_text()) for at in (Path(), folder))
        assert mine.get(kind) == theirs.get(kind)


@pytest.mark.parametrize(
    ("line", "code", "text"),
    [
        (("profile", "resnt18", "--no-pretrained"), 2, "unknown model 'resnt18'"),
        (("profile", MODEL, "--nope"), 2, "No such option: --nope"),
        (("plan", *FEW, "--checkpoint", "gone.pth"), 3, "gone.pth: no such file"),
        (("profile", *FEW, "--ranks"), 2, "--ranks in 2 processes"),
        (("profile", *FEW, "--quiet", "--fail-if", "dormant>0"), 4, "--fail-if dormant>0"),
        (
            ("finetune", MODEL, "--data", "sample", "-o", "x.pth"),
            2,
            "2 processes, expected one for this command",
        ),
    ],
)
def test_what_all_refuse_is_said_once(launched, line, code, text):
    first, other = launched(*line)
    # torchrun has a page to say of each that fails.
    assert first[0] == code and other == SILENT
    assert first[2].startswith("fastplastic: error: ") and first[2].count("\n") == 1
    assert text in first[2]


def test_what_needs_no_model_is_printed_once(launched):
    first, other = launched("list", "initializers")
    assert first[0] == 0 and "kaiming_normal" in first[1] and other == SILENT


def test_one_that_fails_is_named_by_the_first(launched, folder):
    line = ("profile", *FEW, "--quiet")
    first, other = launched(*line, others=(*line, "--checkpoint", "gone.pth"))
    text = "fastplastic: error: process 1: --checkpoint gone.pth: no such file: check the path\n"
    assert first == (3, "", text) and other == SILENT


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (("--seed", "1"), "start: --seed is 1 in process 1 and 0 in process 0, expected the same"),
        (("-b", "2"), "start: --batch-size is 2 in process 1 and 4 in process 0"),
        (("--checkpoint", "other.safetensors"), "start: the weights is "),
    ],
)
def test_processes_that_differ_are_refused(run, launched, folder, more, text):
    made = run("reinit", *FEW, "--ratio", "0.2", "--seed", "9", "-o", "other.safetensors")
    assert made.code == 0
    shutil.copy("other.safetensors", folder)
    line = ("profile", *FEW, "--quiet")
    first, other = launched(*line, others=(*line, *more))
    assert (first[0], first[1]) == (1, "") and other == SILENT
    assert text in first[2] and first[2].count("\n") == 1


def test_images_that_cannot_be_read_are_counted_over_all(run, launched, folder):
    line = ("profile", MODEL, "--no-pretrained", "--img-size", "32", "--data", "some", "-b", "2")
    images(folder / "some", 7, (1, 2, 5))
    images(Path("some"), 7, (1, 2, 5))
    alone, (first, other) = run(*line, "--json", "-"), launched(*line, "--json", "-")
    assert first[2].startswith("fastplastic: warning: 3 of 7 images cannot be read and are left")
    assert sorted(first[2].split()[:8]) == sorted(alone.error.split()[:8]) and other == SILENT
    assert close(json.loads(first[1]), json.loads(alone.output))
    shutil.rmtree(folder / "some")
    images(folder / "some", 3, range(3))
    first, other = launched(*line)
    assert first[0] == 3 and other == SILENT and first[2].count("\n") == 1
    assert "some: none of 3 images can be read, expected some: the first is " in first[2]


def test_under_torchrun(tmp_path):
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m",
        "fastplastic", "plan", *FEW, "--ratio", "7",
    ]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=tmp_path, timeout=300
    )
    error = [line for line in done.stderr.splitlines() if "ratio" in line]
    # The program says it, and torchrun ends with it.
    assert done.returncode == 1 and done.stdout == "" and len(error) == 2, done.stderr
    assert error[0].startswith("fastplastic: error: ") and "traceback" in error[1]
    assert "exitcode  : 2" in done.stderr
