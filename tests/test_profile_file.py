"""Profiles in files: what was saved comes back, and damage is refused in one line."""

import json
from dataclasses import fields, is_dataclass, replace

import pytest
import safetensors.torch
import torch
from helpers.profiled import data, net
from hypothesis import given
from hypothesis import strategies as st

from fastplastic import LayerProfile, Profile, profile
from fastplastic.errors import FileError
from fastplastic.model.weights import Weights
from fastplastic.stats import STATISTICS


def assert_same(one, two):
    assert type(one) is type(two)
    if isinstance(one, torch.Tensor):
        assert torch.equal(one.nan_to_num(), two.nan_to_num())
        assert one.dtype == two.dtype
    elif is_dataclass(one):
        for item in fields(one):
            assert_same(getattr(one, item.name), getattr(two, item.name))
    elif isinstance(one, dict):
        assert list(one) == list(two)
        for key, value in one.items():
            assert_same(value, two[key])
    elif isinstance(one, Weights):
        assert_same(dict(sorted(one.items())), dict(sorted(two.items())))
    elif isinstance(one, tuple):
        assert len(one) == len(two)
        for a, b in zip(one, two, strict=True):
            assert_same(a, b)
    else:
        assert one == two


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A profile and its file; one layer was never seen, so its minimum is infinite."""
    path = tmp_path_factory.mktemp("profiles") / "profile.safetensors"
    found = profile(net(), data(), gradients=True)
    found = replace(found, gradients=dict(sorted(found.gradients.items())), notes=("a note",))
    found.save(path)
    return found, path


def test_saving_and_loading(saved, tmp_path):
    found, path = saved
    assert_same(Profile.load(path), found)
    without = replace(found, gradients=None)
    without.save(tmp_path / "small")
    small = Profile.load(tmp_path / "small")
    assert small.gradients is None and small.weights is None
    assert (tmp_path / "small").stat().st_size < path.stat().st_size
    assert isinstance(Profile.load(path).layers[0], LayerProfile)


def test_existing_file_needs_force(saved, tmp_path):
    found, path = saved
    content = path.read_bytes()
    with pytest.raises(FileError):
        replace(found, notes=()).save(path)
    assert path.read_bytes() == content
    target = tmp_path / "p"
    target.write_text("old")
    found.save(target, force=True)
    assert_same(Profile.load(target), found)


def rewritten(path, target, change):
    """Copy a profile with its header and tensors changed."""
    with safetensors.safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["fastplastic"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    change(header, tensors)
    metadata = {"fastplastic": json.dumps(header)}
    safetensors.torch.save_file(tensors, target, metadata)
    return target


def put(*path_and_value):
    *path, key, value = path_and_value

    def change(header, tensors):
        for part in path:
            header = header[part]
        header[key] = value

    return change


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (put("schema_version", 2), "is a profile of schema 2, expected 1: read it"),
        (put("statistics", ["n"]), "is a profile of schema 1, expected 1"),
        (put("mode", 3), "'mode' is 3, expected a string; the file is damaged"),
        (put("samples", True), "'samples' is True, expected an integer"),
        (put("samples", "x" * 999), "'samples' is 'xxxx"),
        (put("notes", [1]), "'notes' is [1], expected a list of strings"),
        (put("has_gradients", None), "'has_gradients' is None, expected true or false"),
        (put("coverage", []), "'coverage' is [], expected an object"),
        (put("coverage", "skipped", [["a"]]), "'skipped' is [['a']], expected [name, reason]"),
        (put("layers", {}), "the list of layers is {}, expected a list"),
        (put("layers", []), "the table is torch.float64"),
        (
            lambda h, t: (h.update(layers=[]), t.update(statistics=t["statistics"][:, :0])),
            "the table is torch.float64 (27, 0), expected",
        ),
        (put("layers", 0, "n_units", 7), "layer 'conv'"),
        (put("layers", 0, "hidden", "runs", [[0, 0, 9, 1]]), "layer 'conv' hidden: a run is"),
        (lambda h, t: t.pop("statistics"), "the table is torch.float32 (0,), expected"),
        (lambda h, t: t.update(statistics=t["statistics"][:, 1:].clone()), "the table is torch.fl"),
        (lambda h, t: t.update(statistics=t["statistics"].float()), "the table is torch.float32"),
    ],
)  # fmt: skip
def test_damaged_profiles(saved, tmp_path, change, text):
    path = rewritten(saved[1], tmp_path / "damaged", change)
    with pytest.raises(FileError) as error:
        Profile.load(path)
    assert text in str(error.value)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("metadata", [None, {"x": "y"}, {"fastplastic": "["}, {"fastplastic": "[]"},
                                      {"fastplastic": "[" * 100_000}])  # fmt: skip
def test_other_safetensors(tmp_path, metadata):
    path = tmp_path / "weights"
    safetensors.torch.save_file({"w": torch.ones(2)}, path, metadata)
    with pytest.raises(FileError, match=r"is not a profile|not a JSON object"):
        Profile.load(path)


def test_missing_file_and_folder(tmp_path):
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(FileError, match="no such file, expected a profile: check the path"):
            Profile.load(path)


@given(data=st.data())
def test_any_damage_to_the_bytes_is_a_file_error_or_harmless(saved, tmp_path_factory, data):
    content = bytearray(saved[1].read_bytes())
    length = data.draw(st.integers(0, len(content)))
    path = tmp_path_factory.getbasetemp() / "bytes"
    if data.draw(st.booleans()):
        content = content[:length]
    else:
        # Mostly in the header, where it hurts.
        place = data.draw(st.integers(0, 9000)) % len(content)
        content[place] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        found = Profile.load(path)
    except FileError:
        return
    assert sum(layer.n_units for layer in found.layers) == 18
    assert len(found.layers[0].stats.table) == len(STATISTICS)
