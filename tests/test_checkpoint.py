"""Weight files: read without code, written whole or not at all."""

import argparse
import pickle
import stat
from pathlib import Path

import pytest
import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from fastplastic.errors import FileError, InputError
from fastplastic.files import UNFITTED, checkpoint, read_metadata
from fastplastic.files.checkpoint import (
    fingerprint,
    load_into,
    load_state_dict,
    save_state_dict,
)


def small() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


class Tied(nn.Module):
    """A decoder that reads words with the weight that made them, and a view of a larger tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.out = nn.Linear(3, 5, bias=False)
        self.out.weight = self.embed.weight
        self.register_buffer("part", torch.arange(10.0)[2:4])
        self.register_buffer("other", self.part[1:])


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# Fingerprint


def test_fingerprint_is_of_names_shapes_and_dtypes():
    model = small()
    print_ = fingerprint(model)
    assert len(print_) == 64
    assert fingerprint(small()) == print_, "values do not count"
    assert fingerprint(nn.ModuleList(small())) == print_, "the class does not count"
    assert fingerprint(small().double()) != print_
    assert fingerprint(nn.Sequential(nn.Linear(4, 3), *small()[1:])) != print_
    assert fingerprint(nn.ModuleDict({"a": nn.Linear(2, 2)})) != fingerprint(
        nn.ModuleDict({"b": nn.Linear(2, 2)})
    )


# Reading


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3, "args": argparse.Namespace(lr=0.1)},
        lambda state: {"model": state, "optimizer": {}},
        lambda state: {"state_dict_ema": state, "state_dict": {"0.weight": torch.zeros(1)}},
        lambda state: {"model_ema": state, "model": {"0.weight": torch.zeros(1)}},
        lambda state: {"state_dict": {f"module.{name}": value for name, value in state.items()}},
        lambda state: {f"_orig_mod.{name}": value for name, value in state.items()},
    ],
    ids=["bare", "timm", "model", "ema", "model_ema", "parallel", "compiled"],
)
def test_checkpoints_as_training_scripts_write_them(tmp_path, wrap):
    state = small().state_dict()
    torch.save(wrap(state), tmp_path / "last.pth.tar")
    assert equal(load_state_dict(tmp_path / "last.pth.tar"), state)


def test_safetensors_under_any_name(tmp_path):
    state = small().state_dict()
    save_file(state, tmp_path / "weights.bin")
    assert equal(load_state_dict(tmp_path / "weights.bin"), state)


class Runs:
    """A pickle that makes a file when it is loaded the careless way."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_code_in_a_file_is_not_run(tmp_path):
    victim, path = tmp_path / "victim", tmp_path / "evil.pth"
    torch.save({"state_dict": {"0.weight": Runs(victim)}}, path)
    torch.load(path, weights_only=False)
    assert victim.exists(), "the pickle works"
    victim.unlink()
    with pytest.raises(FileError) as error:
        load_state_dict(path)
    assert str(error.value) == (
        f"{path}: contains code (getattr), more than tensors and plain values, and "
        "could run it on loading: save only the model's state_dict(), best as safetensors"
    )
    assert not victim.exists()


@pytest.mark.parametrize("protocol", [2, 4])
def test_code_in_a_plain_pickle_is_named_so(tmp_path, protocol):
    victim, path = tmp_path / "victim", tmp_path / "evil.pth"
    path.write_bytes(pickle.dumps({"a": Runs(victim)}, protocol=protocol))
    with pytest.raises(FileError, match=r"contains code \("):
        load_state_dict(path)
    assert not victim.exists()
    # Nothing is called in this one, whatever else it is.
    path.write_bytes(pickle.dumps({"a": 3}, protocol=4)[:-1])
    with pytest.raises(FileError, match="corrupt or not a checkpoint"):
        load_state_dict(path)


