"""The page of a profile: what stands in it, that nothing is smuggled in, and how big it is."""

import base64
import hashlib
import json
import re
from dataclasses import replace

import pytest
import torch
from helpers.pages import ORIGIN, parsed, renamed, small_profile, view_of

import fastplastic
from fastplastic.cli.page import Origin, charts, levels, page_text, page_view, write_page
from fastplastic.cli.report import report_of

KEYS = [
    "name", "kind", "activation", "units", "hidden", "weak", "dead", "frozen", "dormant",
    "saturated_fraction", "mean_abs_activation", "mean_abs_gradient",
]  # fmt: skip
EVIL = "<script>alert('1')</script>\"&amp; {{ 7 * 7 }}"


@pytest.fixture(scope="module")
def profile():
    return small_profile()


@pytest.fixture(scope="module")
def page(profile):
    return parsed(page_text(view_of(profile)))


def section(page, name):
    return page.one("section", id=name)


def rows_of(section, kind):
    return section.one("table", **{"class": kind}).one("tbody").all("tr")


def test_sections_stand_in_their_order(page):
    names = [found.attributes["id"] for found in page.all("section")]
    assert names == ["heat", "scores", "wiring", "table", "reproduce"]
    assert page.one("title").text == "net: plasticity profile"
    assert page.one("h1").text == "Plasticity profile of net"


def test_values_of_the_table_are_those_of_the_json(page, profile):
    rows = rows_of(section(page, "table"), "layers")
    assert len(rows) == len(profile)
    for row, layer in zip(rows, profile.to_dict()["layers"], strict=True):
        cells = dict(zip(KEYS, row.inside[1:], strict=True))
        for key in ("name", "kind", "activation"):
            assert cells[key].text == layer[key]
        for key in KEYS[3:]:
            if key != "weak":
                value = cells[key].attributes["data-v"]
                assert (json.loads(value) if value else None) == layer[key]
    weak = [row for row in rows if row.attributes.get("class") == "marked"]
    assert {row.inside[1].text for row in weak} == {
        layer.name for layer in profile if (layer.dead | layer.frozen | layer.dormant).any()
    }


def test_the_heat_map_prints_every_value_and_links_every_layer(page, profile):
    rows = rows_of(section(page, "heat"), "heat")
    for at, (row, layer) in enumerate(zip(rows, profile, strict=True)):
        assert (row.one("a").text, row.one("a").attributes["href"]) == (layer.name, f"#l{at}")
        dead = row.all("td")[0]
        number = int(layer.dead.sum())
        assert dead.text == f"{100 * number / layer.n_units:.1f} %"
        assert dead.attributes["title"] == f"{number} of {layer.n_units} units dead"
        assert (dead.attributes["class"] == "v0") == (number == 0)


def test_layers_without_figures_say_so(profile):
    first, *others = profile.layers
    unseen = replace(first, stats=type(first.stats)(torch.zeros_like(first.stats.table)))
    page = parsed(page_text(view_of(replace(profile, layers=(unseen, *others)))))
    cells = rows_of(section(page, "heat"), "heat")[0].all("td")
    assert [(cell.text, cell.attributes["class"]) for cell in cells] == [("-", "un")] * 5
    assert rows_of(section(page, "scores"), "scores")[0].one("td").text == "not measured"
    values = [cell.attributes["data-v"] for cell in rows_of(page, "layers")[0].inside[7:]]
    assert values == [""] * 6


def wiring(page):
    found = {}
    for entry in section(page, "wiring").one("ol").all("li"):
        facts = {}
        for line in entry.all("div"):
            facts.setdefault(line.one("dt").text, []).append(line.one("dd").text)
        found[entry.one("b").text] = (entry.one("span").text, facts)
    return found


def test_wiring_says_what_reads_what_and_why_not(page):
    found = wiring(page)
    sorts = {name: sort for name, (sort, _) in found.items()}
    assert sorts == {
        "stem": "stream", "first": "hidden", "branch": "stream", "wide": "hidden",
        "deep": "with another layer", "narrow": "hidden", "head": "stream",
    }  # fmt: skip
    assert found["first"][1]["read by"] == ["branch (all units)"]
    assert found["branch"][1]["reads"] == ["first (all units)"]
    assert found["branch"][1]["read by"] == ["8 units by no columns of their own"]
    assert found["branch"][1]["not reset"] == ["8 units: summed into a residual stream"]
    nothing = "no unit of its own: the input, a stream, or units that are mixed"
    assert found["stem"][1]["reads"] == found["wide"][1]["reads"] == [nothing]
    assert found["wide"][1]["read by"] == ["what reads the rows that they are made with"]
    assert found["wide"][1]["together with"] == ["deep: their rows make one unit"]
    assert found["deep"][1]["together with"] == ["wide: their rows make one unit"]
    assert found["deep"][1]["read by"] == ["narrow (all units)"]
    assert found["head"][1]["head"] == ["it makes the output of the network"]


