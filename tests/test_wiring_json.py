"""Wiring as JSON: back as it was, and nothing taken on trust."""

import json
import math
from dataclasses import fields, is_dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastplastic.errors import FileError
from fastplastic.files.wiring_json import decode_layers, encode_layer
from fastplastic.wiring import Consumer, Coupling, Norm, Site, UnitLayer


def decode_one(value):
    return decode_layers([value])[0]


def index_maps(size, bound):
    units = st.integers(-1, bound - 1)
    free = st.lists(units, min_size=size, max_size=size)
    regular = [
        torch.arange(size) % bound,
        torch.arange(size).flip(0) % bound,
        torch.arange(size) // 3 % bound,
        torch.full((size,), -1),
        torch.where(torch.arange(size) % 5 < 3, torch.arange(size) * 2 % bound, -1),
    ]
    return free.map(lambda v: torch.tensor(v, dtype=torch.int64)) | st.sampled_from(regular)


@st.composite
def unit_layers(draw):
    units = draw(st.integers(1, 12))
    size = draw(st.integers(0, 40))
    maps = index_maps(size, units)
    names = st.text("ab.01_é", min_size=1, max_size=8)
    cut = draw(st.integers(0, units))
    runs = [(a, b, n) for a, b, n in ((0, cut, "relu"), (cut, units, "gelu")) if a < b]
    site = st.builds(
        Site, st.text("ab.", max_size=3), st.sampled_from(["input", "output"]),
        st.integers(-4, 4), maps,
    )  # fmt: skip
    sites = st.lists(site, max_size=2)
    return UnitLayer(
        name=draw(names),
        kind=draw(
            st.sampled_from(["linear", "conv", "depthwise conv", "conv transpose", "conv1d"])
        ),
        weight=draw(names),
        bias=draw(st.none() | names),
        unit_dim=draw(st.integers(0, 1)),
        n_units=units,
        norm=draw(st.none() | names),
        activations=tuple(runs),
        hidden=torch.tensor(draw(st.lists(st.booleans(), min_size=units, max_size=units))),
        reasons=draw(st.dictionaries(st.text(max_size=5), st.integers(0, units), max_size=2)),
        norms=tuple(draw(st.lists(st.builds(Norm, names, maps), max_size=2))),
        coupled=tuple(
            draw(st.lists(st.builds(Coupling, names, index_maps(units, 50)), max_size=2))
        ),
        consumers=tuple(
            draw(
                st.lists(
                    st.builds(Consumer, names, names, st.integers(0, 1), st.integers(1, 4), maps),
                    max_size=3,
                )
            )
        ),
        z_sites=tuple(draw(sites)),
        g_sites=tuple(draw(sites)),
        transformed=draw(st.booleans()),
        head=draw(st.booleans()),
        unknown=draw(st.dictionaries(st.text(max_size=5), st.integers(0, units), max_size=2)),
        tied=tuple(draw(st.lists(names, max_size=2))),
    )


def assert_same(one, two):
    assert type(one) is type(two)
    if isinstance(one, torch.Tensor):
        assert one.dtype == two.dtype
        assert torch.equal(one, two)
    elif is_dataclass(one):
        for item in fields(one):
            assert_same(getattr(one, item.name), getattr(two, item.name))
    elif isinstance(one, tuple):
        assert len(one) == len(two)
        for a, b in zip(one, two, strict=True):
            assert_same(a, b)
    else:
        assert one == two


@given(layer=unit_layers())
def test_wiring_survives_json(layer):
    text = json.dumps(encode_layer(layer), allow_nan=False)
    assert_same(decode_one(json.loads(text)), layer)


def chain_layer(**changes):
    layer = UnitLayer(
        "a", "conv", "a.weight", None, 0, 64, None, ((0, 64, "relu"),),
        torch.ones(64, dtype=torch.bool),
        consumers=(Consumer("b", "b.weight", 1, 1, torch.arange(64)),),
        z_sites=(Site("a", "output", 1, torch.arange(64)),),
    )  # fmt: skip
    return replace(layer, **changes)


@pytest.mark.parametrize(
    ("index", "runs"),
    [
        (torch.arange(64), [[0, 0, 64, 1]]),
        (torch.arange(3).repeat_interleave(4), [[0, 0, 4, 0], [4, 1, 4, 0], [8, 2, 4, 0]]),
        (torch.cat([torch.full((5,), -1), torch.arange(6)]), [[5, 0, 6, 1]]),
        (torch.arange(63, -1, -1), [[0, 63, 64, -1]]),
    ],
)
def test_maps_are_written_as_runs(index, runs):
    consumer = Consumer("b", "b.weight", 1, 1, index)
    written = encode_layer(chain_layer(consumers=(consumer,)))["consumers"][0]["unit_of_column"]
    assert written == {"size": len(index), "runs": runs}


def at(value, path, new):
    """Return the JSON value with another item at `path`; an item that is `del` is removed."""
    value = json.loads(json.dumps(value))
    target = value
    for key in path[:-1]:
        target = target[key]
    if new is DELETE:
        del target[path[-1]]
    else:
        target[path[-1]] = new
    return value


