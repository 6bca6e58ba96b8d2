"""`fastplastic compare`, and --fail-if of `fastplastic profile`."""

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.compared import a_layer, a_profile, written
from helpers.profiled import data, net
from helpers.program import MODEL, SMALL, refused

from fastplastic import profile
from fastplastic.errors import InputError
from fastplastic.sources import DataSource


@pytest.fixture
def files(run):
    """Two files in the folder in which the program runs; a layer dies, another goes, one comes."""
    before = a_profile(a_layer("stem", 10, dead=1), a_layer("conv", 20), a_layer("old"))
    after = a_profile(a_layer("stem", 10, dead=1), a_layer("conv", 20, dead=5), a_layer("new"))
    return written(before, "before.json"), written(after, "after.json")


def words(text):
    return " ".join(text.split())


def test_compare_prints_what_changed(run, files):
    outcome = run("compare", *files)
    assert (outcome.code, outcome.error) == (0, "")
    first = " ".join(outcome.output.splitlines()[0].split())
    assert first.startswith("A before.json: net; weights random; data sample; 16 samples, seed 0;")
    lines = {line.partition("  ")[0]: line.split() for line in outcome.output.splitlines()}
    assert lines["dead"] == ["dead", "2.6", "%", "15.8", "%", "+13.2"]
    assert lines["units"] == ["units", "38", "38", "0"]
    assert lines["conv"] == ["conv", "20", "dead", "0.0", "%", "25.0", "%", "+25.0"]
    text = words(outcome.output)
    assert "not shown 1 layer changed by less than 0.05 points only in A old only in B new" in text
    assert "change: B minus A, for shares in percentage points" in text


def test_top_and_layers_say_how_many_layers(run):
    first = written(a_profile(*(a_layer(f"l{n:02}", 100) for n in range(30))), "a.json")
    second = a_profile(*(a_layer(f"l{n:02}", 100, dead=n) for n in range(30)))
    written(second, "b.json")

    def shown(*more):
        output = run("compare", first, "b.json", *more).output
        return [x.split()[0] for x in output.splitlines() if x.startswith("l") and "%" in x]

    assert shown() == [f"l{n:02}" for n in range(29, 9, -1)]
    assert shown("--top", "2") == ["l29", "l28"]
    assert len(shown("--top", "50")) == 29
    output = run("compare", first, "b.json", "--layers").output
    assert "l00" in output and "not shown" not in output
    output = words(run("compare", first, "b.json", "--top", "2").output)
    assert (
        "not shown 27 layers more changed, --layers shows all; 1 layer changed by less than 0.05 "
        "points" in output
    )


def test_json_on_stdout_is_all_there_is_on_stdout(run, files):
    outcome = run("compare", *files, "--json", "-", "--fail-if", "*:dead>30%")
    assert (outcome.code, outcome.error) == (0, "")
    values = json.loads(outcome.output)
    assert values["schema_version"] == 1
    assert [own["name"] for own in values["profiles"]] == ["before.json", "after.json"]
    assert [layer["name"] for layer in values["layers"]] == ["stem", "conv"]
    assert values["gates"] == [
        {
            "expression": "*:dead>30%",
            "passed": True,
            "values": [
                {"layer": "conv", "value": 0.25}, {"layer": "stem", "value": 0.1},
                {"layer": "new", "value": 0.0},
            ],
            "left_out": [],
        }
    ]  # fmt: skip


def test_json_to_a_file_beside_the_report(run, files):
    assert "in all" in run("compare", *files, "--json", "new.json").output
    first = Path("new.json").read_bytes()
    assert json.loads(first)["gates"] == []
    refused(run("compare", *files, "--json", "new.json"), 3, "new.json exists")
    assert run("compare", *files, "--json", "new.json", "--force", "--quiet") == (0, "", "")
    assert Path("new.json").read_bytes() == first


def test_stdin_is_one_of_the_files(run, files, monkeypatch):
    content = io.BytesIO(files[1].read_bytes())
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(content))
    values = json.loads(run("compare", files[0], "-", "--json", "-").output)
    assert [own["name"] for own in values["profiles"]] == ["before.json", "stdin"]
    assert values["layers"][1]["dead"]["change"] == 0.25
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"nothing")))
    refused(run("compare", files[0], "-"), 3, "stdin: is not a profile in JSON (Expecting value")