def test_a_layer_of_which_some_units_are_hidden(profile):
    layers = list(profile.layers)
    hidden = layers[1].wiring.hidden.clone()
    hidden[:4] = False
    reasons = {"query of an attention": 4}
    (consumer,) = layers[1].consumers
    column = torch.where(hidden, consumer.unit_of_column, -1)
    wired = replace(
        layers[1].wiring, hidden=hidden, reasons=reasons,
        consumers=(replace(consumer, unit_of_column=column, name="gone"),),
    )  # fmt: skip
    layers[1] = replace(layers[1], wiring=wired)
    found = wiring(parsed(page_text(view_of(replace(profile, layers=tuple(layers))))))
    sort, facts = found["first"]
    assert sort == "partly hidden"
    # "gone" has no figures, and is no link then.
    assert facts["read by"] == ["gone (8 of 12 units); 4 units by no columns of their own"]
    assert facts["not reset"] == ["4 units: query of an attention"]
    reads = found["branch"][1]["reads"]
    assert reads == ["no unit of its own: the input, a stream, or units that are mixed"]


def test_the_page_needs_no_network(profile):
    text = page_text(view_of(profile))
    assert "://" not in text and "@import" not in text
    assert set(re.findall(r"url\(.*?\)", text)) == {"url(#stripes)"}
    page = parsed(text)
    assert not [x for x in page.all("*") if "src" in x.attributes or "style" in x.attributes]
    addresses = {x.attributes["href"] for x in page.all("*") if "href" in x.attributes}
    ids = [x.attributes["id"] for x in page.all("*") if "id" in x.attributes]
    assert len(ids) == len(set(ids))
    assert {x for x in addresses if x != "data:,"} <= {f"#{name}" for name in ids}


