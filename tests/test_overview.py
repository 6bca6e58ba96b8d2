"""What `fastplastic profile` shows first: what stands out, and bars for each stage."""

import io
import re
from dataclasses import replace

import pytest
from helpers.program import SMALL, refused
from rich.console import Console

from fastplastic.cli import overview
from fastplastic.cli.overview import Shown, stage_of, stages_of
from fastplastic.cli.render import LayerRow, Report
from fastplastic.cli.terminal import can_print
from fastplastic.measure import Finding

LAYER = LayerRow("stem.conv1", "conv", "relu", 64, 64, 0, 0, 0, 0, 0.5, 0.1, 1e-6)
ROWS = (
    LAYER,
    replace(LAYER, name="layer1.0.conv1", units=100, dead=50, dormant=75, mean_abs_gradient=1e-4),
    replace(LAYER, name="layer1.0.conv2", units=300, dead=0, dormant=1),
    replace(LAYER, name="fc", units=10, dead=None, dormant=None, saturated_fraction=None,
            mean_abs_gradient=None),
)  # fmt: skip
FINDINGS = (
    Finding("high", "Units are [dead].", "50 of 474 units", "look at them"),
    Finding("low", "Few samples were seen.", "8 samples", "measure more"),
)
REPORT = Report(
    facts=(("model", "resnet50"),), rows=ROWS, tau=0.025, saturated=0.95, found=4, skipped=(),
    fixed=(), findings=FINDINGS,
)  # fmt: skip


def text(renderable, width=100, **options):
    console = Console(file=io.StringIO(), width=width, highlight=False, **options)
    console.print(renderable)
    return console.file.getvalue()


def shown(width=100, **options):
    return text(overview.report(REPORT, width, Shown(**options)), width)


def test_what_stands_out_comes_first_with_its_figures_and_what_to_do():
    lines = shown().splitlines()
    assert [line.rstrip() for line in lines[:6]] == [
        "high  Units are [dead].",
        "      50 of 474 units",
        "      -> look at them",
        "low   Few samples were seen.",
        "      8 samples",
        "      -> measure more",
    ]


def test_advice_follows_what_stands_out():
    output = text(overview.report(REPORT, 100, Shown(), "it is likely to help"))
    assert output.index("measure more") < output.index("advice  it is") < output.index("stage ")


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        ("layer4.2.conv1", "layer4"), ("blocks.3.attn.qkv", "blocks.3"), ("conv1", "conv1"),
        ("conv_stem", "conv_stem"), ("head.fc", "head"), ("fc", "fc"), ("0", "0"), ("", ""),
        ("encoder.layer.11.output.dense", "encoder.layer.11"), ("stages.0.blocks.1", "stages.0"),
    ],
)  # fmt: skip
def test_stage_of_a_layer(name, stage):
    assert stage_of(name) == stage


def test_a_stage_is_the_mean_over_the_units_that_are_known():
    stem, first, head = stages_of(ROWS)
    assert (stem.name, first.name, head.name) == ("stem.conv1", "layer1", "fc")
    assert (first.units, first.dead, first.dormant) == (400, 50 / 400, 76 / 400)
    assert first.gradient == pytest.approx((100 * 1e-4 + 300 * 1e-6) / 400)
    assert (head.dead, head.dormant, head.saturated, head.gradient) == (None,) * 4


def test_many_stages_share_lines():
    rows = [replace(LAYER, name=f"blocks.{index}.fc") for index in range(45)]
    stages = stages_of(rows)
    assert [stage.name for stage in stages[:2]] == ["blocks.0 to blocks.2", "blocks.3 to blocks.5"]
    assert len(stages) == 15
    assert sum(stage.units for stage in stages) == 45 * 64
    assert stages_of(()) == ()


