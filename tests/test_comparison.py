"""What changed between profiles, as values."""

import json

import pytest
from helpers.compared import a_layer, a_profile, written
from helpers.profiled import data, net

import fastplastic
from fastplastic import compare, profile
from fastplastic.errors import FileError, InputError


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def compared(*values):
    return compare(*(written(own, f"{number}.json") for number, own in enumerate(values)))


def test_two_profiles_of_a_model():
    before = a_profile(a_layer("stem", 4, dead=1), a_layer("conv", 8, dormant=2))
    after = a_profile(
        a_layer("stem", 4, dead=1), a_layer("conv", 8, dead=4, saturated_fraction=0.75)
    )
    found = compared(before, after)
    assert isinstance(found, fastplastic.ProfileComparison) and not found.notes
    assert [layer.name for layer in found] == ["stem", "conv"] and len(found) == 2
    assert found["conv"].dead.values == (0.0, 0.5) and found["conv"].dead.change == 0.5
    assert found["conv"].dormant.values == (0.25, 0.0) and found["conv"].dormant.change == -0.25
    assert found["conv"].saturated.change == 0.25
    assert found["stem"].dead.values == (0.25, 0.25) and found["stem"].dead.change == 0
    assert found.totals.units == (12, 12)
    assert found.totals.dead.values == (1 / 12, 5 / 12)
    assert found.totals.saturated.values == (0.5, (4 * 0.5 + 8 * 0.75) / 12)
    assert [layer.name for layer in found.most_changed()] == ["conv", "stem"]
    assert repr(found).startswith("ProfileComparison(2 profiles, 2 layers in all, 0 in some; ")


def test_a_difference_of_shares_has_no_rounding():
    layers = [a_layer("conv", 100, dead=dead) for dead in (5, 7)]
    assert 0.07 - 0.05 != 0.02
    assert compared(*map(a_profile, layers))["conv"].dead.change == 0.02


def test_layers_that_changed_alike_keep_the_order_of_the_model():
    names = ("c", "a", "d", "b")
    before = a_profile(*(a_layer(name) for name in names))
    after = a_profile(*(a_layer(name, dead=int(name == "d")) for name in names))
    ordered = [layer.name for layer in compared(before, after).most_changed()]
    assert ordered == ["d", "c", "a", "b"]


def test_a_layer_that_changed_on_the_way_comes_before_one_that_did_not():
    epochs = [a_profile(a_layer("a"), a_layer("b", dead=dead)) for dead in (0, 3, 0)]
    found = compared(*epochs)
    assert found["b"].dead.values == (0, 0.375, 0) and found["b"].dead.change == 0
    assert [layer.name for layer in found.most_changed()] == ["b", "a"]


def test_what_is_unknown_stays_unknown():
    unknown = a_layer("conv", dead=None, saturated_fraction=None)
    found = compared(
        a_profile(unknown, a_layer("fc", 4, dead=1)),
        a_profile(a_layer("conv", dead=4), a_layer("fc", 4, dead=1)),
    )
    assert found["conv"].dead.values == (None, 0.5) and found["conv"].dead.change is None
    # Of the units that it is known of.
    assert found.totals.dead.values == (0.25, 5 / 12)
    nothing = compared(a_profile(unknown), a_profile(a_layer("conv")))
    assert nothing.totals.dead.values == (None, 0.0) and nothing.totals.dead.change is None


def test_related_models_are_compared_by_shares():
    small = a_profile(a_layer("stem", 4, dead=1), a_layer("a.conv", 8), model="net-s")
    large = a_profile(a_layer("stem", 8, dead=2), a_layer("b.conv", 8), model="net-l")
    found = compared(small, large)
    assert found["stem"].units == (4, 8) and found["stem"].dead.change == 0
    assert [(layer.name, layer.only_in) for layer in found.unmatched] == [
        ("a.conv", ("A",)), ("b.conv", ("B",)),
    ]  # fmt: skip
    assert found.notes == (
        "the model differs (net-s in A, net-l in B): layers are matched by their names",
        "1 of 1 layers differs in the number of units: compare the shares there, not the counts",
    )


def test_of_three_a_layer_in_two_is_not_compared():
    found = compared(
        a_profile(a_layer("a"), a_layer("b")), a_profile(a_layer("a")),
        a_profile(a_layer("a"), a_layer("b"), a_layer("c")),
    )  # fmt: skip
    assert [layer.name for layer in found] == ["a"]
    assert [(layer.name, layer.only_in) for layer in found.unmatched] == [
        ("b", ("A", "C")), ("c", ("C",)),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("key", "value", "note"),
    [
        (
            "data", "noise",
            "the data differs (sample in A, noise in B): which units are dead, dormant or "
            "saturated depends on the data",
        ),
        (
            "data", None,
            "B does not name its data: whether they are the same cannot be told",
        ),
        (
            "samples", 256,
            "the number of samples differs (16 in A, 256 in B): with more samples fewer units are "
            "dead or frozen",
        ),
        (
            "mode", "train",
            "the mode differs (eval in A, train in B): norms and dropout work in another way in "
            "train mode, and other units count as dead",
        ),
        (
            "dtype", "bfloat16",
            "the dtype differs (float32 in A, bfloat16 in B): rounding changes which units seem to "
            "be constant",
        ),
        (
            "seed", 1,
            "the seed differs (0 in A, 1 in B): what was drawn at random, such as weights, noise "
            "or dropout, is not the same",
        ),
        ("weights", "pretrained", None),
        ("device", "cuda:0", None),
    ],
)  # fmt: skip
def test_what_makes_figures_differ_is_said(key, value, note):
    found = compared(a_profile(), a_profile(**{key: value}))
    assert found.notes == ((note,) if note else ())


