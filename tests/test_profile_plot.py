"""`fastplastic profile --plot`: what is drawn for every layer, and which files are refused."""

import re
from pathlib import Path

import pytest
from helpers.compared import a_layer
from helpers.program import MODEL, SMALL, refused
from matplotlib.colors import to_rgba

from fastplastic.cli.profile_plot import draw_profile, profile_figure

LAYERS = [
    a_layer("stem", 10, dead=1, dormant=2, saturated_fraction=0.25, mean_abs_gradient=1e-3),
    a_layer("blocks.0.a", 8, dead=0, dormant=8, saturated_fraction=1.0, mean_abs_gradient=0.0),
    a_layer("blocks.0.b", 4, dead=None, dormant=None, saturated_fraction=None,
            mean_abs_gradient=None),
    a_layer("blocks.1.a", 4, dead=4, dormant=4, saturated_fraction=0.5, mean_abs_gradient=1e-7),
]  # fmt: skip


def panels(layers=LAYERS):
    return {axes.get_title(): axes for axes in profile_figure(layers, "net").axes}


def bars(axes):
    """Return {row: length} of the bars; shaded stages are no bars."""
    found = list(axes.containers[0]) if axes.containers else []
    return {round(bar.get_y() + bar.get_height() / 2): bar.get_width() for bar in found}


def words(axes):
    return {text.get_position()[1]: text.get_text() for text in axes.texts}


def test_shares_are_bars_in_the_order_of_the_network():
    found = panels()
    assert list(found) == ["dead", "dormant", "saturated", "gradient"]
    assert bars(found["dead"]) == {0: 10, 1: 0, 3: 100}
    assert bars(found["dormant"]) == {0: 20, 1: 100, 3: 100}
    assert bars(found["saturated"]) == {0: 25, 1: 100, 3: 50}
    for name in ("dead", "dormant", "saturated"):
        assert found[name].get_xlim() == (0, 100)
        assert words(found[name]) == {2: "not measured"}
    top, bottom = found["dead"].get_ylim()
    assert top > bottom
    labels = [label.get_text() for label in found["dead"].get_yticklabels()]
    assert labels == [layer["name"] for layer in LAYERS]


def test_gradients_are_points_on_a_scale_of_powers_of_ten():
    axes = panels()["gradient"]
    assert axes.get_xscale() == "log"
    (points,) = axes.lines
    assert list(zip(points.get_xdata(), points.get_ydata(), strict=True)) == [(1e-3, 0), (1e-7, 3)]
    assert words(axes) == {1: "0", 2: "not measured"}


def test_every_second_stage_is_on_a_darker_ground():
    shades = [patch for patch in panels()["gradient"].patches if patch.get_facecolor() == SHADE]
    ((low, high),) = [(patch.get_y(), patch.get_y() + patch.get_height()) for patch in shades]
    assert (low, high) == (0.5, 2.5)


SHADE = to_rgba("black", 0.05)


def test_the_picture_grows_with_the_network_up_to_a_limit():
    few, many, most = (
        profile_figure([a_layer(f"l.{at}", 4) for at in range(number)], "net")
        for number in (4, 54, 800)
    )
    assert few.get_figheight() < many.get_figheight() < most.get_figheight() == 60
    names = [len(figure.axes[0].get_yticks()) for figure in (few, many, most)]
    # Of 800 each third has its name.
    assert names == [4, 54, 267]


def test_names_are_no_formulas_and_long_ones_show_their_ends(tmp_path):
    evil, long = "$x$_{", "a.very." * 9 + "long.name"
    draw_profile([a_layer(evil), a_layer(long)], "$y$", tmp_path / "a.svg", force=False)
    text = (tmp_path / "a.svg").read_text()
    assert ">$x$_{<" in text and ">$y$<" in text
    assert re.search(r">\.\.\.[a-z.]{21}\.long\.name<", text)


def test_nothing_known_is_drawn_too(tmp_path):
    nothing = dict.fromkeys(("dead", "dormant", "saturated_fraction", "mean_abs_gradient"))
    draw_profile([a_layer("stem", **nothing)], "net", tmp_path / "a.png", force=False)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_the_program_draws_the_same_picture_again(run):
    arguments = ["profile", *SMALL, "--plot", "a.svg", "-q"]
    assert run(*arguments) == (0, "", "")
    text = Path("a.svg").read_text()
    assert f"{MODEL}, weights random; data sample, 8 samples, eval mode" in text
    assert all(f">{name}<" in text for name in ("conv1.0", "layer1.0.conv1", "fc"))
    refused(run(*arguments), 3, "a.svg exists: give another name, or --force")
    assert run(*arguments, "--force") == (0, "", "")
    assert Path("a.svg").read_text() == text


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ("--plot a.pdf", "--plot a.pdf: expected a name that ends in .png or .svg"),
        ("--plot -", "--plot -: expected a name that ends in .png or .svg"),
        ("--plot a.svg --csv a.svg", "two outputs are a.svg: give each of them another name"),
    ],
)
def test_pictures_that_cannot_be_are_refused_before_anything_slow(
    run, nothing_slow, arguments, text
):
    refused(run("profile", "m", *arguments.split()), 2, text)


def test_a_picture_without_matplotlib_is_refused_before_anything_slow(
    run, nothing_slow, monkeypatch
):
    monkeypatch.setattr("fastplastic.cli.plot.find_spec", lambda name: None)
    text = "--plot needs matplotlib: pip install 'fastplastic[report]', or leave it out"
    refused(run("profile", "m", "--plot", "a.png"), 2, text)
