"""What a notebook shows of the results, and the layers of a profile as a DataFrame."""

import math
import sys
from dataclasses import replace

import pytest
import torch
from helpers.compared import a_layer, a_profile
from helpers.pages import parsed, renamed, small_profile

import fastplastic
from fastplastic.comparison import compare_figures
from fastplastic.errors import InputError
from fastplastic.files import figures_of
from fastplastic.measure import flat_rows
from fastplastic.reinit import ReinitReport
from fastplastic.reinit.report import Written
from fastplastic.trials.record import ArmResult, Trial
from fastplastic.trials.statistics import Estimate

EVIL = "<script>&amp;"


@pytest.fixture(scope="module")
def profile():
    return small_profile()


def table_of(result):
    page = parsed(result._repr_html_())
    assert not page.all("script")
    rows = [[cell.text for cell in row.inside] for row in page.one("tbody").all("tr")]
    return page.one("b").text, [head.text for head in page.all("th")], rows, page


def test_a_profile(profile):
    caption, titles, rows, _ = table_of(profile)
    assert caption == repr(profile)
    assert titles == list(profile.layers[0].to_dict())
    assert [row[0] for row in rows] == [layer.name for layer in profile]
    first = dict(zip(titles, rows[1], strict=True))
    dead = int(profile["first"].dead.sum())
    assert dead >= 3
    assert (first["name"], first["units"], first["dead"]) == ("first", "12", str(dead))


def test_a_long_profile_shows_its_worst_layers_in_their_order(profile):
    healthy, sick = profile["narrow"], profile["first"]
    assert not (healthy.dead | healthy.dormant).any()
    layers = [
        replace(layer, wiring=replace(layer.wiring, name=f"layer{at:02}"))
        for at, layer in enumerate([healthy, sick] * 20)
    ]
    long = replace(profile, layers=tuple(layers), notes=("look here",))
    _, _, rows, page = table_of(long)
    names = [row[0] for row in rows]
    assert len(names) == 30 and names == sorted(names)
    assert {f"layer{at:02}" for at in range(1, 40, 2)} <= set(names)
    texts = [p.text for p in page.all("p")[1:]]
    assert texts == ["10 layers not shown: none is worse; to_dict() has all", "look here"]


def test_numbers_that_are_not_known(profile):
    first, *others = profile.layers
    unseen = replace(first, stats=type(first.stats)(torch.zeros_like(first.stats.table)))
    _, titles, rows, _ = table_of(replace(profile, layers=(unseen, *others)))
    assert rows[0][titles.index("dead")] == "-"


def test_a_plan(profile):
    plan = fastplastic.plan(profile, ratio=0.2)
    caption, titles, rows, page = table_of(plan)
    assert caption == repr(plan)
    assert titles == ["layer", "units", "chosen", "lowest score", "highest score"]
    assert {row[0]: int(row[2]) for row in rows} == plan.counts
    assert [p.text for p in page.all("p")[1:]] == list(plan.notes)


def test_a_plan_of_weights(profile):
    masks = {"first.weight": torch.tensor([True, False, True])}
    plan = replace(fastplastic.plan(profile, ratio=0.2), units={}, scores={}, masks=masks)
    _, titles, rows, _ = table_of(plan)
    assert (titles, rows) == (["parameter", "weights", "chosen"], [["first.weight", "3", "2"]])


def test_a_report():
    written = (Written(EVIL, "parameter", 1500, 6000),)
    report = ReinitReport(3, {"a": 3}, {"a": 0.1}, "unit", "default", "zero", 0, written)
    caption, titles, rows, _ = table_of(report)
    assert caption == repr(report)
    assert titles == ["tensor", "kind", "written", "of", "share"]
    assert rows == [[EVIL, "parameter", "1,500", "6,000", "0.25"]]


