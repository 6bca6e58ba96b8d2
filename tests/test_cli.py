import io
import json
import os
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from helpers.program import SMALL, refused

import fastplastic
from fastplastic.cli import options, parsing, terminal
from fastplastic.cli import profile as profile_command
from fastplastic.cli.compare_options import CompareOptions
from fastplastic.cli.interrupts import Terminated
from fastplastic.cli.main import main
from fastplastic.cli.options import DataOptions, PlanOptions, ProfileOptions, ReinitOptions
from fastplastic.criteria import CRITERIA, WEIGHT_CRITERIA
from fastplastic.errors import FileError, GateError, InputError
from fastplastic.initial import INITIALIZERS, SUMMARIES
from fastplastic.kernels import ACTIVATIONS
from fastplastic.planning import GRANULARITIES
from fastplastic.trials import better_than_random


def test_help_names_the_commands_and_shows_examples(run):
    for arguments in ([], ["--help"], ["-h"]):
        outcome = run(*arguments)
        assert outcome.code == 0
        for word in (
            "profile",
            "compare",
            "plan",
            "reinit",
            "Examples",
            "fastplastic profile resnet50",
        ):
            assert word in outcome.output


@pytest.mark.parametrize("command", ["profile", "compare", "plan", "reinit"])
def test_help_of_a_command_lists_every_option(run, command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    outcome = run(command, "--help")
    assert outcome.code == 0
    classes = {"profile": ProfileOptions, "plan": PlanOptions, "reinit": ReinitOptions}
    classes["compare"] = CompareOptions
    for name in set(get_type_hints(classes[command])) - {"model", "files"}:
        assert f"--{name.replace('_', '-')}" in outcome.output


def test_version(run):
    assert run("--version") == (0, f"fastplastic {fastplastic.__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ("nonsense", "No such command 'nonsense'"),
        ("profile", "Missing argument 'MODEL'"),
        ("profile m --bathces 2", "No such option: --bathces"),
        ("profile m --batches 0", "'--batches'"),
        ("profile m -b none", "'-b'"),
        ("profile m --input-size 3 224", "'--input-size' requires 3 arguments"),
        ("profile m --input-size 3 224 0", "--input-size 3 224 0: expected three numbers above 0"),
        ("profile m --model-kwargs drop", "--model-kwargs drop: expected KEY=VALUE"),
        (
            "profile m --checkpoint f --pretrained",
            "--pretrained and --checkpoint both name weights",
        ),
        ("plan m", "neither of --ratio and --threshold given"),
        ("plan m --ratio 0.1 --threshold 1", "both of --ratio and --threshold given"),
        ("plan m --ratio 0", "--ratio 0: expected a share in (0, 1]"),
        ("plan m --ratio 1.5", "--ratio 1.5: expected a share in (0, 1]"),
        ("plan m --ratio nan", "--ratio nan: expected a share in (0, 1]"),
        ("plan m --ratio 0.1 --max-layer-fraction 2", "--max-layer-fraction 2: expected a share"),
        ("plan m --threshold inf", "--threshold inf: expected a finite number"),
        (
            "plan m --ratio 0.1 --criterion worst",
            "--criterion: no criterion 'worst' among 14, expected one such as dead",
        ),
        ("plan m --ratio 0.1 --granularity layer", "'layer' is not"),
        ("reinit m --ratio 0.1", "no -o/--output: name a .safetensors file, or add --dry-run"),
        ("reinit m --ratio 0.1 -o f.tar", "-o f.tar: expected a name that ends in .safetensors or"),
        ("reinit m -o f.safetensors", "neither of --ratio and --threshold given"),
        ("reinit m --plan p --ratio 1 --dry-run", "--ratio beside --plan"),
        ("reinit m --plan p --scope layer --dry-run", "--scope beside --plan"),
        ("reinit m --plan p --sample-positions 9 --dry-run", "--sample-positions beside --plan"),
    ],
)
def test_bad_usage_is_refused_in_one_line_before_anything_slow(run, nothing_slow, arguments, text):
    refused(run(*arguments.split()), 2, text)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ("profile m --checkpoint none.pth", "--checkpoint none.pth: no such file"),
        ("profile m --json old.json", "old.json exists: give another name, or --force"),
        ("profile m --json folder", "cannot write folder: it is a folder"),
        ("plan m --ratio 0.1 -o old.json", "old.json exists"),
        ("plan m --ratio 0.1 -o none/plan.json", "there is no folder none: make it first"),
        ("reinit m --ratio 0.1 -o old.safetensors", "old.safetensors exists"),
        ("reinit m --plan none.json --dry-run", "--plan none.json: no such file"),
        ("reinit m --plan old.json --dry-run", "old.json"),
    ],
)
def test_bad_files_are_refused_in_one_line_before_anything_slow(
    run, nothing_slow, tmp_path, arguments, text
):
    for name in ("old.json", "old.safetensors"):
        (tmp_path / name).write_text("old")
    (tmp_path / "folder").mkdir()
    refused(run(*arguments.split()), 3, text)
    assert (tmp_path / "old.json").read_text() == "old"


