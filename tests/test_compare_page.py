"""The page of `fastplastic compare --html`: what stands in it, and that it is the comparison."""

import json
import re
import shlex
from pathlib import Path

import pytest
from helpers.compared import a_layer, a_profile, written
from helpers.pages import parsed
from helpers.program import refused

from fastplastic.cli.page import Origin, changes_view, page_text
from fastplastic.cli.page.tracks import Decades, track
from fastplastic.comparison import METRICS, SHARES, check_gates, compare_figures, parse_gates
from fastplastic.files import figures_of

ORIGIN = Origin("fastplastic compare a b", (("fastplastic", "1"), ("torch", "2"), ("Py", "3")), "")
EVIL = "<script>alert('1')</script>\"&amp; {{ 7 * 7 }}"
BEFORE = a_profile(
    a_layer("stem", 10, dead=1, mean_abs_gradient=1e-3), a_layer("conv", 20), a_layer("old")
)
BETWEEN = a_profile(a_layer("stem", 10, dead=2), a_layer("conv", 20, dead=4), samples=32)
AFTER = a_profile(
    a_layer("stem", 10, dead=1, mean_abs_gradient=2e-5), a_layer("conv", 40, dead=10, dormant=10),
    model="wide net", data="DIR",
)  # fmt: skip
# Of this layer nothing is known.
BLIND = dict.fromkeys(("dead", "frozen", "dormant", "saturated_fraction", "mean_abs_gradient"))


def compared(*profiles):
    figures = [figures_of(own) for own in profiles]
    return compare_figures(figures, [f"{at}.json" for at in range(len(figures))]), figures


def page_of(*profiles, gates=()):
    found, figures = compared(*profiles)
    results = check_gates(parse_gates(gates), figures)
    return parsed(page_text(changes_view(found, results, ORIGIN))), found


def rows_of(page, section):
    rows = page.one("section", id=section).one("tbody").all("tr")
    return {row.one("th").text: row for row in rows}


def texts(row):
    return [cell.text for cell in row.all("td")]


def test_sections_stand_in_their_order():
    page, _ = page_of(BEFORE, AFTER)
    names = [found.attributes["id"] for found in page.all("section")]
    assert names == ["totals", "otherwise", "picture", "table", "reproduce"]
    assert page.one("title").text == "net and wide net: what changed"
    assert page.one("h1").text == "What changed in net and wide net"


def test_totals_stand_side_by_side():
    page, _ = page_of(BEFORE, BETWEEN, AFTER)
    rows = rows_of(page, "totals")
    assert texts(rows["units"]) == ["38", "30", "50", "+12"]
    assert texts(rows["dead"]) == ["2.6 %", "20.0 %", "22.0 %", "+19.4 ▲"]
    assert texts(rows["frozen"]) == ["0.0 %"] * 3 + ["0.0"]
    assert "change: C minus A, for shares" in page.one("section", id="totals").text
    assert "C minus A, for shares" in page.one("section", id="table").text
    assert "ring: A, square: C, strokes: those between" in page.one("section", id="picture").text
    classes = [row.all("td")[-1].attributes.get("class") for row in rows.values()]
    assert classes == [None, None, "worse", None, "worse", None, None, None]
    assert texts(rows_of(page_of(AFTER, BEFORE)[0], "totals")["dead"])[-1] == "-19.4 ▼"


def test_what_else_differs_is_said_and_marked():
    page, found = page_of(BEFORE, BETWEEN, AFTER)
    section = page.one("section", id="otherwise")
    assert [line.text for line in section.one("ul").all("li")] == list(found.notes)
    rows = {name.removesuffix(" differs"): row for name, row in rows_of(page, "otherwise").items()}
    assert texts(rows["data"]) == ["sample", "sample", "DIR"]
    assert texts(rows["samples"]) == ["16", "32", "16"]
    marked = [name for name, row in rows.items() if row.all("span", **{"class": "tag other"})]
    assert marked == ["model", "data", "samples", "layers"]
    only = section.one("dl")
    assert (only.one("dt").text, only.one("dd").text) == ("only in A", "old")
    same, _ = page_of(BEFORE, BEFORE)
    section = same.one("section", id="otherwise")
    assert "Nothing that is known to change the figures" in section.text
    assert (
        not section.all("ul")
        and not section.all("dl")
        and "differs" not in section.one("table").text
    )


