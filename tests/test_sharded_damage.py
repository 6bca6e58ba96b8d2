"""Damaged or unsuitable sharded safetensors are named, and nothing is written."""

import json
import os

import pytest
import torch
from helpers.many_files import INDEX, on_meta, save_sharded
from helpers.written import deep_mlp, filled
from safetensors.torch import save_file
from torch import nn

import fastplastic
from fastplastic.errors import FileError, FingerprintError, InputError
from fastplastic.files import load_into


@pytest.fixture
def case():
    return filled(deep_mlp)


@pytest.fixture
def source(tmp_path, case):
    return save_sharded(tmp_path / "old", case.model.state_dict())


def change_index(folder, **changes):
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] |= changes
    (folder / INDEX).write_text(json.dumps(index))


def first_file(folder):
    return min(folder.glob("*.safetensors"))


def cut(file):
    os.truncate(file, file.stat().st_size - 4)


def lie(file):
    """Say that a tensor has another size than its bytes."""
    file.write_bytes(file.read_bytes().replace(b'"shape":[8,5]', b'"shape":[8,9]'))


def twice(folder):
    one, other, *_ = sorted(folder.glob("*.safetensors"))
    other.write_bytes(one.read_bytes())


def several(folder):
    (folder / INDEX).rename(folder / f"a.{INDEX}")
    (folder / f"b.{INDEX}").write_text("{}")


DAMAGE = {
    "missing": (lambda x: first_file(x).unlink(), r"has a\.weight in model-00001.*which is not th"),
    "not held": (lambda x: change_index(x, ghost="model-00001-of-00003.safetensors"),
                 r"has ghost in model-00001-of-00003\.safetensors, which does not hold it"),
    "outside": (lambda x: change_index(x, ghost="../old/x"),
                r"has ghost in '\.\./old/x', expected a file in the same folder"),
    "absolute": (lambda x: change_index(x, ghost="/etc/passwd"), "expected a file in the same"),
    "no text": (lambda x: change_index(x, ghost=3), "has ghost in 3, expected a file in the"),
    "cut off": (lambda x: cut(first_file(x)), r"00001.*: corrupt safetensors \(.*get it anew"),
    "lying": (lambda x: lie(first_file(x)), r"00001.*: corrupt safetensors \("),
    "twice": (twice, r"00002.*: holds \S+, as model-00001-of-00003\.safetensors does, expected it"),
    "no json": (lambda x: (x / INDEX).write_text("{"), "cannot be read as JSON"),
    "no map": (lambda x: (x / INDEX).write_text("{}"), "has no weight_map, expected the file of"),
    "name twice": (lambda x: (x / INDEX).write_text('{"weight_map": {"a": "b", "a": "c"}}'),
                   "'a' stands twice"),
    "no index": (lambda x: (x / INDEX).unlink(),
                 r"is a folder, expected .*: name the file, as in .*00001-of-00003\.safetensors"),
    "several": (several,
                r"has several lists of tensors \(a\..*, b\..*\): name the one to read"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_and_nothing_is_written(tmp_path, case, source, kind):
    damage, text = DAMAGE[kind]
    damage(source)
    with pytest.raises(FileError, match=text):
        fastplastic.reinit_checkpoint(source, tmp_path / "new", on_meta(case), case.plan)
    with pytest.raises(FileError, match=text):
        load_into(case.model, source)
    assert [x.name for x in tmp_path.iterdir()] == ["old"]


def test_weights_that_do_not_fit(tmp_path, case):
    state, number = case.model.state_dict(), 0

    def refused(error, text, changed, **options):
        nonlocal number
        number += 1
        source = save_sharded(tmp_path / str(number), changed)
        model = options.pop("model", on_meta(case))
        with pytest.raises(error, match=text):
            fastplastic.reinit_checkpoint(source, tmp_path / "new", model, case.plan, **options)
        assert not (tmp_path / "new").exists()

    lacking = {name: x for name, x in state.items() if name != "b.weight"}
    refused(FileError, r"of 6 tensors expected, 1 missing \(b\.weight\)", lacking)
    wide = state | {"b.weight": torch.zeros(6, 9)}
    refused(FileError, r"1 of another shape \(b\.weight \[6, 9\] instead of \[6, 8\]\)", wide)
    whole = state | {"b.weight": torch.zeros(6, 8, dtype=torch.int8)}
    text = r"'b\.weight' is stored as torch\.int8, expected it as floating-point numbers"
    refused(FileError, text, whole)
    refused(FingerprintError, "the plan is for the model", state, model=nn.Linear(2, 2))
    refused(InputError, "outgoing 'away' is unknown", state, outgoing="away")
    refused(InputError, "init 'away' is unknown", state, init="away")
    copies = {
        f"{prefix}.{name}": x.clone() for prefix in ("one", "two") for name, x in state.items()
    }
    refused(FileError, r"several times, under 'one\.', 'two\.': save the one that you want", copies)


def test_no_checkpoint_in_many_files(tmp_path, case):
    save_file(case.model.state_dict(), tmp_path / "one.safetensors")
    for name, text in (
        ("one.safetensors", "is one file, exp"),
        ("none", "no such folder, expected"),
    ):
        with pytest.raises(FileError, match=text):
            fastplastic.reinit_checkpoint(
                tmp_path / name, tmp_path / "new", on_meta(case), case.plan
            )
