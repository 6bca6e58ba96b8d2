import io
import re
from dataclasses import replace

import pytest
from rich.console import Console

from fastplastic.cli import overview, render
from fastplastic.cli.overview import Shown
from fastplastic.cli.render import LayerRow, MaskRow, PlanRow, PlanView, Report

HEALTHY = LayerRow("stem.conv1", "conv", "relu", 64, 64, 0, 0, 0, 0, 0.5, 0.123456, 1.5e-6)
SICK = replace(HEALTHY, name="layer4.2.conv1", units=512, hidden=512, dead=12, dormant=20, weak=20)
STREAM = replace(HEALTHY, name="fc", kind="linear", units=1000, hidden=0, activation="identity")

REPORT = Report(
    facts=(("model", "resnet[50]"), ("weights", "random")),
    rows=(HEALTHY, SICK, STREAM),
    tau=0.025,
    saturated=0.95,
    found=4,
    skipped=(("odd", "its weight is not a parameter"),),
    fixed=(("leaves the network", 1000, 1),),
    notes=("something to know",),
)

ALL = Shown(layers=True)
# In the order in which they make room.
DROPPABLE = ["kind", "mean|g|", "mean|h|", "act", "frozen", "reset"]


def text(renderable, width=100, **options):
    console = Console(file=io.StringIO(), width=width, highlight=False, **options)
    console.print(renderable)
    return console.file.getvalue()


def line(output, start):
    (found,) = [line for line in output.splitlines() if line.startswith(start)]
    return found


def words(output):
    return " ".join(output.split())


def test_numbers():
    assert render.count(26560) == "26,560"
    assert [render.percent(share) for share in (0, 0.0004, 0.012, 1, None, float("nan"))] == [
        "0.0 %", "<0.1 %", "1.2 %", "100.0 %", "-", "-",
    ]  # fmt: skip
    values = (0.0, 1.5e-6, 0.123456, 12345.6, None, float("nan"))
    assert [render.magnitude(value) for value in values] == [
        "0", "1.5e-06", "0.123", "1.23e+04", "-", "-",
    ]  # fmt: skip
    assert render.number_of(1, "layer") == "1 layer"
    assert render.number_of(2000, "layer") == "2,000 layers"


def test_table_has_a_line_per_layer():
    output = text(render.layer_table(REPORT.rows, 120), 120)
    assert line(output, "layer ").split() == [
        "layer", "kind", "act", "units", "reset", "dead", "frozen", "dormant", "sat", "mean|h|",
        "mean|g|",
    ]  # fmt: skip
    assert line(output, "layer4.2.conv1").split() == [
        "layer4.2.conv1", "conv", "relu", "512", "512", "12", ".", "20", "50.0", "%", "0.123",
        "1.5e-06",
    ]  # fmt: skip
    assert line(output, "fc").split()[3:5] == ["1,000", "0"]


@pytest.mark.parametrize("width", [40, 60, 80, 100, 120])
def test_every_width_shows_the_whole_report(width):
    output = text(overview.report(REPORT, width, ALL), width)
    assert max(map(len, output.splitlines())) <= width
    title = next(line for line in output.splitlines() if line.startswith("layer "))
    assert {"layer", "units", "dead", "dormant", "sat"} <= set(title.split())
    assert "12 of 1,576 units" in words(output)
    assert "\N{HORIZONTAL ELLIPSIS}" not in output


def test_narrow_table_drops_the_least_important_columns_first():
    dropped = []
    for width in range(120, 40, -1):
        titles = line(text(render.layer_table(REPORT.rows, width), width), "layer ").split()
        dropped += [column for column in DROPPABLE if column not in [*titles, *dropped]]
    assert dropped == DROPPABLE


def test_long_layer_names_are_folded_not_cut():
    name = "backbone.layers.3.blocks.1.attention.projection.dense.linear"
    output = text(render.layer_table([replace(HEALTHY, name=name)], 60), 60)
    assert "".join(line.split(" ")[0] for line in output.splitlines()[2:]) == name


def test_summary_says_where_the_weak_units_are_worst_first():
    other = replace(SICK, name="layer1.0.conv1", units=64, hidden=64, dead=6, dormant=0)
    output = words(text(render.summary(replace(REPORT, rows=(HEALTHY, SICK, other))), 200))
    assert (
        "dead 18 of 640 units (2.8 %) in 2 layers, resettable ones first: "
        "layer1.0.conv1 6 of 64 (9.4 %), layer4.2.conv1 12 of 512 (2.3 %)" in output
    )
    assert (
        "dormant 20 of 640 units (3.1 %) in 1 layer, "
        "resettable ones first: layer4.2.conv1 20 of 512" in output
    )
    assert "frozen none" in output