def test_saved_profiles_and_what_the_program_wrote(run):
    profile(net(), data()).save("saved.safetensors")
    written(profile(net(), data()).to_dict(model="net"), "same.json")
    outcome = run("compare", "saved.safetensors", "same.json")
    assert outcome.code == 0
    assert "saved.safetensors: a model without a name; weights not named" in words(outcome.output)
    assert run("profile", *SMALL, "--json", "one.json", "--quiet").code == 0
    assert run("profile", *SMALL, "--seed", "1", "--json", "two.json", "--quiet").code == 0
    outcome = run("compare", "one.json", "two.json")
    assert (outcome.code, outcome.error) == (0, "")
    assert f"one.json: {MODEL}; weights random; data sample" in words(outcome.output)
    assert "note the seed differs (0 in A, 1 in B): what was drawn" in words(outcome.output)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ("", "Missing argument 'FILE': see fastplastic compare --help"),
        (
            "before.json",
            "before.json alone cannot be compared: name two profiles or more, as in fastplastic "
            "compare before.json after.json",
        ),
        ("- before.json -", "- stands twice: stdin can be read once, name a file for the other"),
        (
            "before.json after.json --top 3 --layers",
            "--top 3 beside --layers, which shows all: drop one",
        ),
        ("before.json after.json --top 0", "'--top'"),
        (
            "before.json after.json --json before.json --force",
            "--json before.json is one of the profiles: name another file",
        ),
        ("none.json none.json --fail-if dead>5", "--fail-if 'dead>5': '5' is not a share in 0..1"),
        ("before.json other.json", "no layer is in all 2 profiles (the first of each: 'stem', 'x"),
        ("before.json after.json --fail-if x:dead>0", "--fail-if 'x:dead>0': no layer like 'x' am"),
    ],
)
def test_bad_usage_is_refused_in_one_line(run, files, arguments, text):
    written(a_profile(a_layer("x")), "other.json")
    before = files[0].read_bytes()
    refused(run("compare", *arguments.split()), 2, text)
    assert files[0].read_bytes() == before


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("none.json", "none.json: no such file, expected a profile: check the path"),
        ("none.safetensors", "none.safetensors: no such file, expected a profile: check the path"),
        ("list.json", "list.json: is JSON but not a profile: check the file name"),
        ("newer.json", "newer.json: is a profile of schema 2, expected 1: read it with"),
        ("negative.json", "'samples' is -1, expected an integer from 0 on; the file is damaged: p"),
        ("compared.json", "compared.json: is JSON but not a profile, expected what fastplastic"),
        ("plan.safetensors", "plan.safetensors: cannot be read ("),
    ],
)
def test_files_that_are_no_profiles(run, files, name, text):
    run("compare", *files, "--json", "compared.json", "--quiet")
    written("[1]", "list.json")
    written(a_profile(schema_version=2), "newer.json")
    written(a_profile(samples=-1), "negative.json")
    Path("plan.safetensors").write_bytes(b"no")
    refused(run("compare", files[0], name), 3, text)


def test_a_gate_that_fails_ends_with_its_exit_code_after_the_report(run, files):
    gates = ("--fail-if", "dead>0.1", "--fail-if", "conv:dead>20%", "--fail-if", "frozen>0")
    outcome = run("compare", *files, *gates, "--json", "new.json")
    assert outcome.code == 4
    assert outcome.error == (
        "fastplastic: error: --fail-if dead>0.1: dead is 15.79 % over all units\n"
        "fastplastic: error: --fail-if conv:dead>20%: dead in 1 of 1 layers: conv 25 %\n"
    )
    text = words(outcome.output)
    assert "gate FAILED: dead>0.1: dead is 15.79 % over all units" in text
    assert "gate passed: frozen>0: frozen is 0 % over all units" in text
    found = json.loads(Path("new.json").read_text())["gates"]
    assert [gate["passed"] for gate in found] == [False, False, True]
    quiet = run("compare", *files, *gates, "--quiet")
    assert quiet == (4, "", outcome.error)
    printed = run("compare", *files, *gates, "--json", "-")
    assert (printed.code, json.loads(printed.output)["gates"]) == (4, found)


def test_gates_on_the_change(run, files):
    passing = run("compare", *files, "--quiet", "--fail-if", "change:dead>0.14")
    assert passing == (0, "", "")
    failing = run("compare", *files, "--quiet", "--fail-if", "change:c*:dead>0.02")
    assert failing == (
        4, "",
        "fastplastic: error: --fail-if change:c*:dead>0.02: the change of dead in 1 of 1 layers: "
        "conv +25 %\n",
    )  # fmt: skip


def test_layers_without_the_figure_are_left_out_and_said(run, files):
    written(a_profile(a_layer("stem", 10), a_layer("conv", 20, dead=None)), "unknown.json")
    outcome = run("compare", files[0], "unknown.json", "--quiet", "--fail-if", "*:dead>0.5")
    assert outcome == (
        0, "",
        "fastplastic: warning: --fail-if *:dead>0.5: dead is not known of 1 layer, left out: "
        "conv\n",
    )  # fmt: skip
    text = "--fail-if 'conv:dead>0.5': dead is not known of any layer that it is about (conv): take"
    refused(run("compare", files[0], "unknown.json", "--fail-if", "conv:dead>0.5"), 2, text)


