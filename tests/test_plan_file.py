import json
import math
from dataclasses import replace

import pytest
import torch
from helpers import made_plan
from hypothesis import given
from hypothesis import strategies as st

from fastplastic.errors import FastPlasticError, FileError
from fastplastic.planning import Plan
from fastplastic.wiring import Consumer, Coupling, Norm, UnitLayer


def layer(name: str, n_units: int, **arguments) -> UnitLayer:
    fields = {
        "name": name, "kind": "conv", "weight": f"{name}.weight", "bias": None, "unit_dim": 0,
        "n_units": n_units, "norm": None, "activations": ((0, n_units, "relu"),),
        "hidden": torch.ones(n_units, dtype=torch.bool),
    }  # fmt: skip
    return UnitLayer(**{**fields, **arguments})


def example() -> Plan:
    lead = layer(
        "conv", 6, hidden=torch.tensor([True] * 5 + [False]), norms=(Norm("bn", torch.arange(6)),),
        coupled=(Coupling("depthwise", torch.tensor([0, 1, 2, 3, 4, -1])),),
        consumers=(Consumer("fc", "fc.weight", 1, 1, torch.arange(6).repeat_interleave(4)),),
    )  # fmt: skip
    return made_plan(
        units={"conv": torch.tensor([1, 4]), "fc": torch.tensor([0])},
        scores={
            "conv": torch.tensor([0.1, 1 / 3], dtype=torch.float64),
            "fc": torch.tensor([5e-324], dtype=torch.float64),
        },
        wiring={"conv": lead, "depthwise": layer("depthwise", 5), "fc": layer("fc", 3)},
        eligible=8,
        criterion="dormant",
        ratio=0.4,
        threshold=None,
        scope="global",
        granularity="unit",
        max_layer_fraction=0.5,
        seed=7,
        fingerprint="f00d",
        notes=('a "note" with ümlauts',),
    )


SIMPLE = ("eligible", "criterion", "ratio", "threshold", "scope", "granularity",
          "max_layer_fraction", "seed", "fingerprint", "notes", "count")  # fmt: skip


def same(one: Plan, two: Plan) -> bool:
    return (
        all(getattr(one, name) == getattr(two, name) for name in SIMPLE)
        and list(one.units) == list(two.units)
        and all(torch.equal(one.units[name], two.units[name]) for name in one.units)
        and all(torch.equal(one.scores[name], two.scores[name]) for name in one.units)
        and repr(one.wiring) == repr(two.wiring)
    )


@pytest.fixture
def path(tmp_path):
    return tmp_path / "plan.json"


def test_a_plan_comes_back_as_it_was(path):
    example().save(path)
    assert same(Plan.load(path), example())
    assert [entry.name for entry in path.parent.iterdir()] == ["plan.json"]


@given(
    scores=st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=2, max_size=2),
    threshold=st.floats(allow_nan=False, allow_infinity=False),
    seed=st.integers(-(2**70), 2**70),
)
def test_numbers_come_back_bit_for_bit(tmp_path_factory, scores, threshold, seed):
    path = tmp_path_factory.mktemp("plans") / "plan.json"
    made = example()
    request = replace(made.request, ratio=None, threshold=threshold, seed=seed)
    made = replace(made, request=request)
    made.scores["conv"][:] = torch.tensor(scores, dtype=torch.float64)
    made.save(path)
    loaded = Plan.load(path)
    assert same(loaded, made)
    assert [math.copysign(1, x) for x in loaded.scores["conv"]] == [
        math.copysign(1, x) for x in scores
    ]


def test_a_plan_can_be_read_by_a_person(path):
    example().save(path)
    lines = path.read_text(encoding="utf-8").splitlines()
    assert '  "criterion": "dormant",' in lines and '  "count": 3,' in lines
    shown = '    {"name": "conv", "units": [1, 4], "scores": [0.1, 0.3333333333333333]},'
    assert shown in lines
    assert len(lines) < 30


def test_an_existing_file_stays_unless_forced(path):
    path.write_text("old")
    with pytest.raises(FileError, match="exists"):
        example().save(path)
    assert path.read_text() == "old"
    example().save(path, force=True)
    assert same(Plan.load(path), example())


def test_a_plan_that_cannot_be_written_leaves_the_old_file(path):
    path.write_text("old")
    made = replace(example(), scores={"conv": torch.tensor([0.0, math.nan]), "fc": torch.zeros(1)})
    with pytest.raises(ValueError, match="not JSON compliant"):
        made.save(path, force=True)
    assert path.read_text() == "old" and len(list(path.parent.iterdir())) == 1