def test_the_policy_names_the_only_script_and_the_only_style(page):
    (policy,) = [
        x.attributes["content"]
        for x in page.all("meta")
        if x.attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policy.startswith("default-src 'none';")
    for tag in ("script", "style"):
        content = "".join(page.one(tag).raw()).encode()
        digest = base64.b64encode(hashlib.sha256(content).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy


def test_names_of_others_are_text_and_nothing_else(profile):
    origin = Origin(f"fastplastic profile {EVIL}", ORIGIN.versions, EVIL)
    finding = (EVIL, EVIL, EVIL, EVIL)
    evil = renamed(replace(profile, device=EVIL), EVIL)
    evil = replace(evil, coverage=replace(evil.coverage, skipped=((EVIL, EVIL),)))
    text = page_text(view_of(evil, EVIL, origin, findings=[finding]))
    assert text.count("<script") == text.count("</script") == 1
    assert "alert('1')" not in text
    page = parsed(text)
    assert page.one("h1").text.endswith(EVIL)
    assert page.one("title").text.startswith(EVIL)
    assert rows_of(section(page, "heat"), "heat")[1].one("a").text == EVIL
    assert rows_of(section(page, "table"), "layers")[1].inside[1].text == EVIL
    assert wiring(page)[EVIL][1]["not reset"] == [f"3 units: {EVIL}"]
    assert section(page, "reproduce").one("pre").text == f"fastplastic profile {EVIL}"


def test_findings_stand_first_where_there_are_some(profile):
    findings = [("grave", "all dead", "5 of 5", "re-initialise")]
    page = parsed(page_text(view_of(profile, findings=findings)))
    assert page.all("section")[0].attributes["id"] == "findings"
    assert section(page, "findings").one("li").text == "grave all dead 5 of 5 re-initialise"
    assert '"findings"' not in page_text(view_of(profile))


def test_what_was_not_measured_and_what_is_noted_is_said(profile):
    page = parsed(page_text(view_of(replace(profile, notes=("look here",)))))
    facts = [
        (line.one("dt").text, line.one("dd").text) for line in section(page, "reproduce").all("div")
    ]
    assert {
        ("coverage", "7 of 8 weight layers measured"), ("note", "look here"),
        ("data", "sha256 ab12"), ("samples", "8 samples in 2 batches"),
        ("fastplastic", "1.2.3"), ("seed", str(profile.seed)),
        ("model", f"fingerprint {profile.fingerprint} of names, shapes and dtypes"),
    } <= set(facts)  # fmt: skip
    assert [text.partition(":")[0] for label, text in facts if label == "skipped"] == ["never"]


def test_a_layer_is_weak_too_where_rows_that_belong_to_it_are(profile):
    report = report_of(profile, ())
    rows = tuple(replace(row, dead=0, frozen=0, dormant=0, weak=0) for row in report.rows)
    report = replace(report, rows=(replace(rows[0], weak=5), *rows[1:]))
    page = page_view(profile, "net", report, ORIGIN)
    assert [row.marked for row in page.rows] == [True] + [False] * 6


def test_long_names_are_broken_behind_dots(profile):
    page = page_text(view_of(renamed(profile, "blocks.0.conv")))
    assert '<th scope="row">blocks.<wbr>0.<wbr>conv</th>' in page


def test_ranks_have_columns_where_they_were_measured(profile):
    ranks = fastplastic.diagnostics.Ranks(3.25, 2, 1.5, 64, 7)
    first, *others = profile.layers
    page = parsed(
        page_text(view_of(replace(profile, layers=(replace(first, ranks=ranks), *others))))
    )
    rows = rows_of(section(page, "table"), "layers")
    assert [cell.text for cell in rows[0].inside[-3:]] == ["3.2", "2", "1.5"]
    assert [cell.text for cell in rows[1].inside[-3:]] == ["-", "-", "-"]
    assert rows[0].inside[4].attributes["data-v"] == "8"


def test_names_that_are_not_text_are_written_all_the_same(profile, tmp_path):
    path = tmp_path / "page.html"
    write_page(view_of(profile, "caf\udce9"), path, force=False)
    assert "<title>caf?: plasticity profile</title>" in path.read_text(encoding="utf-8")


def test_the_page_of_a_resnet50_is_below_a_megabyte():
    import timm

    model = timm.create_model("resnet50", pretrained=False).eval()
    images = [(torch.randn(1, 3, 64, 64), torch.tensor([1]))]
    text = page_text(view_of(fastplastic.profile(model, images, backward=False)))
    assert len(text.encode()) < 1_000_000
    assert len(rows_of(section(parsed(text), "table"), "layers")) == 54


@pytest.mark.parametrize(
    ("share", "level"), [(0, 0), (0.001, 1), (0.01, 1), (0.02, 2), (0.2, 3), (0.3, 4), (0.51, 5)]
)
def test_levels_of_shares(share, level):
    assert levels.share_level(share) == level


def test_levels_of_saturation_and_gradients():
    assert [levels.saturated_level(x) for x in (0, 0.59, 0.6, 0.8, 0.9, 0.95, 1)] == [
        0, 0, 1, 2, 3, 4, 5,
    ]  # fmt: skip
    sizes = (2.0, 0.4, 0.3, 0.09, 0.03, 0.01, 0.001, 0.0)
    assert [levels.gradient_level(x, 1.0) for x in sizes] == [0, 0, 1, 2, 3, 4, 5, 5]
    rows = [{"mean_abs_gradient": x} for x in (1.0, None, 0.0, 3.0, 2.0)]
    assert levels.usual_gradient(rows) == 2.0
    assert levels.usual_gradient(rows[1:3]) == 0.0


def test_histograms_hold_every_score():
    low, rest = charts.histogram([0, 0.025, 0.02, 0.026, 1.0, 1e9], 0.025)
    # The highest bar is full, and each bar of one unit a third of it.
    assert low == "M0 30v-30h8V30z"
    assert re.findall(r"M(\d+) 30v-10h8V30z", rest) == ["9", "99", str(9 * 21)]
    assert charts.histogram([1.0], 0.025)[0] == ""
    assert len(charts.score_edges(0.025)) == charts.BINS - 1


def test_arcs_begin_and_end_at_their_rows():
    assert charts.arcs([(0, 2), (0, 2)]) == "M0 10C26 10 26 50 4 50m5 -4l-5 4l5 4"
    assert charts.bar_widths([0, 1, 50, 100]) == [0, 1.2, 60.0, 120.0]
    long = "model.layers.12.attention.self.query.projection"
    assert charts.shortened(long) == "…" + long[-33:] and charts.shortened("fc") == "fc"