HEADER = (60).to_bytes(
    8, "little"
) + b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}     '


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("a.pth", b"", "corrupt or not a checkpoint; expected a state dict in safetensors or"),
        ("a.pth", b"no checkpoint at all", "corrupt or not a checkpoint"),
        ("a.pth", b"PK\3\4 not a zip", "corrupt or not a checkpoint"),
        ("a.safetensors", b"", "corrupt safetensors"),
        ("a.safetensors", b"\xff" * 99, "corrupt safetensors"),
        ("a.safetensors", HEADER + b"cut", "corrupt safetensors"),
        ("a.bin", HEADER + b"cut", "corrupt safetensors"),
    ],
)
def test_corrupt_files(tmp_path, name, content, text):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FileError) as error:
        load_state_dict(tmp_path / name)
    assert str(error.value).startswith(f"{tmp_path / name}: {text}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ({"epoch": 3, "net": {"w": torch.ones(1)}}, "not weights: epoch, net; expected a state"),
        ({"state_dict": {"w": 3}}, "not weights: w; expected a state dict"),
        ({}, "holds no weights; expected a state dict in safetensors or PyTorch format"),
        (torch.ones(3), "holds no weights; expected"),
        ([torch.ones(3)], "holds no weights; expected"),
    ],
)
def test_files_without_weights(tmp_path, content, text):
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(FileError) as error:
        load_state_dict(tmp_path / "a.pth")
    assert str(error.value).startswith(f"{tmp_path / 'a.pth'}: {text}")


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(FileError, match=r"none\.pth: no such file; expected .*: check the path"):
        load_state_dict(tmp_path / "none.pth")
    with pytest.raises(FileError, match=r": is a folder, expected a file of weights, or"):
        load_state_dict(tmp_path)


# Loading into a model


def test_what_does_not_fit_is_named_and_changes_nothing(tmp_path):
    state = small().state_dict()
    state["0.weight"] = torch.ones(5, 3)
    state["extra"] = state.pop("2.bias")
    save_file(state, tmp_path / "other.safetensors")
    model = small()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(FileError) as error:
        load_into(model, tmp_path / "other.safetensors")
    assert str(error.value) == (
        f"{tmp_path / 'other.safetensors'} does not fit the model: of 9 tensors expected, "
        "1 missing (2.bias), 1 unexpected (extra), 1 of another shape "
        "(0.weight [5, 3] instead of [4, 3]): pass the checkpoint of this very model"
    )
    assert equal(model.state_dict(), before)


def test_only_the_first_names_are_shown(tmp_path):
    save_file({"x": torch.ones(1)}, tmp_path / "a.safetensors")
    with pytest.raises(
        FileError, match=r"8 missing \(0\.weight, 0\.bias, 1\.weight, \.\.\.\), 1 unexpected \(x\)"
    ):
        load_into(small(), tmp_path / "a.safetensors")


def test_a_head_of_another_size_has_a_way_out(tmp_path):
    save_state_dict(tmp_path / "a.safetensors", timm.create_model("test_resnet", num_classes=7))
    with pytest.raises(
        FileError,
        match=r"classifier differs: pass --num-classes 7 for that of the file, or the number of",
    ):
        load_into(timm.create_model("test_resnet"), tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    "name", ["test_resnet", "test_vit", "deit_tiny_distilled_patch16_224", "test_mambaout"]
)
@pytest.mark.parametrize("classes", [7, 0])
def test_a_head_that_does_not_fit_can_stay_as_it_is(tmp_path, name, classes):
    base = timm.create_model(name, num_classes=classes)
    save_state_dict(tmp_path / "a.safetensors", base)
    model = timm.create_model(name, num_classes=3)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    loaded = load_into(model, tmp_path / "a.safetensors", own_head=True)
    assert loaded.kept and loaded.classes == (classes or None)
    for key, value in model.state_dict().items():
        expected = before[key] if key in loaded.kept else base.state_dict()[key]
        assert torch.equal(value, expected), key
    assert {before[key].shape[0] for key in loaded.kept} == {3}