def test_folder_without_permission(run, nothing_slow, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    refused(run("profile", "m", "--json", "new.json"), 3, "no permission in .: give another")


def test_unknown_model_with_near_names(run):
    outcome = run("profile", "resnet5", "--no-pretrained")
    refused(outcome, 2, "unknown model 'resnet5'")
    assert "resnet50" in outcome.error


@pytest.mark.parametrize("device", ["abacus", "cuda:77"])
def test_device_that_is_not_there(run, device):
    refused(run("profile", *SMALL, "--device", device), 2, f"--device {device}: not usable here")


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (Terminated(), 143, "interrupted"),
        (FileError("a\x1b[31m\udcff"), 3, r"a\x1b[31m\udcff"),
        (InputError("a: b"), 2, "error: a: b\n"),
        (FileError("a:\nb"), 3, "error: a: b\n"),
        (GateError("a\nb"), 4, "error: a b\n"),
        (ZeroDivisionError("by\nzero"), 1, "ZeroDivisionError: by zero (FASTPLASTIC_DEBUG=1"),
    ],
)
def test_every_failure_has_its_exit_code_and_one_line(run, monkeypatch, error, code, text):
    def measure(*arguments, **keywords):
        raise error

    monkeypatch.setattr(profile_command, "measure", measure)
    refused(run("profile", "m"), code, text)
    monkeypatch.setenv("FASTPLASTIC_DEBUG", "1")
    outcome = run("profile", "m")
    assert outcome.code == code
    assert "Traceback" in outcome.error


def test_choices_are_those_of_the_library():
    hints = get_type_hints(ReinitOptions)
    assert get_args(hints["granularity"]) == GRANULARITIES
    assert set(get_args(hints["init"])) == set(INITIALIZERS)


def test_list_of_criteria(run, monkeypatch):
    shown = run("list", "criteria")
    assert shown.code == 0
    for rule in (*CRITERIA.values(), *WEIGHT_CRITERIA.values()):
        assert rule.name in shown.output
    entries = json.loads(run("list", "criteria", "--json").output)
    units, weights = (
        [entry["name"] for entry in entries if entry["granularity"] == granularity]
        for granularity in GRANULARITIES
    )
    assert units == list(CRITERIA) and weights == list(WEIGHT_CRITERIA)
    for entry, rule in zip(entries, (*CRITERIA.values(), *WEIGHT_CRITERIA.values()), strict=True):
        own = CRITERIA if entry["granularity"] == "unit" else WEIGHT_CRITERIA
        assert own[entry["name"]] is rule
        told = [entry[key] for key in ("formula", "source", "needs", "better_than_random")]
        record = better_than_random(entry["granularity"], rule.name)
        assert told == [rule.summary, rule.source, rule.needs, record and list(record)]
    told = {entry["name"]: entry for entry in entries[: len(units)]}
    assert all(
        [told[name][key] for key in ("candidates", "threshold", "only")]
        == [rule.candidate, rule.threshold, rule.only or None]
        for name, rule in CRITERIA.items()
    )
    monkeypatch.setenv("COLUMNS", "400")
    output = run("list", "criteria").output
    lines = {
        line.split()[1]: line.rstrip() for line in output.splitlines() if line.startswith("unit ")
    }
    for name, rule in CRITERIA.items():
        assert rule.summary + (f"; only {rule.only}" if rule.only else "") in lines[name]
    assert lines["dormant"].split()[3] == "0.025" and lines["random"].split()[3] == "-"
    wins = better_than_random("unit", "dormant")
    assert wins and lines["dormant"].endswith("{} of {}".format(*wins))
    refused(run("list", "layers"), 2, "criteria")
    assert [e["name"] for e in json.loads(run("list", "criteria", "dorm*", "--json").output)] == [
        "dormant"
    ]


