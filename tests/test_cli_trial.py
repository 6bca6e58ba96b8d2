import json
import re

import pytest
import timm
import torch
from helpers.pictures import folder
from safetensors.torch import load_file

from fastplastic.files import read_metadata
from fastplastic.trials import Results

MODEL = ("test_resnet", "--no-pretrained", "--img-size", "32")
QUICK = ("--epochs", "1", "-b", "8", "--evals", "2", "--profile-images", "16")
ARM = ("--arm", "dormant@0.2:zero")


@pytest.fixture
def data(tmp_path):
    folder(tmp_path / "data" / "train")
    folder(tmp_path / "data" / "val", each=4, first=100)
    return tmp_path / "data"


def lines(path):
    return path.read_text().splitlines()


def test_a_trial_from_start_to_end(run, data, tmp_path):
    arguments = ("trial", *MODEL, "--data", data, *QUICK, *ARM, "--seeds", 2)
    code, output, error = run(
        *arguments, "--json", "a.json", "--plot", "a.svg", "-o", "best.safetensors",
        "--choose-split", "0.2",
    )  # fmt: skip
    assert code == 0, error
    assert re.search(r"^baseline +[▁-█]{3} ", output, re.MULTILINE)
    assert "random:dormant@0.2:zero" in output and "verdict" in output
    # Three images of a class are kept apart to choose by, rounded.
    assert "18 to train on, 12 to test on (split val), 6 to choose by" in output
    assert (
        "head     fresh, of 3 classes: that of the weights has 1000; fitted to the training"
        in output
    )
    assert output.splitlines()[-1].startswith("next: fastplastic finetune test_resnet")
    assert len(re.findall(r"run \d of 6", error)) == 6
    report = json.loads((tmp_path / "a.json").read_text())
    assert len(report["runs"]) == 6 and report["chosen"] in {a["name"] for a in report["arms"]}
    assert (tmp_path / "a.svg").read_text().lstrip().startswith("<?xml")
    weights = load_file(tmp_path / "best.safetensors")
    model = timm.create_model(
        "test_resnet", num_classes=3, checkpoint_path=str(tmp_path / "best.safetensors")
    )
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert len(lines(tmp_path / "trial-test_resnet.jsonl")) == 7
    # Beside the results lies the best run of every arm, and each file says how good it is.
    kept = [read_metadata(file) for file in (tmp_path / "trial-test_resnet.weights").iterdir()]
    bests = [
        max(run["validation"] for run in report["runs"] if run["arm"] == arm["name"])
        for arm in report["arms"]
    ]
    assert sorted(float(found["validation"]) for found in kept) == sorted(bests)
    assert json.loads(kept[0]["label_names"]) == sorted(p.name for p in (data / "val").iterdir())
    assert json.loads(kept[0]["pretrained_cfg"])["input_size"] == [3, 32, 32]


def test_a_second_time_nothing_is_run_again(run, data, tmp_path):
    arguments = ("trial", *MODEL, "--data", data, *QUICK, *ARM, "--seeds", 1)
    first, second = run(*arguments), run(*arguments)
    assert first.code == second.code == 0 and second.error == ""
    assert first.output == second.output and "one seed gives no interval" in first.output
    assert len(lines(tmp_path / "trial-test_resnet.jsonl")) == 4


def test_narrow_terminals_get_fewer_columns(run, data, monkeypatch):
    arguments = ("trial", *MODEL, "--data", data, *QUICK, *ARM, "--seeds", 2)
    assert "cost" in run(*arguments).output.split("verdict")[0]
    monkeypatch.setenv("COLUMNS", "80")
    table = run(*arguments).output.split("verdict")[0]
    assert max(map(len, table.splitlines())) <= 80
    assert "cost" not in table and "to baseline" in table
    assert re.search(r"^baseline +[▁-█]{3} +\d", table, re.MULTILINE)


def test_other_settings_are_refused_with_the_difference(run, data):
    arguments = ("trial", *MODEL, "--data", data, *QUICK, *ARM, "--seeds", 1, "-q")
    assert run(*arguments).code == 0
    code, _, error = run(*arguments, "--lr", "0.5")
    assert code == 3 and "results of other settings (lr is 0.001 there, 0.5 here)" in error
    code, _, error = run(*arguments, "--scale", "0.1", "1")
    assert code == 3 and "augmentation.scale" in error


