import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import timm
import torch
from safetensors.torch import load_file

import fastplastic
from fastplastic.cli import options, terminal
from fastplastic.cli import profile as profile_command
from fastplastic.cli.main import main
from fastplastic.cli.options import DataOptions, PlanOptions, ProfileOptions, ReinitOptions
from fastplastic.criteria import CRITERIA, WEIGHT_CRITERIA
from fastplastic.errors import FileError, InputError
from fastplastic.initial import INITIALIZERS
from fastplastic.planning import GRANULARITIES, Plan

# A model that timm has for tests, on few and small images.
MODEL = "test_resnet"
SMALL = (MODEL, "--no-pretrained", "--img-size", "32", "-b", "4", "--batches", "2")


@pytest.fixture(scope="module")
def plan_file(tmp_path_factory):
    """A plan that takes a tenth of the units of the model."""
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    assert main(["plan", *SMALL, "--ratio", "0.1", "-o", str(path), "--quiet"]) == 0
    return path


def refused(outcome, code, text):
    assert outcome.code == code
    assert outcome.output == ""
    assert text in outcome.error
    assert outcome.error.startswith("fastplastic: error: ")
    assert outcome.error.count("\n") == 1


def test_help_names_the_commands_and_shows_examples(run):
    for arguments in ([], ["--help"], ["-h"]):
        outcome = run(*arguments)
        assert outcome.code == 0
        for word in ("profile", "plan", "reinit", "Examples", "fastplastic profile resnet50"):
            assert word in outcome.output


@pytest.mark.parametrize("command", ["profile", "plan", "reinit"])
def test_help_of_a_command_lists_every_option(run, command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    outcome = run(command, "--help")
    assert outcome.code == 0
    classes = {"profile": ProfileOptions, "plan": PlanOptions, "reinit": ReinitOptions}
    for name in set(get_type_hints(classes[command])) - {"model"}:
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
            "'--criterion': 'worst' is not one of 'dead'",
        ),
        ("plan m --ratio 0.1 --granularity layer", "'layer' is not"),
        ("reinit m --ratio 0.1", "no -o/--output: name a .safetensors file, or add --dry-run"),
        ("reinit m --ratio 0.1 -o f.pth", "-o f.pth: expected a name that ends in .safetensors"),
        ("reinit m -o f.safetensors", "neither of --ratio and --threshold given"),
        ("reinit m --plan p --ratio 1 --dry-run", "--ratio beside --plan"),
        ("reinit m --plan p --scope layer --dry-run", "--scope beside --plan"),
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
        (InputError("a: b"), 2, "error: a: b\n"),
        (FileError("a:\nb"), 3, "error: a: b\n"),
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
    criteria = {name for part in get_args(hints["criterion"]) for name in get_args(part)}
    assert criteria == {*CRITERIA, *WEIGHT_CRITERIA}
    assert get_args(hints["granularity"]) == GRANULARITIES
    assert set(get_args(hints["init"])) == set(INITIALIZERS)


def test_list_of_criteria(run):
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
    assert next(e for e in entries if e["name"] == "dormant")["threshold"] == 0.025
    refused(run("list", "layers"), 2, "criteria")


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
    assert options.arguments(given, options.ModelOptions) == expected
    expected += ["--batch-size", "8", "--channels-last"]
    assert options.arguments(given, DataOptions) == expected
    assert options.arguments(given, PlanOptions)[-4:] == ["--ratio", "0.5", "--include", "x.*"]


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


def test_profile_prints_the_report(run):
    outcome = run("profile", *SMALL)
    assert (outcome.code, outcome.error) == (0, "")
    for word in ("model", MODEL, "weights", "random", "eval", "8 in 2 batches", "layer2", "relu"):
        assert word in outcome.output
    for word in (
        "dead",
        "dormant",
        "saturated",
        "resettable",
        "coverage",
        "next: fastplastic plan",
    ):
        assert word in outcome.output
    assert "fresh head of 10 was used" in " ".join(outcome.output.split())


def test_the_next_command_of_each_command_can_be_typed(run):
    outcome = run("profile", *SMALL)
    command = outcome.output.partition("next: fastplastic ")[2].split()
    outcome = run(*command)
    assert outcome.code == 0
    command = outcome.output.partition("next: fastplastic ")[2].split()
    assert run(*command).code == 0
    assert Path(f"{MODEL}-fresh.safetensors").is_file()


SCHEMA = {
    "schema_version", "fastplastic_version", "model", "weights", "data", "device", "dtype", "mode",
    "samples", "seed", "coverage", "totals", "layers",
}  # fmt: skip
LAYER = {
    "name", "kind", "activation", "units", "hidden", "dead", "frozen", "dormant",
    "saturated_fraction", "mean_abs_activation", "mean_abs_gradient",
}  # fmt: skip


