"""The program on checkpoints in many files."""

import pytest
import torch
from helpers.folders import save_folder_model, write_texts
from helpers.many_files import contents, read_sharded, same_bits, save_sharded
from helpers.program import MODEL, refused
from safetensors.torch import load_file
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_saver import save

from fastplastic.sources import create_model, create_outline

OWN = (MODEL, "--num-classes", "10")
DATA = ("--img-size", "32", "-b", "2", "--batches", "1", "--data", "noise")
RANDOM = (*DATA, "--criterion", "random", "--ratio", "0.1")


@pytest.fixture(scope="module")
def state():
    return create_model(MODEL, pretrained=False, num_classes=10).model.state_dict()


@pytest.fixture
def sharded(tmp_path, state):
    return save_sharded(tmp_path / "old", state)


@pytest.fixture
def planned(run):
    """Return a plan for the model, whatever its weights."""
    outcome = run("plan", *OWN, "--no-pretrained", *RANDOM, "-o", "plan.json", "-q")
    assert outcome.code == 0, outcome.error
    return "plan.json"


def test_a_folder_becomes_a_folder(run, sharded, planned):
    before = contents(sharded)
    outcome = run("reinit", *OWN, "--checkpoint", "old", "--plan", planned, "-o", "new")
    assert outcome.code == 0, outcome.error
    assert "weights  checkpoint: old (3 files of safetensors)" in outcome.output
    assert "file     new" in outcome.output and "init default, outgoing zero" in outcome.output
    following = outcome.output.partition("next: ")[2]
    assert following.startswith(f"fastplastic finetune {MODEL} --checkpoint new")
    one = ("--checkpoint", "old", "--plan", planned, "-o", "one.safetensors", "-q")
    assert run("reinit", *OWN, *one).code == 0
    assert same_bits(read_sharded(sharded.parent / "new"), load_file("one.safetensors"))
    assert contents(sharded) == before
    # What was written is read again, and planned and written in one step.
    drawn = (*RANDOM, "--seed", "1")
    again = ("reinit", *OWN, "--checkpoint", "new", *drawn, "-o", "newer", "-q")
    outcome = run(*again)
    assert outcome.code == 0, outcome.error
    assert not same_bits(read_sharded(sharded.parent / "newer"), load_file("one.safetensors"))
    refused(run(*again), 3, "newer has files in it: give another name, or --force to overwrite")
    assert run(*again, "--force").code == 0


def test_in_place(run, sharded, planned):
    before = contents(sharded)
    asked = ("reinit", *OWN, "--checkpoint", "old/model.safetensors.index.json", "--plan", planned)
    outcome = run(*asked, "--in-place")
    assert outcome.code == 0, outcome.error
    # In a long path a narrow terminal has line ends.
    assert f"theoldoneiskeptas{sharded}.bak" in "".join(outcome.output.split())
    assert contents(sharded.with_name("old.bak")) == before != contents(sharded)
    refused(run(*asked, "--in-place"), 3, "old.bak exists, an older copy of the folder: move it")
    assert run(*asked, "--in-place", "--force", "-q").code == 0


def test_what_does_not_go_together(run, sharded, planned, nothing_slow):
    asked = ("reinit", *OWN, "--checkpoint", "old", "--plan", planned)
    refused(run(*asked, "-o", "old"), 2, "-o old is the checkpoint itself: name another folder")
    refused(run(*asked, "-o", "x.pth"), 2, "-o x.pth: one file with all that a folder holds cannot")
    refused(run(*asked, "-o", "x", "--in-place"), 2, "both say where to write: drop one")
    for more in (["--compensate"], ["--recalibrate"], ["--data", "noise"], ["--batches", "3"]):
        text = f"{more[0]}: runs the model, and old is re-initialised file by file, without the mod"
        refused(run(*asked, "-o", "new", *more), 2, text)
    (sharded.parent / "file").touch()
    refused(run(*asked, "-o", "file"), 3, "file is a file: name a folder")
    refused(run(*asked, "-o", "none/new"), 3, "there is no folder none: make it first")
    (sharded.parent / "empty").mkdir()
    refused(run("profile", *OWN, "--checkpoint", "empty"), 3, "is a folder, expected a file of wei")
    refused(run("profile", *OWN, "--checkpoint", "no"), 3, "--checkpoint no: no such file")


def test_weights_that_are_not_finite(run, state, tmp_path, planned):
    broken = state | {"fc.bias": torch.full_like(state["fc.bias"], torch.nan)}
    save_sharded(tmp_path / "old", broken)
    asked = ("reinit", *OWN, "--checkpoint", "old", "--plan", planned, "-o", "new", "-q")
    refused(run(*asked), 3, "NaN or infinity in 1 tensors: fc.bias; expected finite weights")
    assert run(*asked, "--force").code == 0


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_distributed_checkpoint(run, state, planned, tmp_path):
    save({"model": state, "epoch": 3}, checkpoint_id="step-7", no_dist=True)
    outcome = run("profile", *OWN, "--checkpoint", "step-7", *DATA)
    assert outcome.code == 0, outcome.error
    says = "checkpoint: step-7 (1 file of torch.distributed.checkpoint; prefix 'model.' removed)"
    assert says in outcome.output
    outcome = run("reinit", *OWN, "--checkpoint", "step-7", "--plan", planned, "-o", "new")
    assert outcome.code == 0, outcome.error
    assert says in outcome.output and "kept as they are: epoch" in outcome.output
    names = FileSystemReader("new").read_metadata().state_dict_metadata
    assert "epoch" in names and len(names) == len(state) + 1
    one = ("--checkpoint", "step-7", "--plan", planned, "-o", "one.safetensors")
    outcome = run("reinit", *OWN, *one)
    assert "left out: epoch; a file of this kind holds weights only" in outcome.output
    written = create_model(MODEL, checkpoint=tmp_path / "new", num_classes=10).model.state_dict()
    assert same_bits(written, load_file("one.safetensors"))


def test_the_shards_of_a_hugging_face_folder(run, tmp_path):
    save_folder_model(tmp_path / "m", "classifier", dtype=torch.bfloat16, shard="2KB")
    write_texts(tmp_path / "t.jsonl")
    data = ("--data", "t.jsonl", "-b", "4", "--batches", "2", "--ratio", "0.2")
    outcome = run("plan", "hf:m", *data, "-o", "plan.json", "-q")
    assert outcome.code == 0, outcome.error
    outcome = run("reinit", "hf:m", "--plan", "plan.json", "-o", "new")
    assert outcome.code == 0, outcome.error
    assert "weights  checkpoint: m (2 files of safetensors)" in outcome.output
    assert run("reinit", "hf:m", "--plan", "plan.json", "-o", "one.safetensors", "-q").code == 0
    assert same_bits(read_sharded(tmp_path / "new"), load_file("one.safetensors"))
    assert (tmp_path / "new" / "tokenizer.json").is_file()
    assert create_model(f"hf:{tmp_path / 'new'}").weights == "pretrained"


def test_structure_takes_no_memory_where_the_code_allows_that(monkeypatch):
    made = create_outline(MODEL, num_classes=10).model
    assert all(x.is_meta for x in made.parameters()) and made.num_classes == 10

    def stubborn(*arguments, **keywords):
        torch.zeros(1).item()
        return create(*arguments, **keywords)

    create = __import__("timm").create_model
    monkeypatch.setattr("timm.create_model", stubborn)
    assert not any(x.is_meta for x in create_outline(MODEL, num_classes=10).model.parameters())