def test_lists_of_all_else(run):
    laws = json.loads(run("list", "initializers", "--json").output)
    assert [law["name"] for law in laws] == list(INITIALIZERS)
    functions = json.loads(run("list", "activations", "--json").output)
    assert [function["name"] for function in functions] == list(ACTIVATIONS)
    assert all(law["says"] == SUMMARIES[law["name"]] for law in laws)
    first = run("list", "initializers", "kaiming_u").output.split(maxsplit=1)
    assert first[0] == "kaiming_uniform" and first[1].strip() == SUMMARIES["kaiming_uniform"]
    assert "identity  |f'(z)| <= 0.01 nowhere" in run("list", "activations", "identity").output
    relu = run("list", "activations", "relu6").output
    assert "in [-inf, 0] and in [6, inf]" in relu and "gelu" not in relu
    models = run("list", "models", "resnet18*").output.splitlines()
    assert {"resnet18", "resnet18.a1_in1k"} <= set(models)
    assert all(name.startswith("resnet18") for name in models)
    assert "test_resnet" in run("list", "models", "st_resn").output.splitlines()
    assert run("list", "models", "resnet1[8]").output == "resnet18\n"
    named = {x["name"]: x["pretrained"] for x in json.loads(run("list", "models", "--json").output)}
    assert named["resnet18"] and named["resnet18.a1_in1k"] and not named["botnet50ts_256"]
    message = "list models resnet1800: none has such a name: fastplastic list models shows all"
    refused(run("list", "models", "resnet1800"), 2, message)


def test_model_kwargs_are_spread_as_in_timm(run, monkeypatch):
    seen = []
    monkeypatch.setattr(profile_command, "measure", lambda given, **_: seen.append(given) or 1 / 0)
    run("profile", "--model-kwargs", "a=1", "b=x", "c=(1, 2)", "m", "--model-kwargs", "d=")
    assert seen[0].model == "m"
    assert seen[0].keywords() == {"a": 1, "b": "x", "c": (1, 2), "d": ""}


def test_arguments_repeat_what_was_given():
    given = PlanOptions(
        model="m",
        pretrained=False,
        checkpoint=Path("a b.pth"),
        input_size=(3, 32, 32),
        model_kwargs=["a=1", "b=2"],
        channels_last=True,
        batch_size=8,
        ratio=0.5,
        include=["x.*"],
    )
    model = "m --no-pretrained --checkpoint|a b.pth --input-size 3 32 32".replace(" ", "|")
    expected = model.replace("a|b.pth", "a b.pth").split("|")
    expected += ["--model-kwargs", "a=1", "--model-kwargs", "b=2"]
    expected += ["--channels-last"]
    assert parsing.arguments(given, options.ModelOptions) == expected
    expected += ["--batch-size", "8"]
    assert parsing.arguments(given, DataOptions) == expected
    assert parsing.arguments(given, PlanOptions)[-4:] == ["--ratio", "0.5", "--include", "x.*"]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_shows_on_a_terminal_only(monkeypatch):
    for stream, quiet, shown in (
        (Terminal(), False, True),
        (Terminal(), True, False),
        (io.StringIO(), False, False),
    ):
        monkeypatch.setattr(sys, "stderr", stream)
        with terminal.progress(3, quiet=quiet) as done:
            assert (done is not None) is shown
            if done:
                done(2)
        assert ("2/3" in stream.getvalue()) is shown


def test_what_is_done_before_the_first_batch_shows_too(monkeypatch):
    monkeypatch.setattr(sys, "stderr", stream := Terminal())
    with terminal.waiting("loading it", quiet=False):
        pass
    with terminal.progress(3, quiet=False, before="tracing it") as done:
        done(1)
    output = stream.getvalue()
    assert output.index("loading it") < output.index("tracing it") < output.index("profiling")
    for stream, quiet in ((Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr(sys, "stderr", stream)
        with terminal.waiting("loading it", quiet=quiet):
            pass
        assert not stream.getvalue()


@pytest.mark.parametrize(
    ("line", "number", "expected"),
    [("fastplastic pr", 1, ["profile"]), ("fastplastic profile --sam", 2, ["--sample-positions"])],
)
def test_shells_complete_commands_and_options(monkeypatch, capsys, line, number, expected):
    monkeypatch.setenv("_FASTPLASTIC_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", line)
    monkeypatch.setenv("COMP_CWORD", str(number))
    with pytest.raises(SystemExit) as end:
        main([])
    assert end.value.code == 0
    assert capsys.readouterr().out.splitlines() == expected