def test_interrupting_says_how_to_go_on(run, data, tmp_path, monkeypatch):
    from fastplastic.trials import compare

    real = compare.run_arms

    def interrupted(*arguments, progress, **keywords):
        def stop(state):
            progress(state)
            if state.run and state.done == 2:
                raise KeyboardInterrupt

        real(*arguments, progress=stop, **keywords)

    arguments = ("trial", *MODEL, "--data", data, *QUICK, *ARM, "--seeds", 1)
    monkeypatch.setattr(compare, "run_arms", interrupted)
    code, output, error = run(*arguments)
    assert code == 130 and output == ""
    assert "2 finished runs kept in trial-test_resnet.jsonl: the same command goes on" in error
    assert len(Results.read(tmp_path / "trial-test_resnet.jsonl")) == 2
    monkeypatch.setattr(compare, "run_arms", real)
    code, _, error = run(*arguments)
    assert code == 0 and error.count("\n") == 1


def test_the_same_image_in_training_and_test_is_a_warning(run, data):
    (data / "val/a/0.png").write_bytes((data / "train/a/0.png").read_bytes())
    code, _, error = run("trial", *MODEL, "--data", data, *QUICK, *ARM, "--seeds", 1, "-q")
    assert code == 0 and "warning: " in error and "1 image of the test is among" in error


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--seeds", "0"), "--seeds 0: expected 1 or more"),
        (("--arm", "dormnt@0.1"), "did you mean dormant?"),
        (("--arm", "dormant@0.1", "--arm", "dormant@0.10"), "two arms are called"),
        (("--plot", "a.pdf"), "--plot a.pdf: expected a name that ends in .png or .svg"),
        (("-o", "a.bin"), "-o a.bin: expected a name that ends in .safetensors"),
        (("--choose-split", "1"), "--choose-split 1: expected a share between 0 and 1"),
        (("--lr", "-1"), "lr -1.0: expected more than 0"),
        (("--warmup-epochs", "9"), "warmup_epochs 9.0 of 5 epochs"),
        (("--max-layer-fraction", "2"), "--max-layer-fraction 2: expected a share"),
    ],
)
def test_bad_options_are_refused_before_anything_slow(run, data, monkeypatch, arguments, said):
    def load(*arguments, **keywords):
        raise AssertionError("a model was built")

    monkeypatch.setattr("fastplastic.cli.training.load", load)
    code, output, error = run("trial", "test_resnet", "--data", data, *arguments)
    assert code == 2 and output == "" and error.count("\n") == 1
    assert re.search(said.replace("(", r"\("), error)


def test_a_plot_without_matplotlib_is_refused_before_anything_slow(run, data, monkeypatch):
    monkeypatch.setattr("fastplastic.cli.plot.find_spec", lambda name: None)
    code, _, error = run("trial", "test_resnet", "--data", data, "--plot", "a.png")
    assert code == 2 and "--plot needs matplotlib: pip install 'fastplastic[report]'" in error


def test_data_have_to_be_named(run):
    code, _, error = run("trial", "test_resnet")
    assert code == 2 and "--data" in error
    code, _, error = run("trial", "test_resnet", "--data", "noise")
    assert code == 2 and "--data noise: has no labels to learn" in error


def test_another_number_of_classes_is_refused(run, data):
    code, _, error = run("trial", *MODEL, "--data", data, *QUICK, "--num-classes", 7)
    assert code == 2 and "--num-classes 7: the data have 3 classes" in error


def test_random_weights_have_to_be_asked_for(run, data):
    code, _, error = run("trial", "test_resnet", "--data", data, *QUICK)
    assert code == 3 and "the pretrained weights cannot be had" in error


def test_a_file_of_something_else_is_left_alone(run, data, tmp_path):
    (tmp_path / "notes.txt").write_text("my notes\n")
    code, _, error = run(
        "trial", *MODEL, "--data", data, *QUICK, *ARM, "--results", "notes.txt", "-q"
    )
    assert code == 3 and "line 1 is no JSON object" in error
    assert (tmp_path / "notes.txt").read_text() == "my notes\n"


def test_long_names_of_arms_are_broken_where_an_option_ends():
    from fastplastic.cli.trial_view import broken

    name = "dormant@0.3:zero+compensate+recalibrate"
    assert broken(name, 40) == name
    assert broken(name, 24) == "dormant@0.3:zero+\ncompensate+recalibrate"
    assert broken(name, 3).replace("\n", "") == name


def test_the_next_command_overwrites_nothing(run, data):
    (data / ".." / "a.json").write_text("{}")
    arguments = ("trial", *MODEL, "--data", data, *QUICK, *ARM, "--seeds", 1)
    code, output, _ = run(*arguments, "--json", "a.json", "--force")
    assert code == 0 and "--force" not in output


def test_resuming_with_other_images_names_their_numbers(run, data):
    arguments = ("trial", *MODEL, "--data", data, *QUICK, *ARM, "--seeds", 1)
    assert run(*arguments, "-o", "best.safetensors").code == 0
    code, _, error = run(*arguments)
    assert code == 3 and "sizes.train is" in error and "sizes.validation is" in error