DELETE = object()
ADDED = ("z_sites", "g_sites", "unknown", "tied")
HIDDEN = ("hidden", "runs")
COLUMNS = ("consumers", 0, "unit_of_column")


@pytest.mark.parametrize(
    ("path", "new", "text"),
    [
        (("name",), DELETE, "'name' is 'missing', expected a string"),
        (("name",), "", "expected a string that is not empty"),
        (("name",), 3, "'name' is 3, expected a string"),
        (("kind",), "lstm", "'kind' is 'lstm', expected one of linear"),
        (("unit_dim",), -1, r"'unit_dim' is -1, expected an integer in 0\.\.8"),
        (("unit_dim",), True, "'unit_dim' is True, expected an integer"),
        (("n_units",), 0, "'n_units' is 0"),
        (("n_units",), 10**18, "'n_units' is 1000000000000000000, expected"),
        (("n_units",), 63, "activation run is .* expected a range"),
        (("activations",), [[0, 32, "relu"]], "end of its activation runs is 32, expected 64"),
        (("activations",), [[0, 32, "relu"], [30, 64, "relu"]], "expected a range from 32"),
        (("activations",), [[0, 64]], r"expected \[start, stop, name\]"),
        (HIDDEN, [[0, 0, 65, 1]], "hidden: a run is"),
        (HIDDEN, [[0, 0, 64, 2]], "hidden: a run is"),
        (HIDDEN, [[0, 63, 64, -2]], "hidden: a run is"),
        (HIDDEN, [[-1, 0, 4, 1]], "hidden: a run is"),
        (HIDDEN, [[4, 4, 4, 1], [0, 0, 4, 1]], "hidden: a run is"),
        (HIDDEN, [[0, 0, 0, 1]], "hidden: a run is"),
        (HIDDEN, [[0, 0, 64.0, 1]], "expected four integers"),
        (HIDDEN, [[0, 0, True, 1]], "expected four integers"),
        (HIDDEN, "abc", "'runs' is 'abc', expected a list"),
        (("hidden", "size"), 63, "size is 63, expected 64, one entry per unit"),
        ((*COLUMNS, "size"), 10**15, "'size' is 1000000000000000, expected an integer in 0.."),
        ((*COLUMNS, "runs"), [[0, 1, 64, 1]], r"units in 0\.\.63"),
        (("consumers", 0, "groups"), 0, "'groups' is 0"),
        (("consumers", 0), [], r"is \[\], expected an object"),
        (("z_sites", 0, "where"), "left", "'where' is 'left', expected one of input, output"),
        (("transformed",), 1, "'transformed' is 1, expected true or false"),
        (("head",), None, "'head' is None, expected true or false"),
        (("reasons",), {"x": -1}, "'x' is -1"),
        (("unknown",), {"x": 65}, "'x' is 65"),
        (("unknown",), DELETE, "'unknown' is 'missing'"),
        (("tied",), ["b", ""], r"'tied' is \['b', ''\], expected a list of names"),
    ],
)
def test_damaged_wiring_is_an_error(path, new, text):
    value = at(encode_layer(chain_layer()), path, new)
    with pytest.raises(FileError, match=text) as error:
        decode_one(value)
    assert "the file is damaged or from another program: write it again" in str(error.value)
    assert "\n" not in str(error.value)


def test_all_maps_share_one_budget():
    """Many maps of a size that is allowed for one must not fill the memory."""
    value = encode_layer(chain_layer())
    reading = {**value["consumers"][0], "unit_of_column": {"size": 2**25, "runs": []}}
    with pytest.raises(FileError, match=r"'size' is 33554432, expected an integer in 0\.\."):
        decode_layers([{**value, "consumers": [reading] * 3}])


@pytest.mark.parametrize("value", [None, {}, "x", [None], [3], [[]]])
def test_no_wiring_at_all(value):
    with pytest.raises(FileError, match="expected"):
        decode_layers(value)


def test_wiring_of_files_that_name_one_site():
    value = encode_layer(chain_layer(z_sites=()))
    older = {key: v for key, v in value.items() if key not in ADDED} | {"z_site": None}
    assert_same(decode_one(older), chain_layer(z_sites=()))


def test_two_layers_of_one_name():
    value = encode_layer(chain_layer())
    with pytest.raises(FileError, match="a layer name is 'a', expected different"):
        decode_layers([value, value])


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 70) | st.just(math.inf) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)


@given(data=st.data())
def test_arbitrary_damage_is_a_file_error_or_harmless(data):
    value = encode_layer(chain_layer())
    paths = [(key,) for key in value]
    paths += [("consumers", 0, key) for key in value["consumers"][0]]
    paths += [("z_sites", 0, key) for key in value["z_sites"][0]]
    paths += [(*COLUMNS, "runs"), (*COLUMNS, "runs", 0), HIDDEN]
    paths += [(*COLUMNS, "runs", 0, i) for i in range(4)]
    damaged = at(value, data.draw(st.sampled_from(paths)), data.draw(json_values))
    try:
        layer = decode_one(damaged)
    except FileError:
        return
    assert layer.hidden.shape == (layer.n_units,)
    assert all(
        int(c.unit_of_column.max()) < layer.n_units
        for c in layer.consumers
        if len(c.unit_of_column)
    )
