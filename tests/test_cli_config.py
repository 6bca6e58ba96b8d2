"""--config: what stands in the file is as if it had been typed, and is checked as strictly."""

from pathlib import Path

import pytest
import typer
from helpers.program import refused

from fastplastic.cli import parsing
from fastplastic.cli.main import app
from fastplastic.cli.options import ProfileOptions

EXPERIMENT = """
model = "m"
seed = 3
pretrained = false
img-size = 64
input_size = [3, 32, 32]
model-kwargs = ["a=1", "b=2"]
layers = true
json = "shared.json"

[profile]
batch-size = 8
img-size = 32
fail-if = ["dead>5%"]
sort = "dead"

[trial]
data = "DIR"
arm = ["swr@0.05", "remove"]
scale = [0.5, 1]
lr = 1
warmup-epochs = 0.5

[compare]
files = ["a.json", "b.json"]

[explain]
layer = "conv1"
json = true

[list]
what = "models"
"""


@pytest.fixture
def parsed(tmp_path, monkeypatch):
    """Return a function that gives the options of a command line, with this text in a file."""
    monkeypatch.chdir(tmp_path)

    def parsed(text, *arguments):
        Path("exp.toml").write_text(text)
        return app([*arguments, "--config", "exp.toml"], standalone_mode=False).args[0]

    return parsed


def test_every_command_takes_its_options_from_the_file(parsed):
    profile = parsed(EXPERIMENT, "profile")
    assert profile == ProfileOptions(
        model="m", seed=3, pretrained=False, img_size=32, input_size=(3, 32, 32),
        model_kwargs=["a=1", "b=2"], layers=True, json=Path("shared.json"), batch_size=8,
        fail_if=["dead>5%"], sort="dead",
    )  # fmt: skip
    trial = parsed(EXPERIMENT, "trial")
    assert (trial.model, trial.data, trial.arm) == ("m", "DIR", ["swr@0.05", "remove"])
    assert (trial.scale, trial.lr, trial.warmup_epochs) == ((0.5, 1.0), 1.0, 0.5)
    assert trial.img_size == 64 and trial.batch_size == 32
    compared = parsed(EXPERIMENT, "compare")
    assert compared.files == [Path("a.json"), Path("b.json")] and compared.layers
    own_table_only = EXPERIMENT.replace('json = "shared.json"', "")
    explain = parsed(own_table_only, "explain")
    assert (explain.model, explain.layer, explain.json) == ("m", "conv1", True)
    assert parsed(own_table_only, "list").what == "models"
    plan = parsed(EXPERIMENT, "plan", "--ratio", "0.1")
    assert (plan.ratio, plan.seed) == (0.1, 3)


def test_what_is_typed_wins_over_the_file(parsed):
    typed = "other --seed 0 --pretrained -b 2 --img-size 16 --fail-if dead>1% --model-kwargs c=3"
    profile = parsed(EXPERIMENT, "profile", *typed.split())
    assert (profile.model, profile.seed, profile.pretrained) == ("other", 0, True)
    assert (profile.batch_size, profile.img_size) == (2, 16)
    assert (profile.fail_if, profile.model_kwargs) == (["dead>1%"], ["c=3"])
    assert parsed(EXPERIMENT, "compare", "c.json", "d.json").files == [
        Path("c.json"), Path("d.json")
    ]  # fmt: skip


def test_a_key_at_the_top_that_is_also_a_command_is_the_option(parsed):
    text = 'model = "m"\nplan = "plan.json"\n[finetune]\nreinit = false\ndata = "D"\noutput = "o"'
    assert parsed(text, "reinit").plan == Path("plan.json")
    finetune = parsed(text, "finetune")
    assert (finetune.plan, finetune.reinit) == (Path("plan.json"), False)