def test_values_of_the_table_are_those_of_the_json():
    page, found = page_of(BEFORE, BETWEEN, AFTER)
    rows = rows_of(page, "table")
    assert list(rows) == ["stem", "conv"]
    for layer in found.to_dict()["layers"]:
        _, units, largest, *figures = rows[layer["name"]].all("td")
        assert json.loads(units.attributes["data-v"]) == layer["units"][-1]
        changes = [abs(layer[metric]["change"]) for metric in SHARES]
        assert json.loads(largest.attributes["data-v"]) == max(changes)
        for metric, cell in zip(METRICS, figures, strict=True):
            assert json.loads(cell.attributes["data-v"]) == layer[metric]["change"]
    conv = texts(rows["conv"])[1:]
    assert conv[:3] == ["20 → 40", "25.0", "+25.00.0 % → 20.0 % → 25.0 %"]
    assert texts(rows["stem"])[-1] == "-0.000980.001 → 1e-06 → 2e-05"
    assert texts(rows["stem"])[-2] == "00.25"


def test_layers_that_changed_are_marked_also_if_they_changed_back():
    back = a_profile(a_layer("stem", 10, dead=1), a_layer("conv", 20), a_layer("same", 5))
    page, _ = page_of(back, a_profile(a_layer("stem", 10), *map(a_layer, ["conv", "same"])), back)
    marked = [row.attributes.get("class") for row in rows_of(page, "table").values()]
    assert marked == ["marked", None, None]


def test_what_is_not_known_is_no_number():
    page, _ = page_of(a_profile(a_layer("stem", **BLIND)), a_profile(a_layer("stem", 8, dead=4)))
    _, _, largest, dead, *_ = rows_of(page, "table")["stem"].all("td")
    assert (dead.text, dead.attributes["data-v"]) == ("-- → 50.0 %", "")
    assert largest.text == "0.0"
    drawing = rows_of(page, "picture")["stem"].all("svg")[0]
    assert drawing.attributes["aria-label"] == "dead: - → 50.0 %"
    assert [path.attributes["class"] for path in drawing.all("path")] == ["base", "last"]


def test_the_picture_says_in_words_what_it_shows():
    page, _ = page_of(BEFORE, BETWEEN, AFTER)
    rows = rows_of(page, "picture")
    words = [drawing.attributes["aria-label"] for drawing in rows["conv"].all("svg")]
    assert words == [
        "dead: 0.0 % → 20.0 % → 25.0 %", "frozen: 0.0 %", "dormant: 0.0 % → 0.0 % → 25.0 %",
        "sat: 50.0 %", "mean|g|: 1e-06",
    ]  # fmt: skip
    paths = {
        x.attributes["class"]: x.attributes["d"] for x in rows["conv"].all("svg")[0].all("path")
    }
    assert list(paths) == ["base", "span", "between", "first", "last"]
    assert paths["span"] == "M6.0 9H31.0" and paths["between"] == "M26.0 6v6"
    assert paths["first"].startswith("M2 9a4 4") and paths["last"].startswith("M31 4.5l4.5 4.5")
    heads = [head.text for head in page.one("section", id="picture").one("thead").all("th")]
    assert heads == [
        "layer", "dead0100 %", "frozen0100 %", "dormant0100 %", "sat0100 %", "mean|g|1e-61e-3",
    ]  # fmt: skip


def test_a_gradient_is_drawn_where_its_power_of_ten_stands():
    page, _ = page_of(BEFORE, AFTER)
    rows = rows_of(page, "picture")
    first, last = (
        rows["stem"].all("svg")[-1].one("path", **{"class": x}) for x in ("first", "last")
    )
    # From 1e-6 to 1e-3 over 100 pixels behind an edge of 6.
    assert first.attributes["d"].startswith("M102 9a4")
    assert last.attributes["d"].startswith("M49.4 4.5l")


