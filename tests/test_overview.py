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
    assert "2 layers not shown" in shown(layers=True, top=2)


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