def test_bars_are_as_long_as_the_shares_and_nothing_is_not_drawn():
    (line,) = [line for line in shown(120).splitlines() if line.startswith("layer1")]
    dead, dormant, flat, gradient = re.findall("[█░]+", line)
    assert dead == "██" + "░" * 10 and dormant == "██" + "░" * 10
    assert flat == "█" * 6 + "░" * 6 and gradient == "█" * 12
    (line,) = [line for line in shown(120).splitlines() if line.startswith("stem.conv1")]
    assert "░" * 12 + "    0.0 %" in line
    # The smallest gradient is not nothing.
    assert re.findall("[█░]+", line)[-1] == "█" + "░" * 11
    (line,) = [line for line in shown(120).splitlines() if line.startswith("fc")]
    assert "█" not in line and line.split()[2:] == ["░" * 12, "-"] * 4


@pytest.mark.parametrize(("number", "lines"), [(20, 20), (21, 11), (41, 14)])
def test_up_to_twenty_stages_have_a_line_each(number, lines):
    rows = [replace(LAYER, name=f"blocks.{index}.fc") for index in range(number)]
    assert len(stages_of(rows)) == lines


@pytest.mark.parametrize(
    ("width", "titles", "bar"),
    [(30, 1, 0), (40, 1, 10), (41, 2, 0), (51, 2, 5), (52, 3, 0), (62, 3, 0), (63, 4, 0),
     (78, 4, 0), (79, 4, 4), (110, 4, 11), (200, 4, 12)],
)  # fmt: skip
def test_figures_come_before_bars_and_bars_before_columns(width, titles, bar):
    head, _, first, *_ = text(
        overview.stage_table(stages_of(ROWS), width, plain=False), width
    ).splitlines()
    assert head.split() == ["stage", "units", "dead", "dormant", "sat", "mean|g|"][: 2 + titles]
    assert [len(found) for found in re.findall("[█░]+", first)] == ([bar] * titles if bar else [])


def test_long_names_of_stages_are_folded():
    rows = [replace(LAYER, name="a" * 40 + "1.fc")]
    lines = text(overview.stage_table(stages_of(rows), 120, plain=False), 120).splitlines()
    assert lines[2].startswith("a" * 28 + " ") and lines[3].strip() == "a" * 12 + "1"


def bars_of(**values):
    """Return the bars of a stage of one layer, beside one with a gradient that is larger."""
    rows = [replace(LAYER, name="a", **values), replace(LAYER, name="b", mean_abs_gradient=1.0)]
    lines = text(overview.stage_table(stages_of(rows), 120, plain=False), 120).splitlines()
    return re.findall("[█░]+", lines[2])


def test_what_is_there_at_all_is_seen_and_what_is_not_is_not():
    assert bars_of(units=1000, dead=1)[0] == "█" + "░" * 11
    assert bars_of(mean_abs_gradient=0.0)[3] == "░" * 12
    # Where all are the same none is small.
    assert bars_of(mean_abs_gradient=1.0)[3] == "█" * 12


@pytest.mark.parametrize(
    ("dead", "style"), [(9, None), (10, "33"), (49, "33"), (50, "31"), (100, "31")]
)
def test_many_weak_units_stand_in_colour_and_saturation_does_not(dead, style):
    rows = [replace(LAYER, units=100, dead=dead, saturated_fraction=0.9)]
    table = overview.stage_table(stages_of(rows), 120, plain=False)
    output = text(table, 120, force_terminal=True, color_system="standard")
    assert re.findall(r"\x1b\[(\d+)m", output.replace("\x1b[0m", "").replace("\x1b[1m", "")) == (
        [style] if style else []
    )


def test_severity_is_a_word_and_a_colour():
    found = (FINDINGS[0], Finding("none", "Nothing stands out.", "0", "go on"))
    table = overview.findings(replace(REPORT, findings=found))
    output = text(table, force_terminal=True, color_system="standard")
    assert "\x1b[1;31mhigh" in output and "\x1b[32mgood" in output


def test_what_was_measured_under_which_circumstances_is_told():
    assert re.search(r"^model +resnet50", shown(), re.MULTILINE)