def test_every_layer_that_is_only_in_some_is_named():
    many = [a_layer(f"old{at}") for at in range(20)]
    page, _ = page_of(a_profile(a_layer("stem"), *many), a_profile(a_layer("stem")))
    only = page.one("section", id="otherwise").one("dd").text
    assert only == ", ".join(layer["name"] for layer in many)


def test_gradients_stand_on_powers_of_ten():
    scale = Decades.of([1e-3, None, 0.0, 2e-6])
    assert (scale.low, scale.high) == (-6, -3)
    assert [scale.place(value) for value in (1e-6, 1e-3, 0.0)] == [0, 1, 0]
    assert scale.place(10**-4.5) == pytest.approx(0.5)
    assert Decades.of([]) == Decades(0, 1)
    assert Decades.of([1e-2, 1e-2]) == Decades(-2, -1)
    assert track([0.5, None, 0.5], "").span == track([None, 0.5], "").span == ""


def test_conditions_stand_at_the_top():
    page, _ = page_of(BEFORE, AFTER, gates=["dead>5%", "frozen>5%"])
    lines = page.one("header").all("div")
    facts = [(line.one("dt").text, line.one("dd").text) for line in lines]
    assert facts[:2] == [("A", "0.json"), ("B", "1.json")]
    assert [text[:14] for label, text in facts[2:]] == ["FAILED: dead>5", "passed: frozen"]


def test_names_of_others_are_text_and_nothing_else():
    evil = a_profile(a_layer(EVIL, dead=1), model=EVIL, data=EVIL, mode=EVIL)
    text = page_text(changes_view(compared(evil, a_profile(a_layer(EVIL)))[0], (), ORIGIN))
    page = parsed(text)
    assert len(page.all("script")) == 1
    assert EVIL in page.one("h1").text and EVIL in rows_of(page, "picture")
    assert "7 * 7" in text


def test_the_page_needs_no_network_and_names_its_only_script():
    text = page_text(changes_view(compared(BEFORE, AFTER)[0], (), ORIGIN))
    assert not re.findall(r"https?:|\bsrc=|@import|url\((?!#)", text)
    policy = parsed(text).one("meta", **{"http-equiv": "Content-Security-Policy"})
    assert policy.attributes["content"].startswith("default-src 'none'; script-src 'sha256-")


def test_the_program_writes_it(run):
    written(BEFORE, "a.json"), written(AFTER, "b.json")
    arguments = ["compare", "a.json", "b.json", "--html", "page.html", "-q", "--fail-if", "dead>1%"]
    assert run(*arguments).code == 4
    page = parsed(Path("page.html").read_text(encoding="utf-8"))
    command = page.one("section", id="reproduce").one("pre").text
    assert shlex.split(command) == ["fastplastic", *arguments]
    versions = [x.one("dt").text for x in page.one("section", id="reproduce").all("div")]
    assert versions == ["fastplastic", "Python"]
    assert "FAILED: dead>1%" in page.one("header").text
    refused(run(*arguments), 3, "page.html exists: give another name, or --force")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ("--html page.txt", "--html page.txt: expected a name that ends in .html or .htm"),
        ("--html a.html --json ./a.html", "two outputs are a.html: give each of them another"),
        ("--html a.htm --force", "--html a.htm is one of the profiles: name another file"),
    ],
)
def test_pages_that_cannot_be_written_are_refused(run, arguments, text):
    before = written(BEFORE, "a.htm").read_bytes()
    refused(run("compare", "a.htm", "b.json", *arguments.split()), 2, text)
    assert Path("a.htm").read_bytes() == before


def test_a_page_without_jinja2_is_refused_before_a_file_is_read(run, monkeypatch):
    monkeypatch.setattr("fastplastic.cli.page.write.find_spec", lambda name: None)
    text = "--html needs jinja2: pip install 'fastplastic[report]', or leave it out"
    refused(run("compare", "none.json", "none.json", "--html", "page.html"), 2, text)
