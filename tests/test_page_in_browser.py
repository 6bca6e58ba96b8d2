"""The page in a browser: sorting and filtering work, by keyboard too, and nothing complains."""

from dataclasses import replace

import pytest
import torch
from helpers.browser import tab
from helpers.compared import a_layer, a_profile
from helpers.pages import small_profile, view_of

from fastplastic.cli.page import Origin, changes_view, write_page
from fastplastic.comparison import compare_figures
from fastplastic.files import figures_of

pytestmark = pytest.mark.chromium

NAMES = ["stem", "first", "branch", "wide", "deep", "narrow", "head"]
SHOWN = """
[...document.querySelectorAll("#layers tbody tr")].filter((row) => row.offsetHeight)
    .map((row) => row.cells[1].textContent)
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with tab(tmp_path_factory.mktemp("browser")) as found:
        yield found


@pytest.fixture(scope="module")
def profile():
    found = small_profile()
    *others, last = found.layers
    unseen = replace(last, stats=type(last.stats)(torch.zeros_like(last.stats.table)))
    return replace(found, layers=(*others, unseen))


def opened(browser, path):
    """Yield the browser with a page open, which must load nothing else and complain of nothing."""
    browser.complaints.clear()
    browser.requests.clear()
    browser.show(width=1000, height=800, dark=False)
    browser.open(path.as_uri())
    yield browser
    assert browser.complaints == []
    assert set(browser.requests) == {path.as_uri()}


@pytest.fixture
def page(browser, profile, tmp_path):
    path = tmp_path / "page.html"
    write_page(view_of(profile), path, force=False)
    yield from opened(browser, path)


@pytest.fixture
def changes(browser, tmp_path):
    """Open a page of a comparison of three profiles."""
    path = tmp_path / "changes.html"
    layers = [[a_layer(name, 20, dead=at * n) for at, name in enumerate("xyz")] for n in (0, 3, 5)]
    figures = [figures_of(a_profile(*own, samples=n)) for n, own in enumerate(layers)]
    origin = Origin("fastplastic compare", (("fastplastic", "1"), ("Python", "3")), None)
    write_page(changes_view(compare_figures(figures, "abc"), (), origin), path, force=False)
    yield from opened(browser, path)


def test_changes_are_sorted_and_filtered_by_the_same_script(changes):
    click(changes, "dead")
    assert changes.evaluate(SHOWN) == ["z", "y", "x"]
    changes.evaluate("document.getElementById('only').click()")
    assert changes.evaluate(SHOWN) == ["z", "y"]
    changes.evaluate("document.getElementById('filter').focus()")
    changes.press("y", "y")
    assert changes.evaluate(SHOWN) == ["y"]
    assert changes.evaluate("document.getElementById('shown').textContent") == "1 of 3 layers"


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [360, 1200])
def test_every_text_about_changes_can_be_read(changes, width, dark):
    changes.show(width=width, height=800, dark=dark)
    assert changes.evaluate("document.documentElement.scrollWidth") <= width
    assert changes.evaluate(CONTRASTS) == []


def click(page, title):
    page.evaluate(
        "[...document.querySelectorAll('#layers th button')]"
        f".find((button) => button.textContent === {title!r}).click()"
    )


def order(page, title):
    return page.evaluate(
        "[...document.querySelectorAll('#layers th')]"
        f".find((head) => head.textContent === {title!r}).getAttribute('aria-sort')"
    )


def test_sorting_by_numbers_leaves_unknown_ones_last(page, profile):
    known = profile.layers[:-1]
    click(page, "dead")
    most = sorted(known, key=lambda layer: -int(layer.dead.sum()))
    assert page.evaluate(SHOWN) == [layer.name for layer in most] + ["head"]
    assert (order(page, "dead"), order(page, "#")) == ("descending", None)
    click(page, "dead")
    least = sorted(most, key=lambda layer: int(layer.dead.sum()))
    assert page.evaluate(SHOWN) == [layer.name for layer in least] + ["head"]
    assert order(page, "dead") == "ascending"
    click(page, "#")
    assert page.evaluate(SHOWN) == NAMES


def test_numbers_are_not_sorted_as_text(page):
    click(page, "units")
    assert page.evaluate(SHOWN)[:2] == ["wide", "deep"]
    assert page.evaluate(SHOWN)[-1] == "head"


def test_sorting_by_names(page):
    click(page, "layer")
    assert page.evaluate(SHOWN) == sorted(NAMES)
    click(page, "layer")
    assert page.evaluate(SHOWN) == sorted(NAMES, reverse=True)


def test_filtering_by_text_and_by_weak_units(page, profile):
    kind = "document.getElementById('filter')"
    page.evaluate(f"{kind}.focus()")
    for letter in "Line":
        page.press(letter, letter)
    assert page.evaluate(SHOWN) == ["head"]
    assert page.evaluate("document.getElementById('shown').textContent") == "1 of 7 layers"
    page.evaluate(f"{kind}.value = ''; {kind}.dispatchEvent(new Event('input'))")
    assert page.evaluate(SHOWN) == NAMES
    # From the text to the box beside it, with the keys alone.
    page.press("Tab")
    page.press(" ", " ")
    weak = [x.name for x in profile.layers[:-1] if (x.dead | x.frozen | x.dormant).any()]
    assert page.evaluate(SHOWN) == weak
    assert 0 < len(weak) < len(NAMES)
    shown = page.evaluate("document.getElementById('shown').textContent")
    assert shown == f"{len(weak)} of 7 layers"


def test_a_head_of_the_table_is_a_button_for_the_keyboard(page):
    page.evaluate("document.querySelectorAll('#layers th button')[1].focus()")
    page.press("Enter", "\r")
    assert page.evaluate(SHOWN) == sorted(NAMES)
    assert page.evaluate("document.activeElement.textContent") == "layer"


def test_a_link_opens_the_layer_that_it_names(page):
    is_open = "document.querySelector('#l3 details').open"
    assert not page.evaluate(is_open)
    page.evaluate("document.querySelector('.heat a[href=\"#l3\"]').click()")
    page.wait_for(is_open)


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [360, 1200])
def test_every_text_can_be_read(page, width, dark):
    """At least 4.5 to 1 for text (WCAG 2.2, 1.4.3), and nothing wider than the window."""
    page.show(width=width, height=800, dark=dark)
    page.evaluate("document.querySelectorAll('details').forEach((x) => { x.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(CONTRASTS) == []


CONTRASTS = """
(() => {
  const parts = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = (colour) => {
    const [r, g, b] = parts(colour).map((x) => x / 255)
      .map((x) => (x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const colour = getComputedStyle(at).backgroundColor;
      if (parts(colour)[3] !== 0) return colour;
    }
  };
  const bad = [];
  [...document.querySelectorAll(".heat td")].slice(0, 6).forEach((cell, level) => {
    cell.className = `v${level}`;
  });
  for (const element of document.querySelectorAll("body *:not(script, style, svg, svg *)")) {
    const own = [...element.childNodes].some((x) => x.nodeType === 3 && x.textContent.trim());
    if (!own) continue;
    const [a, b] = [light(getComputedStyle(element).color), light(ground(element))];
    const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (contrast < 4.5) bad.push([element.tagName, element.className, contrast]);
  }
  return bad;
})()
"""
