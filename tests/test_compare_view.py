"""What `fastplastic compare` shows, in any width."""

import io
import re

import pytest
from helpers.compared import a_layer, a_profile
from rich.console import Console

from fastplastic.cli import compare_view
from fastplastic.comparison import check_gates, compare_figures, parse_gates
from fastplastic.files import figures_of


def shown(*profiles, width=120, top=20, gates=(), **options):
    figures = [figures_of(own) for own in profiles]
    found = compare_figures(figures, [f"{number}.json" for number in range(len(figures))])
    results = check_gates(parse_gates(gates), figures)
    console = Console(file=io.StringIO(), width=width, highlight=False, **options)
    console.print(compare_view.comparison(found, results, width=width, top=top))
    return console.file.getvalue()


def table(output, title):
    """Return the lines of the table whose first column is called so."""
    lines = iter(output.splitlines())
    titles = next(line for line in lines if line.startswith(title))
    next(lines)
    rows = []
    for line in lines:
        if not line.strip():
            break
        rows.append(line)
    return titles.split(), rows


def epochs(number):
    return [a_profile(a_layer("stem", 100, dead=3 * n), a_layer("conv", 50)) for n in range(number)]


def test_every_profile_has_a_column_and_the_change_is_from_first_to_last():
    output = shown(*epochs(3))
    titles, (row,) = table(output, "layer ")
    assert titles == ["layer", "units", "share", "A", "B", "C", "change"]
    assert row.split() == "stem 100 dead 0.0 % 3.0 % 6.0 % +6.0".split()
    titles, rows = table(output, "in all")
    assert titles == ["in", "all", "A", "B", "C", "change"]
    assert [line.split()[0] for line in rows] == [
        "layers", "units", "dead", "frozen", "dormant", "sat", "mean|h|", "mean|g|",
    ]  # fmt: skip
    assert rows[2].split() == "dead 0.0 % 2.0 % 4.0 % +4.0".split()
    assert "change: C minus A" in output


def test_what_has_no_room_is_left_out_from_the_middle_first():
    dropped = []
    for width in range(160, 40, -1):
        titles, _ = table(shown(*epochs(6), width=width), "layer ")
        expected = ["layer", "units", "share", "A", "B", "C", "D", "E", "F", "change"]
        dropped += [name for name in expected if name not in [*titles, *dropped]]
    assert dropped == ["units", "B", "C", "D", "E"]


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_no_line_is_wider_than_the_terminal(width):
    name = "backbone.layers.3.blocks.1.attention.projection.dense.linear"
    before, after = (a_profile(a_layer(name, 20000, dead=dead)) for dead in (0, 777))
    output = shown(before, after, width=width)
    # A long name makes no other column go.
    assert ("units" in table(output, "layer ")[0]) == (width >= 80)
    assert max(map(len, output.splitlines())) <= width
    _, rows = table(output, "layer ")
    assert "".join(line.split(" ")[0] for line in rows) == name


def test_a_layer_has_a_line_for_each_share_that_changed():
    before = a_profile(a_layer("conv", 1000, dormant=1, saturated_fraction=0.5))
    after = a_profile(a_layer("conv", 2000, dead=500, dormant=2, saturated_fraction=0.5003))
    _, rows = table(shown(before, after), "layer ")
    assert [row.split() for row in rows] == ["conv 1,000/2,000 dead 0.0 % 25.0 % +25.0".split()]
    after["layers"][0]["saturated_fraction"] = 0.48
    _, rows = table(shown(before, after), "layer ")
    assert rows[1].split() == "sat 50.0 % 48.0 % -2.0".split()


def test_what_is_unknown_is_a_dash():
    before = a_profile(a_layer("conv", 10, dead=None, mean_abs_gradient=None), a_layer("stem"))
    after = a_profile(a_layer("conv", 10, dead=1), a_layer("stem", dead=4))
    output = shown(before, after, top=None)
    _, rows = table(output, "layer ")
    assert rows[0].split() == "stem 8 dead 0.0 % 50.0 % +50.0".split()
    assert rows[1].split() == "conv 10 dead - 10.0 % -".split()


def test_hardly_any_change_is_shown_as_such():
    before = a_profile(a_layer("conv", 100000, dead=3))
    output = shown(before, a_profile(a_layer("conv", 100000, dead=1)))
    assert "dead <0.1 % <0.1 % -<0.1" in " ".join(output.split())
    assert "not shown 1 layer changed by less than 0.05 points" in " ".join(output.split())
    _, rows = table(shown(before, before, top=None), "layer ")
    assert [row.split() for row in rows] == [["conv", "100,000", "none"]]


def test_layers_that_not_all_have_are_named():
    before = a_profile(a_layer("stem"), *(a_layer(f"old{number}") for number in range(10)))
    after, last = a_profile(a_layer("stem"), a_layer("new")), a_profile(a_layer("stem"))
    text = " ".join(shown(before, after, last).split())
    assert "only in A old0, old1, old2, old3, old4, old5, old6, old7 and 2 more" in text
    assert "only in B new" in text
    assert "old9" in shown(before, after, last, top=None)


def test_gates_and_notes_stand_in_the_report():
    before, after = epochs(2)
    output = " ".join(shown(before, after | {"seed": 5}, gates=["dead>0.5", "s*:dead>0"]).split())
    assert output.index("note the seed differs (0 in A, 5 in B)") < output.index("in all")
    assert "gate passed: dead>0.5: dead is 2 % over all units" in output
    assert "gate FAILED: s*:dead>0: dead in 1 of 1 layers: stem 3 %" in output


def test_worse_is_yellow_and_better_green():
    before, after = epochs(2)
    colours = {"force_terminal": True, "color_system": "standard"}
    assert "\x1b[33m" in shown(before, after, **colours)
    assert "\x1b[32m" in shown(after, before, **colours)
    plain = shown(before, after, force_terminal=True, no_color=True)
    assert not re.search(r"\x1b\[[0-9;]*3\d", plain)
