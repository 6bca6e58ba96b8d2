"""Profiles in JSON: what `fastplastic profile --json` wrote is read, anything else is refused."""

import copy
import json
from dataclasses import asdict

import pytest
from helpers.compared import a_layer, a_profile, written
from helpers.profiled import data, net
from hypothesis import given
from hypothesis import strategies as st

from fastplastic import profile
from fastplastic.errors import FileError
from fastplastic.files import figures_of, parse_profile_json, read_profile_json


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def error_of(values):
    with pytest.raises(FileError) as caught:
        read_profile_json(written(values))
    text = str(caught.value)
    assert text.startswith("profile.json: ") and "\n" not in text
    return text.removeprefix("profile.json: ")


def changed(path, value):
    """Return the values of a profile in which one is another; of a path of keys as a.0.b."""
    values = a_profile()
    *way, last = [int(key) if key.isdigit() else key for key in path.split(".")]
    place = values
    for key in way:
        place = place[key]
    place[last] = value
    return values


def test_a_profile_of_a_model_is_read_as_it_was():
    found = profile(net(), data(), ranks=True)
    values = found.to_dict(model="net", weights="random", data="noise")
    read = read_profile_json(written(values))
    assert (read.model, read.weights, read.data) == ("net", "random", "noise")
    for key in ("device", "dtype", "mode", "samples", "seed"):
        assert getattr(read, key) == values[key]
    assert [layer.name for layer in read.layers] == [layer.name for layer in found]
    for layer, own in zip(read.layers, values["layers"], strict=True):
        assert asdict(layer) == {key: own[key] for key in asdict(layer)}
    assert read.by_name["fc"] is read.layers[1]


def test_what_a_later_command_adds_is_read_over():
    values = a_profile(advice={"text": "no"}, gates=[], later=5)
    assert read_profile_json(written(values)) == figures_of(a_profile())
    marked = b"\xef\xbb\xbf" + json.dumps(values).encode()
    assert parse_profile_json(marked, "stdin") == figures_of(a_profile())


def test_unknown_figures_are_none():
    unknown = dict.fromkeys(
        ("dead", "frozen", "dormant", "saturated_fraction", "mean_abs_activation",
         "mean_abs_gradient"),
    )  # fmt: skip
    values = a_profile(a_layer("conv") | unknown | {"unknown": {"lost": 8}, "tied": ["other"]})
    (layer,) = read_profile_json(written(values)).layers
    assert {getattr(layer, key) for key in unknown} == {None}


DAMAGED = "; the file is damaged: profile the model again"


@pytest.mark.parametrize(
    ("path", "value", "text"),
    [
        ("layers.0.dead", -1, "layer 'stem': 'dead' is -1, expected null or an integer in 0..4"),
        ("layers.0.dead", 5, "layer 'stem': 'dead' is 5, expected null or an integer in 0..4"),
        ("layers.1.units", 0, "layer 'block.conv': 'units' is 0, expected an integer in 1..900"),
        ("layers.1.hidden", True, "'hidden' is True, expected an integer in 0..8"),
        ("layers.1.frozen", 1.0, "'frozen' is 1.0, expected null or an integer in 0..8"),
        ("layers.0.name", "", "layers[0]: 'name' is '', expected a string that is not empty"),
        ("layers.0.name", "block.conv", "the name of a layer is 'block.conv', expected a name"),
        ("layers.0.kind", None, "layer 'stem': 'kind' is None, expected a string"),
        ("layers.0.saturated_fraction", 1.5, "is 1.5, expected null or a number in 0..1"),
        ("layers.0.mean_abs_gradient", -1e-9, "is -1e-09, expected null or a number from 0 on"),
        ("layers.0.mean_abs_gradient", 1e300, "is 1e+300, expected null or a number from 0 on"),
        ("layers.0.ranks", 3, "layer 'stem': 'ranks' is 3, expected an object"),
        ("layers.0", 3, "layers[0] is 3, expected an object"),
        ("layers", [], "'layers' is [], expected a list of layers"),
        ("layers", {}, "'layers' is {}, expected a list of layers"),
        ("samples", -16, "'samples' is -16, expected an integer from 0 on"),
        ("seed", "0", "'seed' is '0', expected an integer"),
        ("mode", None, "'mode' is None, expected a string"),
        ("model", "", "'model' is '', expected null or a name"),
        ("advice", "yes", "'advice' is 'yes', expected an object"),
        ("coverage.measured", 3, "coverage: 'measured' is 3, expected an integer in 0..2"),
        ("coverage.skipped", [1], "an element of 'skipped' is 1, expected an object"),
        ("totals.dead", 3, "totals: 'dead' is 3, expected 2, the sum over the layers"),
        ("totals.layers", True, "totals: 'layers' is True, expected 2, the sum over the layers"),
    ],
)
def test_every_field_is_checked(path, value, text):
    error = error_of(changed(path, value))
    assert text in error and error.endswith(DAMAGED)