@pytest.mark.parametrize("width", [30, 60, 80, 100, 200])
def test_every_width_has_the_figures(width):
    output = text(overview.stage_table(stages_of(ROWS), width, plain=False), width)
    assert "12.5 %" in output
    if width >= 60:
        assert "19.0 %" in output
    assert max(map(len, output.splitlines())) <= width


def test_code_pages_get_characters_that_they_have():
    bars = shown(120, plain=True).partition("\nstage ")[2].partition("Bars")[0]
    assert "##.........." in bars
    bars.replace("─", "").encode("ascii")
    console = Console(file=io.TextIOWrapper(io.BytesIO(), encoding="cp1252"))
    assert not can_print("█░", console)
    assert can_print("█░", Console(file=io.TextIOWrapper(io.BytesIO(), encoding="utf-8")))


def test_the_table_is_shown_when_asked_for():
    assert "layer1.0.conv1" not in shown()
    assert "resettable ones first" not in shown()
    assert "layer1.0.conv1" in shown(layers=True)
    assert "resettable ones first" in shown(layers=True)


def test_the_table_is_sorted_by_share_and_unknown_comes_last():
    def names(**options):
        body = shown(layers=True, **options).partition("\nlayer  ")[2].partition("\n\n")[0]
        return re.findall(r"^(\S+)  ", body.partition("\n")[2], re.MULTILINE)

    assert names(sort="dead") == ["layer1.0.conv1", "stem.conv1", "layer1.0.conv2", "fc"]
    assert names(sort="units", top=2) == ["layer1.0.conv2", "layer1.0.conv1"]
    assert names() == [row.name for row in ROWS]
    assert "3 layers not shown" in shown(layers=True, top=1)


FEW = {"units": 4, "hidden": 2, "dead": 0, "frozen": 0, "dormant": 0}
SORTED = {
    "units": {"units": 200}, "reset": {"units": 10, "hidden": 10}, "dead": FEW | {"dead": 3},
    "frozen": FEW | {"frozen": 3}, "dormant": FEW | {"dormant": 3},
    "sat": {"saturated_fraction": 0.9}, "h": {"mean_abs_activation": 0.9},
    "g": {"mean_abs_gradient": 0.9},
}  # fmt: skip


@pytest.mark.parametrize("key", SORTED)
def test_every_column_that_can_be_sorted_by_is_its_own(key):
    """Of eight layers each is the first by one column; many units hide no share."""
    base = replace(LAYER, units=100, hidden=50, dead=4, frozen=4, dormant=4)
    rows = tuple(replace(base, **values, name=name) for name, values in SORTED.items())
    report = replace(REPORT, rows=rows)
    output = text(overview.report(report, 120, Shown(layers=True, sort=key, top=1)), 120)
    table = output.partition("\nlayer  ")[2].splitlines()
    assert table[2].split()[0] == key


def test_all_rows_are_sorted_where_no_number_of_them_is_given():
    rows = tuple(replace(LAYER, name=f"l{at:03}", units=100 + at, dead=at % 2) for at in range(120))
    report = replace(REPORT, rows=rows)

    def names(**options):
        output = text(overview.report(report, 120, Shown(layers=True, **options)), 120)
        return re.findall(r"^l\d\d\d", output.partition("\nlayer  ")[2], re.MULTILINE)

    assert names(sort="units") == [row.name for row in reversed(rows)]
    assert names(top=55) == [row.name for row in rows[:55]]
    assert len(names()) < 55


def test_on_the_command_line(run):
    outcome = run("profile", *SMALL)
    first = outcome.output.splitlines()[0]
    assert re.match(r"(high|medium|low|good)  ", first)
    assert "stage " in outcome.output and "\nlayer2.0.conv1 " not in outcome.output
    assert "\nlayer2.0.conv1 " in run("profile", *SMALL, "--layers").output
    top = run("profile", *SMALL, "--sort", "dead", "--top", "1").output
    assert len(re.findall(r"^layer\d\.0", top, re.MULTILINE)) <= 1 and "not shown" in top
    refused(run("profile", *SMALL, "--sort", "deadness"), 2, "deadness")
    refused(run("profile", *SMALL, "--top", "0"), 2, "--top")