def test_long_names_of_options_are_those_of_fields():
    """Keys of the file are names of fields: all have to be long options, or arguments."""
    for name, command in typer.main.get_command(app).commands.items():
        for parameter in command.params:
            if parameter.name in ("config", "help"):
                continue
            flag = "--" + parameter.name.replace("_", "-")
            assert parameter.param_type_name == "argument" or flag in parameter.opts, (name, flag)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bathces = 2", "--config exp.toml: no option 'bathces' among"),
        ("bathces = 2", ": did you mean batches?"),
        ("btch_size = 2", "no option 'btch-size' among"),
        ("[profile]\nratio = 0.1", "--config exp.toml: [profile] no option 'ratio' among"),
        ("[plan]\nbathces = 1", "--config exp.toml: [plan] no option 'bathces' among"),
        ("[profil]", "--config exp.toml: no command 'profil' among 8: did you mean profile?"),
        ("profile = 3", "--config exp.toml: profile: expected a table of options: [profile]"),
        ("config = 'a'", "no option 'config' among"),
        ('batches = "2"', '--config exp.toml: batches = "2": expected a whole number'),
        ("batches = 2.0", "batches = 2.0: expected a whole number"),
        ("seed = true", "seed = true: expected a whole number"),
        ("amp = 1", "amp = 1: expected true or false"),
        ("data = 3", "data = 3: expected text in quotes"),
        ("csv = 1979-05-27", 'csv = "1979-05-27": expected text in quotes'),
        ('fail-if = "dead>1"', 'fail-if = "dead>1": expected a list of texts in quotes'),
        ("fail-if = [1]", "fail-if = [1]: expected a list of texts in quotes"),
        ("model-kwargs = {a = 1}", 'model-kwargs = {"a": 1}: expected a list of texts in quotes'),
        ("input-size = [3, 3]", "input-size = [3, 3]: expected a list of 3 whole numbers"),
        ("input-size = [3, 3, 3.5]", "expected a list of 3 whole numbers"),
        ('[trial]\nlr = "x"', '--config exp.toml: [trial] lr = "x": expected a number'),
        ("[trial]\nlr = false", "[trial] lr = false: expected a number"),
        ('amp-dtype = "int8"', 'amp-dtype = "int8": expected one of "bfloat16", "float16"'),
        ("batch-size = 1\nbatch_size = 2", "batch-size stands there twice, also as batch_size"),
        ("batches = 0", "'--batches'"),
        ("batches = 0", "(in exp.toml): see fastplastic profile --help"),
    ],
)
def test_bad_keys_and_values_are_refused(run, nothing_slow, text, message):
    Path("exp.toml").write_text(text)
    refused(run("profile", "m", "--config", "exp.toml"), 2, message)


def test_the_file_is_named_for_its_own_values_only(run, nothing_slow):
    Path("exp.toml").write_text("seed = 1")
    outcome = run("profile", "m", "--config", "exp.toml", "--batches", "0")
    refused(outcome, 2, "'--batches'")
    assert "exp.toml" not in outcome.error
    refused(run("profile", "--config", "exp.toml"), 2, "Missing argument 'MODEL'")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "--config exp.toml: cannot be read (No such file or directory): check the path"),
        (b"a = 1\nb c = 3", "--config exp.toml: is not TOML: "),
        (b"a = 1\nb c = 3", "(at line 2, column 3)"),
        (b"seed = 1\nx = '\xff'", "is not UTF-8 text, at line 2: save it so"),
    ],
)
def test_files_that_are_no_toml(run, nothing_slow, content, message):
    if content is not None:
        Path("exp.toml").write_bytes(content)
    refused(run("profile", "m", "--config", "exp.toml"), 3, message)


def test_reports_tell_a_command_that_does_not_need_the_file(parsed):
    options = parsed(EXPERIMENT, "profile", "--seed", "0")
    token = parsing.TYPED.set(("profile", "--config=exp.toml", "--seed", "0"))
    try:
        command = parsing.typed("profile", options)
    finally:
        parsing.TYPED.reset(token)
    assert app(list(command), standalone_mode=False).args[0] == options
    assert "exp.toml" not in " ".join(command)
    token = parsing.TYPED.set(("profile", "m", "-b", "16"))
    try:
        assert parsing.typed("profile", options) == ("profile", "m", "-b", "16")
    finally:
        parsing.TYPED.reset(token)


def test_relative_paths_are_those_of_the_current_folder(run, nothing_slow, tmp_path):
    (tmp_path / "configs").mkdir()
    Path("configs/exp.toml").write_text('model = "m"\ncheckpoint = "here.pth"')
    refused(run("profile", "--config", "configs/exp.toml"), 3, "--checkpoint here.pth: no such")