@pytest.mark.parametrize("path", ["layers.0", "coverage", "totals", ""])
def test_every_field_has_to_be_there(path):
    inside = a_profile()
    for key in filter(None, path.split(".")):
        inside = inside[int(key) if key.isdigit() else key]
    for key in inside:
        values = a_profile()
        place = values
        for step in filter(None, path.split(".")):
            place = place[int(step) if step.isdigit() else step]
        del place[key]
        error_of(values)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ("", "is not a profile in JSON (Expecting value: line 1 column 1 (char 0)): write it"),
        ("[1]", "is JSON but not a profile: check the file name"),
        ("{}", "is JSON but not a profile, expected what fastplastic profile --json writes: check"),
        ('{"a": NaN}', "is not a profile in JSON (NaN is not a number in JSON): write it again"),
        (
            a_profile(schema_version=2, fastplastic_version="9.1"),
            "is a profile of schema 2, expected 1: read it with fastplastic 9.1, or profile the "
            "model again",
        ),
        (a_profile(schema_version=True), "is a profile of schema True, expected 1: read it with"),
    ],
)
def test_what_is_no_profile_of_this_version(values, text):
    assert error_of(values).startswith(text)


def test_files_that_cannot_be_read(tmp_path):
    texts = {
        "none.json": "none.json: no such file, expected a profile: check the path",
        ".": ".: cannot be read (Is a directory): expected a profile",
        "a\0b": "a\0b: cannot be read (embedded null byte): expected a profile",
        "bytes": "bytes: is not text, expected what fastplastic profile --json writes: check",
    }
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x80")
    for path, text in texts.items():
        with pytest.raises(FileError) as caught:
            read_profile_json(path)
        assert str(caught.value).startswith(text)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**80), 2**80) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


def places(values, way=()):
    """Yield the ways to all values inside."""
    pairs = values.items() if isinstance(values, dict) else enumerate(values)
    for key, value in pairs:
        yield (*way, key)
        if isinstance(value, dict | list):
            yield from places(value, (*way, key))


PLACES = list(places(a_profile()))


@given(st.lists(st.tuples(st.sampled_from(PLACES), ANYTHING), min_size=1, max_size=3))
def test_nothing_but_file_errors_from_damaged_fields(damage):
    values = copy.deepcopy(a_profile())
    for (*way, last), value in damage:
        place = values
        for key in way:
            inside = isinstance(place, dict) and key in place
            inside |= isinstance(place, list) and isinstance(key, int) and key < len(place)
            place = place[key] if inside else {}
        if isinstance(place, dict) or (isinstance(place, list) and last in range(len(place))):
            place[last] = value
    only_file_errors(json.dumps(values).encode())


@given(st.binary(max_size=40), st.integers(0, 1000), st.integers(0, 20))
def test_nothing_but_file_errors_from_damaged_bytes(noise, start, length):
    content = json.dumps(a_profile()).encode()
    only_file_errors(content[:start] + noise + content[start + length :])
    only_file_errors(noise)


def only_file_errors(content):
    try:
        found = parse_profile_json(content, "stdin")
    except FileError as error:
        assert "\n" not in str(error)
    else:
        # What passes can be computed with.
        for layer in found.layers:
            assert layer.units > 0 and 0 <= (layer.dead or 0) <= layer.units


def test_deep_nesting_is_a_file_error():
    only_file_errors(b'{"a":' * 100_000)