def test_units_in_any_order_are_sorted_with_their_scores(path):
    values = encoded(path)
    values["layers"][0] |= {"units": [4, 0, 1], "scores": [0.25, 2, 0.5]}
    loaded = reload(path, values)
    assert loaded.units["conv"].tolist() == [0, 1, 4]
    assert loaded.scores["conv"].tolist() == [2.0, 0.5, 0.25]
    assert loaded.count == 4


def test_units_can_be_taken_out_by_hand(path):
    values = encoded(path)
    values["layers"][0] |= {"units": [], "scores": []}
    loaded = reload(path, values)
    assert list(loaded.units) == ["fc"] and loaded.count == 1
    assert loaded.notes[1:] == ("the plan says count 3, its layers have 1: those are taken",)


def test_what_was_added_by_hand_and_is_not_read_is_named(path):
    values = encoded(path)
    assert reload(path, values).notes == example().notes
    values["treshold"] = 3
    values["layers"][0]["unit"] = [5]
    assert reload(path, values).notes[1:] == (
        "the plan has keys that are not read: 'treshold', 'unit' of 'conv'",
    )
    # Of another granularity, and so never looked at.
    values["masks"] = 3
    for key in "abc":
        values[key * 99] = 0
    assert reload(path, values).notes[1].endswith(", ...")


def encoded(path) -> dict:
    example().save(path, force=True)
    return json.loads(path.read_text(encoding="utf-8"))


def reload(path, values) -> Plan:
    path.write_text(values if isinstance(values, str) else json.dumps(values), encoding="utf-8")
    return Plan.load(path)


# Rows 1 to 5 for units 0 to 4; the coupled layer has rows 0 to 4.
ROWS_BEYOND = {"size": 6, "runs": [[0, 1, 5, 1]]}