def test_a_trial():
    many, one = Estimate(0.5, 0.4, 0.6, 2), Estimate(0.55, None, None, 1)
    arm = ArmResult(
        EVIL, "reinit", (0, 1), 0, (0, 1), (0.1, 0.5), (1.0, 0.5), many, one, one, None, None, 0,
        (), (), (), (), None, None, 12.0,
    )  # fmt: skip
    trial = Trial((arm, replace(arm, name="b", final=one)), (), {}, ("it helps",), None, (EVIL,))
    _, titles, rows, page = table_of(trial)
    assert titles == ["arm", "runs", "end", "from", "to", "best", "units or weights"]
    assert rows == [
        [EVIL, "2", "0.5", "0.4", "0.6", "0.55", "12"],
        ["b", "2", "0.55", "-", "-", "0.55", "12"],
    ]
    assert [p.text for p in page.all("p")[1:]] == ["it helps", EVIL]


def test_names_are_text_and_nothing_else(profile):
    evil = renamed(profile, EVIL)
    assert "<script" not in evil._repr_html_() and "&amp;amp;" in evil._repr_html_()
    _, _, rows, page = table_of(evil)
    assert rows[1][0] == page.all("p")[-1].text == EVIL


def test_a_data_frame_of_the_layers(profile):
    frame = profile.to_pandas()
    assert list(frame.columns) == list(profile.layers[0].to_dict())
    assert frame.to_dict("records") == profile.to_dict()["layers"]


def test_a_data_frame_without_all_numbers(profile):
    first, *others = profile.layers
    unseen = replace(first, stats=type(first.stats)(torch.zeros_like(first.stats.table)))
    frame = replace(profile, layers=(unseen, *others)).to_pandas()
    assert math.isnan(frame["dead"][0])
    assert frame["dead"][1] == int(profile["first"].dead.sum())


def test_without_pandas(profile, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(InputError) as error:
        profile.to_pandas()
    expected = "to_pandas needs pandas: pip install pandas, or take to_dict()['layers']"
    assert str(error.value) == expected


def test_rows_have_the_same_columns():
    rows = flat_rows(
        [
            {"name": "a", "units": 3, "unknown": {"odd": 2, "new": 1}},
            {"name": "b", "units": 4, "tied": ["c", "d"], "ranks": {"srank": 1, "units": 4}},
        ]
    )
    assert rows == [
        {
            "name": "a", "units": 3, "unknown": "odd (2); new (1)", "tied": None,
            "ranks.srank": None, "ranks.units": None,
        },
        {
            "name": "b", "units": 4, "unknown": None, "tied": "c; d", "ranks.srank": 1,
            "ranks.units": 4,
        },
    ]  # fmt: skip
    assert len({tuple(row) for row in rows}) == 1


def test_a_comparison_shows_the_course_of_every_figure():
    before = a_profile(a_layer("stem", 10, dead=1), a_layer("conv", 1000))
    after = a_profile(a_layer("stem", 10, dead=1), a_layer("conv", 2000, dead=500), data=EVIL)
    found = compare_figures([figures_of(before), figures_of(after)], [None, None])
    caption, titles, rows, page = table_of(found)
    assert caption == repr(found)
    assert titles[:5] == ["layer", "units", "dead", "frozen", "dormant"]
    assert rows[0][:4] == ["in all", "1,010 → 2,010", "0.00099 → 0.249", "0"]
    assert rows[1][:3] == ["conv", "1,000 → 2,000", "0 → 0.25"]
    assert rows[2][:3] == ["stem", "10", "0.1"]
    assert [p.text for p in page.all("p")[1:]] == list(found.notes)


def test_a_long_comparison_shows_what_changed_most():
    names = [f"l{at:02}" for at in range(25)]
    before = a_profile(*(a_layer(name, 100) for name in names))
    after = a_profile(*(a_layer(name, 100, dead=at) for at, name in enumerate(names)))
    found = compare_figures([figures_of(before), figures_of(after)], [None, None])
    _, _, rows, page = table_of(found)
    assert [row[0] for row in rows] == ["in all", *names[:4:-1]]
    assert page.all("p")[1].text == "5 layers not shown: none changed more"