def test_json_on_stdout_is_all_there_is_on_stdout(run):
    outcome = run("profile", *SMALL, "--json", "-")
    assert (outcome.code, outcome.error) == (0, "")
    schema = json.loads(outcome.output)
    assert set(schema) >= SCHEMA
    assert set(schema["layers"][0]) >= LAYER
    assert schema["schema_version"] == 1
    assert (schema["model"], schema["weights"], schema["mode"]) == (MODEL, "random", "eval")
    assert schema["samples"] == 8
    assert schema["coverage"]["found"] == schema["coverage"]["measured"] == len(schema["layers"])
    assert set(schema["totals"]) >= {
        "layers", "units", "hidden_units", "dead", "frozen", "dormant",
    }  # fmt: skip


def test_json_to_a_file_beside_the_report(run):
    assert "coverage" in run("profile", *SMALL, "--json", "new.json").output
    first = Path("new.json").read_bytes()
    assert json.loads(first)["model"] == MODEL
    refused(run("profile", *SMALL, "--json", "new.json"), 3, "new.json exists")
    assert run("profile", *SMALL, "--json", "new.json", "--force", "--quiet") == (0, "", "")
    assert Path("new.json").read_bytes() == first


def test_without_a_hub_profile_goes_on_with_random_weights_under_a_warning(run):
    outcome = run("profile", MODEL, *SMALL[2:], "--json", "-")
    assert outcome.code == 0
    assert json.loads(outcome.output)["weights"] == "random"
    assert "fastplastic: warning: RANDOM WEIGHTS" in outcome.error
    assert outcome.error.count("\n") == 1


def test_without_a_hub_pretrained_and_reinit_refuse(run):
    refused(run("profile", MODEL, "--pretrained"), 3, "pretrained weights cannot be had")
    arguments = ("--ratio", "0.1", "-o", "new.safetensors")
    refused(run("reinit", MODEL, *arguments), 3, "pretrained weights cannot be had")
    assert not Path("new.safetensors").exists()


def test_without_a_hub_plan_does_not_lead_to_reinit(run):
    outcome = run("plan", MODEL, *SMALL[2:], "--ratio", "0.1")
    assert outcome.code == 0
    assert "RANDOM WEIGHTS" in outcome.error
    assert "next" not in outcome.output


@pytest.mark.parametrize(
    ("more", "tolerance"),
    [
        (["--channels-last"], 1e-4),
        (["--amp"], 0.05),
        (["--amp", "--amp-dtype", "float16"], 0.01),
    ],
)
def test_other_precision_and_layout_measure_the_same(run, more, tolerance):
    def layers(*more):
        outcome = run("profile", *SMALL, *more, "--json", "-")
        assert outcome.code == 0, outcome.error
        return json.loads(outcome.output)["layers"]

    for plain, other in zip(layers(), layers(*more), strict=True):
        for key in ("name", "units", "hidden", "activation"):
            assert other[key] == plain[key]
        for key in ("mean_abs_activation", "mean_abs_gradient", "saturated_fraction"):
            assert other[key] == pytest.approx(plain[key], rel=tolerance, abs=1e-3 * tolerance)


def test_amp_is_named_in_the_header(run):
    assert "amp bfloat16" in run("profile", *SMALL, "--amp").output


@pytest.mark.parametrize("data", ["noise", "sample"])
def test_input_size_and_classes_reach_model_and_data(run, data):
    shape = ("--input-size", "1", "160", "96", "--num-classes", "7", "--data", data)
    arguments = ("test_vit", "--no-pretrained", "-b", "2", "--batches", "1", *shape)
    outcome = run("reinit", *arguments, "--ratio", "0.1", "-o", "new.safetensors")
    assert outcome.code == 0, outcome.error
    assert "samples  2 in 1 batch," in outcome.output
    new = load_file("new.safetensors")
    assert new["patch_embed.proj.weight"].shape[1] == 1
    assert new["pos_embed"].shape[1] == 1 + 10 * 6
    assert new["head.bias"].shape == (7,)


def test_plan_previews_and_writes(run):
    outcome = run("plan", *SMALL, "--ratio", "0.1", "-o", "plan.json")
    assert (outcome.code, outcome.error) == (0, "")
    plan = Plan.load("plan.json")
    assert plan.count == int(0.1 * plan.eligible) > 0
    assert f"{plan.count} of {plan.eligible} eligible units" in outcome.output
    for name in plan.units:
        assert name in outcome.output
    refused(run("plan", *SMALL, "--ratio", "0.1", "-o", "plan.json"), 3, "plan.json exists")