def test_a_head_that_fits_is_loaded(tmp_path):
    base = timm.create_model("test_resnet", num_classes=3)
    save_state_dict(tmp_path / "a.safetensors", base)
    model = timm.create_model("test_resnet", num_classes=3)
    assert load_into(model, tmp_path / "a.safetensors", own_head=True).kept == ()
    assert torch.equal(model.fc.weight, base.fc.weight)


def test_only_a_head_may_differ(tmp_path):
    other = timm.create_model("test_resnet", num_classes=7, in_chans=1)
    save_state_dict(tmp_path / "a.safetensors", other)
    model = timm.create_model("test_resnet", num_classes=3)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(FileError, match="1 of another shape"):
        load_into(model, tmp_path / "a.safetensors", own_head=True)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_old_files_without_counters(tmp_path):
    state = small().state_dict()
    del state["1.num_batches_tracked"]
    torch.save(state, tmp_path / "old.pth")
    model = small()
    load_into(model, tmp_path / "old.pth")
    assert torch.equal(model[0].weight, state["0.weight"])


# Writing


def test_a_written_file_loads_into_timm_strictly(tmp_path):
    path = tmp_path / "new.safetensors"
    model = timm.create_model("test_resnet").to(memory_format=torch.channels_last)
    save_state_dict(path, model, metadata={"model": "test_resnet"})
    other = timm.create_model("test_resnet", checkpoint_path=str(path))
    assert equal(other.state_dict(), model.state_dict())
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    expected = {"format": "pt", "fingerprint": fingerprint(model), "model": "test_resnet"}
    assert metadata == expected


def test_tied_weights_are_written_under_every_name(tmp_path):
    path, model, other = tmp_path / "tied.safetensors", Tied(), Tied()
    save_state_dict(path, model)
    other.load_state_dict(load_file(path), strict=True)
    assert equal(other.state_dict(), model.state_dict())
    assert other.out.weight is other.embed.weight


def test_tied_weights_may_be_missing_under_other_names(tmp_path):
    path, model, other = tmp_path / "tied.safetensors", Tied(), Tied()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    del state["out.weight"]
    save_file(state, path)
    load_into(other, path)
    assert equal(other.state_dict(), model.state_dict())


def test_state_that_is_no_tensor(tmp_path):
    class Odd(nn.Module):
        def get_extra_state(self):
            return {"version": 1}

    with pytest.raises(InputError, match=r"^_extra_state: dict cannot be saved, expected a tensor"):
        save_state_dict(tmp_path / "a.safetensors", Odd())
    assert not list(tmp_path.iterdir())


def test_a_full_disk(tmp_path, monkeypatch):
    def full(*_):
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(FileError, match=r"cannot be written \(I/O error: No space left on device"):
        save_state_dict(tmp_path / "a.safetensors", small())
    assert not list(tmp_path.iterdir())


def test_written_files_have_the_usual_mode(tmp_path):
    (tmp_path / "usual").touch()
    save_state_dict(tmp_path / "a.safetensors", small())
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert len(modes) == 1


def test_a_file_tells_that_its_head_was_not_fitted(tmp_path):
    model = small()
    save_state_dict(tmp_path / "a.safetensors", model, metadata=UNFITTED)
    assert load_into(model, tmp_path / "a.safetensors").unfitted
    save_state_dict(tmp_path / "b.safetensors", model)
    torch.save(model.state_dict(), tmp_path / "c.pt")
    for name in ("b.safetensors", "c.pt"):
        assert not load_into(model, tmp_path / name).unfitted


def test_metadata_of_a_file(tmp_path):
    save_state_dict(tmp_path / "a.safetensors", small(), metadata={"validation": "0.5"})
    assert read_metadata(tmp_path / "a.safetensors")["validation"] == "0.5"
    torch.save(small().state_dict(), tmp_path / "b.pt")
    assert read_metadata(tmp_path / "b.pt") == {}
    (tmp_path / "c.safetensors").write_bytes(b"nonsense")
    for name in ("c.safetensors", "missing.pt"):
        with pytest.raises(FileError, match="cannot be read"):
            read_metadata(tmp_path / name)