def test_summary_puts_layers_that_can_be_reset_first():
    rows = (replace(SICK, name="stream", dead=512, fixed=True), SICK)
    dead = words(text(render.summary(replace(REPORT, rows=rows)), 400)).partition("frozen")[0]
    assert "layer4.2.conv1 12 of 512 (2.3 %), stream 512 of 512" in dead


def test_summary_names_four_layers_at_most():
    rows = tuple(replace(SICK, name=f"layer{index}") for index in range(6))
    dead = words(text(render.summary(replace(REPORT, rows=rows)), 400)).partition("frozen")[0]
    assert "in 6 layers" in dead
    assert re.findall(r"layer\d", dead) == ["layer0", "layer1", "layer2", "layer3"]


def test_summary_tells_what_cannot_be_reset_and_what_was_not_measured():
    output = words(text(render.summary(REPORT), 200))
    assert "resettable 576 of 1,576 units (36.5 %); 20 of them are weak" in output
    assert "not reset 1,000 units in 1 layer: leaves the network" in output
    assert "coverage 3 of 4 weight layers measured; odd skipped: its weight is not a" in output
    assert "note something to know" in output


def test_values_that_are_not_finite_are_reported_only_where_there_are_some():
    assert "not finite" not in text(render.summary(REPORT))
    rows = (replace(HEALTHY, nonfinite=3),)
    assert "not finite 3 of 64 units" in words(text(render.summary(replace(REPORT, rows=rows))))


def test_report_is_complete():
    output = words(text(overview.report(REPORT, 100, ALL)))
    assert "model resnet[50] weights random layer" in output
    assert "dormant: mean|h| at most 0.025 of the layer's mean" in output
    assert "saturated: at 95% of them or more" in output


def test_report_of_a_big_model_shows_the_worst_layers_in_their_order():
    rows = tuple(
        replace(SICK, name=f"block{index:03}", dead=index % 60, dormant=0) for index in range(150)
    )
    output = text(overview.report(replace(REPORT, rows=rows), 100, ALL))
    table = output.partition("\nlayer ")[2]
    shown = re.findall(r"^block\d+", table, re.MULTILINE)
    assert len(shown) == 40
    assert shown == sorted(shown)
    assert {"block059", "block119"} <= set(shown)
    assert "block060" not in shown
    assert "110 layers not shown" in output


def test_report_of_a_big_healthy_model_has_no_table():
    rows = tuple(replace(HEALTHY, name=f"block{index}") for index in range(150))
    output = text(overview.report(replace(REPORT, rows=rows), 100, ALL))
    assert "150 layers not shown" in output
    assert "mean|h|" not in output.partition("150 layers")[0]


def test_plan_preview():
    view = PlanView(
        facts=(("model", "resnet50"), ("plan", "12 of 100")),
        rows=(PlanRow("layer4.2.conv1", 512, 500, 12, 0.001, 0.02),),
        notes=("layer4.2.conv1: capped",),
    )
    output = text(render.plan(view))
    assert line(output, "layer4.2.conv1").split() == [
        "layer4.2.conv1", "512", "500", "12", "2.3", "%", "0.001", "to", "0.02",
    ]  # fmt: skip
    assert "note  layer4.2.conv1: capped" in output


def test_plan_preview_of_single_weights():
    view = PlanView(facts=(("plan", "12"),), masks=(MaskRow("fc.weight", 4096, 12),))
    output = text(render.plan(view))
    assert line(output, "fc.weight").split() == ["fc.weight", "4,096", "12", "0.3", "%"]


def test_empty_plan_has_no_table():
    output = text(render.plan(PlanView(facts=(("plan", "0 of 100"),), rows=())))
    assert "layer" not in output


def test_no_color_and_ascii():
    plain = text(overview.report(REPORT, 100, ALL), 100, force_terminal=True, no_color=True)
    assert not re.search(r"\x1b\[[0-9;]*3\d", plain)
    assert "\x1b[33m" in text(
        overview.report(REPORT, 100, ALL), 100, force_terminal=True, color_system="standard"
    )