def test_plan_passes_every_option_on(run):
    more = ("--criterion", "random", "--scope", "layer", "--seed", "3", "--ratio", "0.2")
    filters = ("--include", "layer*", "--exclude", "layer1*", "--max-layer-fraction", "0.25")
    assert run("plan", *SMALL, *more, *filters, "-o", "plan.json").code == 0
    plan = Plan.load("plan.json")
    assert (plan.criterion, plan.scope, plan.seed, plan.ratio) == ("random", "layer", 3, 0.2)
    assert plan.max_layer_fraction == 0.25
    assert plan.units
    assert all(name.startswith("layer") and name[5] != "1" for name in plan.units)


def weights_before(**keywords):
    return fastplastic_model(**keywords).state_dict()


def fastplastic_model(**keywords):
    from fastplastic.sources import create_model

    return create_model(MODEL, pretrained=False, img_size=32, **keywords).model


def test_reinit_writes_a_checkpoint_that_timm_loads(run, plan_file):
    outcome = run("reinit", *SMALL[:4], "--plan", plan_file, "-o", "new.safetensors")
    assert (outcome.code, outcome.error) == (0, "")
    new, old = load_file("new.safetensors"), weights_before()
    timm.create_model(MODEL).load_state_dict(new, strict=True)
    for name, units in Plan.load(plan_file).units.items():
        changed = (new[f"{name}.weight"] != old[f"{name}.weight"]).flatten(1).any(1)
        assert changed[units].all()
        assert name in outcome.output
    assert torch.equal(new["fc.bias"], old["fc.bias"])
    assert "new.safetensors" in outcome.output


def test_reinit_plans_on_the_spot_as_plan_does(run, plan_file):
    run("reinit", *SMALL[:4], "--plan", plan_file, "-o", "one.safetensors")
    run("reinit", *SMALL, "--ratio", "0.1", "-o", "two.safetensors")
    one, two = load_file("one.safetensors"), load_file("two.safetensors")
    assert all(torch.equal(one[name], two[name]) for name in one | two)


def test_reinit_options_matter(run, plan_file):
    written = []
    for index, more in enumerate(([], ["--init", "empirical"], ["--outgoing", "keep"])):
        name = f"{index}.safetensors"
        assert run("reinit", *SMALL[:4], "--plan", plan_file, *more, "-o", name).code == 0
        written.append({key: value.tolist() for key, value in load_file(name).items()})
    assert written[0] != written[1] != written[2] != written[0]


def test_dry_run_writes_nothing(run, plan_file, tmp_path):
    more = ("--plan", plan_file, "--dry-run", "-o", "new.safetensors")
    outcome = run("reinit", *SMALL[:4], *more)
    assert (outcome.code, outcome.error) == (0, "")
    assert "nothing was written" in outcome.output
    assert "next" not in outcome.output
    assert not list(tmp_path.glob("*.safetensors"))


def test_plan_of_another_model(run, plan_file, tmp_path):
    other = (MODEL, "--no-pretrained", "--num-classes", "7", "--plan", plan_file)
    refused(run("reinit", *other, "-o", "new.safetensors"), 3, "the plan is for the model")
    assert not list(tmp_path.glob("*.safetensors"))


def test_checkpoint_is_used(run):
    torch.save(weights_before(seed=5), "weights.pth")
    arguments = (MODEL, "--checkpoint", "weights.pth", *SMALL[2:], "--json", "-")
    schema = json.loads(run("profile", *arguments).output)
    assert schema["weights"] == "checkpoint: weights.pth"
    assert schema["layers"] != json.loads(run("profile", *SMALL, "--json", "-").output)["layers"]


def test_checkpoint_that_does_not_fit(run):
    torch.save(fastplastic_model(num_classes=3).state_dict(), "weights.pth")
    refused(run("profile", MODEL, "--checkpoint", "weights.pth"), 3, "does not fit the model")
    Path("broken.pth").write_bytes(b"broken")
    refused(run("profile", MODEL, "--checkpoint", "broken.pth"), 3, "broken.pth: ")


def test_folders_of_images_that_are_not_there(run, tmp_path):
    (tmp_path / "empty").mkdir()
    refused(run("profile", *SMALL, "--data", "empty"), 3, "empty: ")
    refused(run("profile", *SMALL, "--data", "none/such"), 3, "none/such: no such folder")


@pytest.mark.parametrize("argument", ["--version", "--help"])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_goes_away_is_no_traceback(argument, unbuffered):
    program = [sys.executable, "-m", "fastplastic", argument]
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(program, env=environment, **pipes) as process:
        process.stdout.close()
        error = process.stderr.read()
    assert (process.returncode, error) == (1, b"")


def test_narrow_terminals(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    outcome = run("profile", *SMALL)
    *report, following = outcome.output.splitlines()
    assert max(map(len, report)) <= 60
    assert following.startswith("next: fastplastic plan")
    assert len(following) > 60


def test_no_color(run, monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b[33m" in run("profile", *SMALL).output
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[33m" not in run("profile", *SMALL).output