def test_labels_go_on_after_z():
    path = written(a_profile())
    labels = [own.label for own in compare(*[path] * 55).profiles]
    assert labels[:2] == ["A", "B"] and labels[25:28] == ["Z", "AA", "AB"] and labels[54] == "BC"


def test_profiles_and_files_of_them_compare_alike():
    one, two = profile(net(), data()), profile(net(), data(batches=3))
    one.save("one.safetensors")
    two.save("two")
    written(two.to_dict(), "two.json")
    found = compare(one, two)
    assert found.totals == compare("one.safetensors", "two").totals
    assert found.layers == compare(one, "two.json").layers
    assert found.totals.dead.values == tuple(
        own.totals.dead / own.totals.units for own in (one, two)
    )
    first = found.profiles[0]
    assert (first.label, first.name, first.model, first.samples) == ("A", None, None, 10)
    assert compare("one.safetensors", one).profiles[0].name == "one.safetensors"


def test_the_json_says_all():
    found = compared(a_profile(), a_profile(a_layer("stem", 4), a_layer("new", dead=1)))
    values = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert list(values) == [
        "schema_version", "fastplastic_version", "profiles", "notes", "totals", "layers",
        "unmatched",
    ]  # fmt: skip
    assert values["schema_version"] == 1
    assert values["profiles"][1] == {
        "label": "B", "name": "1.json", "model": "net", "weights": "random", "data": "sample",
        "device": "cpu", "dtype": "float32", "mode": "eval", "samples": 16, "seed": 0, "layers": 2,
        "fastplastic_version": "0.1.0",
    }  # fmt: skip
    (layer,) = values["layers"]
    assert list(layer) == [
        "name", "units", "dead", "frozen", "dormant", "saturated", "mean_abs_activation",
        "mean_abs_gradient",
    ]  # fmt: skip
    assert layer["name"] == "stem" and layer["units"] == [4, 4]
    assert layer["saturated"] == {"values": [0.5, 0.5], "change": 0.0}
    assert values["unmatched"][0] == {"name": "block.conv", "only_in": ["A"]}


def test_what_cannot_be_compared():
    path = written(a_profile())
    with pytest.raises(InputError, match=r"^1 to compare: expected two profiles or more$"):
        compare(path)
    with pytest.raises(InputError, match=r"^int cannot be compared: expected a Profile or the pa"):
        compare(path, 3)
    other = written(a_profile(a_layer("other")), "other.json")
    with pytest.raises(InputError) as caught:
        compare(path, other)
    assert str(caught.value) == (
        "no layer is in all 2 profiles (the first of each: 'stem', 'other'): expected profiles of "
        "one model, or of models whose layers have the same names"
    )
    with pytest.raises(InputError, match=r"^no layer 'stm' among 2: did you mean stem\?$"):
        compare(path, path)["stm"]


def test_files_that_are_no_profiles():
    path = written(a_profile())
    for name in ("none.json", "none.safetensors"):
        with pytest.raises(FileError) as caught:
            compare(path, name)
        assert str(caught.value) == f"{name}: no such file, expected a profile: check the path"
    with open("broken.safetensors", "wb") as file:
        file.write(b"broken")
    with pytest.raises(FileError, match=r"^broken.safetensors: cannot be read \("):
        compare(path, "broken.safetensors")


def test_a_saved_profile_whose_table_is_damaged():
    found = profile(net(), data())
    found.save("good.safetensors")
    found.layers[0].stats.table[:] = float("nan")
    found.save("bad.safetensors")
    with pytest.raises(FileError) as caught:
        compare("good.safetensors", "bad.safetensors")
    assert str(caught.value) == (
        "bad.safetensors: layer 'conv': 'saturated_fraction' is nan, expected null or a number in "
        "0..1; the file is damaged: profile the model again"
    )


def test_other_batches_of_the_same_data_are_said():
    same = [a_profile(a_layer("a")) | {"data_sha256": "aa"} for _ in range(2)]
    other = same[0] | {"data_sha256": "bb"}
    assert compared(*same).notes == compared(same[0], a_profile(a_layer("a"))).notes == ()
    (note,) = compared(same[0], other).notes
    assert note.startswith("the batches differ, though the name of the data does not")
    # What names them differently says it already.
    (note,) = compared(same[0], other | {"data": "photos"}).notes
    assert note.startswith("the data differs")


def test_a_head_that_was_lent_is_said():
    own = a_profile(a_layer("a"))
    found = compared(own | {"lent_head": "fresh, of 10 classes"}, own | {"lent_head": None})
    assert found.notes == (
        "a fresh head was lent for the loss in A: its gradients say little, and mean|g| is "
        "not to be compared",
    )