def test_gates_of_profile(run):
    passing = run("profile", *SMALL, "--fail-if", "mean_abs_activation<0", "--json", "a.json")
    assert (passing.code, passing.error) == (0, "")
    assert "gate passed: mean_abs_activation<0: mean_abs_activation is" in words(passing.output)
    (gate,) = json.loads(Path("a.json").read_text())["gates"]
    assert gate["passed"] and gate["values"][0]["layer"] is None
    totals = json.loads(Path("a.json").read_text())["totals"]
    limit = f"dead>={totals['dead'] / totals['units']!r}"
    failing = run("profile", *SMALL, "--fail-if", limit, "--quiet")
    assert (failing.code, failing.output) == (4, "")
    assert failing.error.startswith(f"fastplastic: error: --fail-if {limit}: dead is ")
    assert run("compare", "a.json", "a.json", "--quiet", "--fail-if", limit).code == 4
    printed = run("profile", *SMALL, "--fail-if", "layer*:dormant>=0", "--json", "-")
    assert printed.code == 4
    assert not json.loads(printed.output)["gates"][0]["passed"]


def test_a_pattern_that_matches_no_layer_is_refused_before_anything_is_measured(run, monkeypatch):
    def measure(*arguments, **options):
        raise AssertionError("it was measured")

    monkeypatch.setattr("fastplastic.profile", measure)
    for gate in ("head*:dead>0", "layer1.0.conv:dead>0"):
        outcome = run("profile", *SMALL, "--fail-if", "conv1.0:dead>9%", "--fail-if", gate)
        pattern = gate.partition(":")[0]
        refused(outcome, 2, f"--fail-if {gate!r}: no layer like {pattern!r} among")
    assert "did you mean layer1.0.conv" in outcome.error


def test_looking_for_layers_first_changes_no_figure(run):
    common = ["profile", *SMALL, "-q"]
    assert run(*common, "--json", "a.json", "--html", "a.html").code == 0
    gate = ("--fail-if", "conv1.*:dead>100%")
    assert run(*common, "--json", "b.json", "--html", "b.html", *gate).code == 0
    first, second = (json.loads(Path(name).read_text()) for name in ("a.json", "b.json"))
    assert second.pop("gates")[0]["passed"]
    assert first == second
    digests = [re.findall("sha256 [0-9a-f]{64}", Path(x).read_text()) for x in ("a.html", "b.html")]
    assert digests[0] == digests[1] and len(digests[0]) == 1


def test_looking_for_layers_first_draws_nothing(run, monkeypatch):
    """What a model draws while it is measured, in dropout for one, is the same with and without."""
    states, read = [], DataSource.__iter__

    def drawing(source):
        torch.rand(1)
        return read(source)

    def measure(*arguments, **options):
        states.append(torch.get_rng_state())
        raise InputError("enough")

    monkeypatch.setattr(DataSource, "__iter__", drawing)
    monkeypatch.setattr("fastplastic.profile", measure)
    run("profile", *SMALL)
    run("profile", *SMALL, "--fail-if", "conv1.*:dead>100%")
    assert torch.equal(*states)


@pytest.mark.parametrize(
    ("gate", "text"),
    [
        ("dead", "--fail-if 'dead': expected [change:][PATTERN:]METRIC>NUMBER, or >=, <, <=, with"),
        ("change:dead>0.1", "there is one profile only: use fastplastic compare"),
        ("conv*:dormnt>5%", "no metric 'dormnt' among 6: did you mean dormant?"),
    ],
)
def test_gates_of_profile_are_read_before_anything_slow(run, nothing_slow, gate, text):
    refused(run("profile", "m", "--fail-if", gate), 2, text)


@pytest.mark.parametrize("width", [60, 80, 120])
def test_terminals_of_any_width(run, files, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    long = a_profile(a_layer("a.very." * 9 + "long.name", 20, dead=3), a_layer("stem", 10, dead=9))
    written(long, "long.json")
    for arguments in (files, ("long.json", *files)):
        outcome = run("compare", *arguments, "--layers")
        assert outcome.code == 0
        assert max(map(len, outcome.output.splitlines())) <= width


def loaded(code, folder):
    program = f"{code}\nimport sys\nprint()\nprint(*sys.modules)"
    result = subprocess.run(
        [sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True,
        cwd=folder,
    )  # fmt: skip
    return {name.partition(".")[0] for name in result.stdout.splitlines()[-1].split()}


def test_profiles_in_json_are_compared_without_torch(files, tmp_path):
    command = (
        "['compare', 'before.json', 'after.json', '--html', 'new.html', '--fail-if', 'dead>1']"
    )
    found = loaded(f"from fastplastic.cli.main import main\nassert not main({command})", tmp_path)
    assert not found & {"torch", "numpy", "timm", "numba", "triton", "safetensors"}
    code = "import fastplastic\nfastplastic.compare('before.json', 'after.json')"
    assert not loaded(code, tmp_path) & {"torch", "numpy", "rich", "typer"}