def edit(*keys):
    """Return a function that sets values[keys[0]][...] = keys[-1] in a plan's JSON."""

    def apply(values):
        *path, last, value = keys
        for key in path:
            values = values[key]
        values[last] = value

    return apply


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            edit("layers", 0, "units", [1, 6]),
            "units of layer 'conv' is 6, expected an integer in",
        ),
        (
            edit("layers", 0, "units", [1, -1]),
            "units of layer 'conv' is -1, expected an integer",
        ),
        (edit("layers", 0, "units", [1, 1]), "units of layer 'conv' is 1, expected each unit once"),
        (edit("layers", 0, "units", [1, 5]), "units of layer 'conv' is 5, expected units that can"),
        (edit("layers", 0, "units", [1, True]), "units of layer 'conv' is True, expected an integ"),
        (edit("layers", 0, "units", [1, 2.0]), "units of layer 'conv' is 2.0, expected an integer"),
        (edit("layers", 0, "units", [1, 10**30]), "expected an integer in 0..5"),
        (edit("layers", 0, "units", "all"), "'units' is 'all', expected a list of integers"),
        (edit("layers", 0, "scores", [1]), "'scores' is [1], expected a list of 2 numbers"),
        (edit("layers", 0, "scores", [1, "2"]), "expected a list of 2 numbers, one per unit"),
        (edit("layers", 0, "scores", [1, 10**400]), "expected a list of 2 numbers, one per unit"),
        (edit("layers", 0, "name", "convv"), "'name' is 'convv', expected a layer of 'wiring'"),
        (edit("layers", 1, "name", "conv"), "layer is 'conv', expected named once"),
        (edit("layers", 0, 3), "an element of 'layers' is 3, expected an object"),
        (edit("layers", {}), "'layers' is {}, expected a list"),
        (edit("wiring", 0, "coupled", 0, "name", "gone"), "coupled layer of 'conv' is 'gone'"),
        (edit("wiring", 1, "n_units", 3), "'depthwise'"),
        (edit("wiring", 0, "coupled", 0, "row_of_unit", ROWS_BEYOND), "row of 'depthwise' is 5"),
        (edit("wiring", []), "'name' is 'conv', expected a layer of 'wiring'"),
        (edit("wiring", 7), "expected"),
        (edit("schema_version", 2), "schema_version is 2, expected 1: write the plan again with"),
        (edit("schema_version", True), "schema_version is True, expected 1"),
        (edit("kind", "profile"), "is JSON but not a plan, expected kind 'fastplastic plan'"),
        (edit("fingerprint", 5), "'fingerprint' is 5, expected a string"),
        (edit("criterion", "deed"), "'criterion' is 'deed', expected one of dead, frozen,"),
        (edit("granularity", "weight"), "'granularity' is 'weight', expected 'unit'"),
        (edit("scope", None), "'scope' is None, expected 'layer' or 'global'"),
        (edit("ratio", 1.5), "'ratio' is 1.5, expected null or in (0, 1]"),
        (edit("ratio", None), "neither of ratio and threshold given, expected exactly one"),
        (edit("threshold", 1), "both of ratio and threshold given, expected exactly one"),
        (edit("threshold", "low"), "'threshold' is 'low', expected null or a number"),
        (edit("max_layer_fraction", 0), "'max_layer_fraction' is 0, expected in (0, 1]"),
        (edit("eligible", 2), "'eligible' is 2, expected an integer from 3 on"),
        (edit("count", -1), "'count' is -1, expected an integer from 0 on"),
        (edit("count", "3"), "'count' is '3', expected an integer from 0 on"),
        (edit("beyond", 0.5), "'beyond' is 0.5, expected null or a count"),
        (edit("seed", 1.5), "'seed' is 1.5, expected an integer"),
        (edit("notes", [1]), "'notes' is [1], expected a list of strings"),
        (lambda values: values.pop("seed"), "'seed' is 'missing', expected an integer"),
        (lambda values: values.pop("wiring"), "expected"),
    ],
)
def test_an_inconsistent_plan_is_refused_in_one_line(path, change, text):
    values = encoded(path)
    change(values)
    with pytest.raises(FileError) as caught:
        reload(path, values)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and text in message and "\n" not in message
    assert len(message) < 600


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "is not a plan in JSON"),
        ("hello", "is not a plan in JSON"),
        ("[1, 2]", "is JSON but not a plan"),
        ("null", "is JSON but not a plan"),
        ("[" * 100_000, "is not a plan in JSON"),
        ('{"a":' * 100_000, "is not a plan in JSON"),
        ('{"kind": "fastplastic plan", "seed": ' + "9" * 5000 + "}", "is not a plan in JSON"),
        ('{"kind": "fastplastic plan", "ratio": NaN}', "NaN is not a number in JSON"),
        ('{"kind": 1, "kind": 2}', "'kind' stands twice in one object"),
    ],
    ids=lambda value: value[:20],
)
def test_what_is_not_a_plan_is_refused_in_one_line(path, text, reason):
    with pytest.raises(FileError) as caught:
        reload(path, text)
    message = str(caught.value)
    assert reason in message and "\n" not in message and len(message) < 400


def test_a_number_beyond_the_floats_is_refused(path):
    text = json.dumps(encoded(path)).replace('"ratio": 0.4', '"ratio": 1e999')
    with pytest.raises(FileError, match="'ratio' is inf, expected null or in"):
        reload(path, text)


@pytest.mark.parametrize("end", [1, 100, 700, -3])
def test_a_truncated_plan_is_refused(path, end):
    example().save(path)
    text = path.read_text(encoding="utf-8")
    with pytest.raises(FileError, match="is not a plan in JSON"):
        reload(path, text[:end])


def test_files_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(FileError, match=r"none\.json: cannot be read \(No such file"):
        Plan.load(tmp_path / "none.json")
    with pytest.raises(FileError, match=r"cannot be read \(Is a directory\)"):
        Plan.load(tmp_path)
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00{")
    with pytest.raises(FileError, match=r"bytes\.json: is not text, expected a plan file"):
        Plan.load(tmp_path / "bytes.json")


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=10,
)


@given(data=st.data(), replacement=anything)
def test_any_replaced_value_loads_or_is_refused_as_ours(tmp_path_factory, data, replacement):
    path = tmp_path_factory.mktemp("plans") / "plan.json"
    values = encoded(path)
    node, keys = values, list(values)
    while True:
        key = data.draw(st.sampled_from(keys))
        child = node[key]
        deeper = isinstance(child, dict | list) and child
        if not deeper or data.draw(st.booleans()):
            node[key] = replacement
            break
        node, keys = child, list(child) if isinstance(child, dict) else list(range(len(child)))
    try:
        loaded = reload(path, values)
    except FastPlasticError as error:
        assert "\n" not in str(error)
    else:
        for name, units in loaded.units.items():
            assert loaded.wiring[name].hidden[units].all()
