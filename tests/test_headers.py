"""Safetensors whose headers lie: one line, and neither a crash nor the memory that they ask for."""

import json
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from fastplastic import FastPlasticError, Plan, Profile
from fastplastic.errors import FileError
from fastplastic.files.checkpoint import load_into, load_state_dict


def entry(dtype="F32", shape=(4,), offsets=(0, 16)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def content(header, data=b"\0" * 16, length=None):
    """Return a file with this header, whatever the length before it says."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


TWICE = b'{"a":%b,"a":%b}' % (json.dumps(entry()).encode(), json.dumps(entry("I32")).encode())
LIES = {
    "longer than the file": content({"a": entry()}, length=500),
    "2**60 long": content({"a": entry()}, length=2**60),
    "2**64 - 1 long": content({"a": entry()}, length=2**64 - 1),
    "offsets beyond the end": content({"a": entry(shape=(2**48,), offsets=(0, 2**50))}),
    "offsets that overlap": content({"a": entry(), "b": entry(offsets=(8, 24))}, b"\0" * 24),
    "offsets with a hole": content({"a": entry(), "b": entry(offsets=(32, 48))}, b"\0" * 48),
    "offsets backwards": content({"a": entry(offsets=(16, 0))}),
    "negative": content({"a": entry(shape=(-4,))}),
    "size of another dtype": content({"a": entry("F64")}),
    "no such dtype": content({"a": entry("F33")}),
    "sizes that overflow": content({"a": entry(shape=(2**40, 2**40))}),
    "data after the end": content({"a": entry()}, b"\0" * 48),
    "data cut off": content({"a": entry()}, b"\0" * 5),
    "a name twice": content(TWICE),
    "no UTF-8": content(b'{"\xff\xfe":3}'),
    "deep": content(b'{"a":' + b"[" * 10**5),
    "deep metadata": content(b'{"__metadata__":' + b'{"a":' * 10**5),
    "metadata of numbers": content({"__metadata__": {"a": 3}, "a": entry()}),
    "a list": content([1, 2]),
    "not finite": content(b'{"a":NaN}'),
    "nothing": content(b""),
    "no tensors": content({}, b""),
}


@pytest.mark.parametrize("name", LIES)
def test_headers_that_lie(tmp_path, name):
    path = tmp_path / "a.safetensors"
    path.write_bytes(LIES[name])
    with pytest.raises(FileError) as error:
        load_state_dict(path)
    text = str(error.value)
    assert re.match(
        f"{re.escape(str(path))}: (corrupt safetensors \\(.+\\): get it anew|holds no we)", text
    )
    assert "\n" not in text and len(text) < 500
    for kind in (Plan, Profile):
        with pytest.raises(FileError, match=r"^[^\n]*$"):
            kind.load(path)


def test_a_name_that_stands_twice_is_named(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(LIES["a name twice"])
    with pytest.raises(
        FileError, match=r"corrupt safetensors \('a' stands twice in one object\): g"
    ):
        load_state_dict(tmp_path / "a.safetensors")


def test_long_names_are_cut(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(content({"x" * 10**5: entry()}))
    with pytest.raises(FileError) as error:
        load_into(nn.Linear(2, 2), tmp_path / "a.safetensors")
    assert f"1 unexpected ({'x' * 120}...)" in str(error.value) and len(str(error.value)) < 500


def test_the_same_weights_with_and_without_a_prefix(tmp_path):
    state = nn.Linear(2, 2).state_dict()
    torch.save({**state, "module.weight": torch.ones(2, 2)}, tmp_path / "a.pth")
    with pytest.raises(FileError) as error:
        load_state_dict(tmp_path / "a.pth")
    assert str(error.value) == (
        f"{tmp_path / 'a.pth'}: holds the same weights with and without a prefix such as "
        "'module.': save the ones that you want by themselves"
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "a"
    save_file(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).state_dict(), path)
    return path.read_bytes()


@settings(max_examples=100)
@given(source=st.data())
def test_nothing_but_our_errors_from_damaged_weights(tmp_path_factory, whole, source):
    found = bytearray(whole)
    kind = source.draw(st.sampled_from(["cut", "bytes", "length", "header"]))
    header = int.from_bytes(whole[:8], "little")
    if kind == "cut":
        del found[source.draw(st.integers(0, len(found) - 1)) :]
    elif kind == "length":
        found[:8] = source.draw(st.integers(0, 2**64 - 1)).to_bytes(8, "little")
    else:
        end = 8 + header if kind == "header" else len(found)
        for _ in range(source.draw(st.integers(1, 4))):
            found[source.draw(st.integers(0, end - 1))] = source.draw(st.integers(0, 255))
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for name in ("a.safetensors", "a.pth"):
        path = tmp_path_factory.getbasetemp() / name
        path.write_bytes(found)
        try:
            load_into(model, path)
        except FastPlasticError as error:
            assert "\n" not in str(error) and len(str(error)) < 700
            state = model.state_dict()
            assert all(torch.equal(state[key], value) for key, value in before.items())
        else:
            model.load_state_dict(before)
