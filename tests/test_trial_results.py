"""The file of results of a trial: kept, resumed, refused, whoever else writes to it."""

import json
from dataclasses import asdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastplastic.errors import FastPlasticError, FileError
from fastplastic.trials import Results, TrialRun

SETTINGS = {"lr": 0.1, "sizes": {"train": 5}, "scale": (0.3, 1.0)}


def run(arm="baseline", seed=0, **values):
    curve = {"steps": [0, 2], "accuracy": [0.1, 0.5], "loss": [2.0, 1.0], "train_loss": [1.5]}
    return TrialRun(arm=arm, seed=seed, total=2, **curve | values)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "trial.jsonl"
    results = Results(path, SETTINGS)
    results.add(run())
    results.add(run("dormant@0.3:zero", layers={"fc": 3}))
    return path


def test_runs_come_back(file):
    results = Results(file, SETTINGS)
    assert results.runs == [run(), run("dormant@0.3:zero", layers={"fc": 3})]
    assert results.find("baseline", 0) == run() and results.find("baseline", 1) is None
    results.add(run(seed=1))
    assert len(Results(file, SETTINGS).runs) == 3 and results.note == ""
    assert Results.read(file) == results.runs


def test_numbers_that_json_does_not_have_become_null(file):
    Results(file, SETTINGS).add(run(seed=5, loss=[2.0, float("nan")]))
    assert Results(file, SETTINGS).find("baseline", 5).loss == [2.0, None]


@pytest.mark.parametrize("cut", [1, 20, 100])
def test_a_last_line_that_was_cut_off_is_taken_away(file, cut):
    whole = file.read_bytes()
    last = whole.splitlines(keepends=True)[-1]
    file.write_bytes(whole[: -min(cut, len(last) - 1)])
    results = Results(file, SETTINGS)
    assert results.runs == [run()] and "the last line was cut off" in results.note
    results.add(run(seed=7))
    assert Results(file, SETTINGS).runs == [run(), run(seed=7)]


def test_a_first_line_that_was_cut_off_is_written_anew(tmp_path):
    path = tmp_path / "trial.jsonl"
    Results(path, SETTINGS)
    whole = path.read_bytes()
    for cut in (1, 10, len(whole)):
        path.write_bytes(whole[:-cut])
        assert Results(path, SETTINGS).runs == [] and path.read_bytes() == whole


def test_a_run_that_stands_there_twice_counts_once(file):
    file.write_text(file.read_text() + file.read_text().splitlines()[1] + "\n")
    assert len(Results(file, SETTINGS).runs) == 2


def test_only_one_trial_writes_to_a_file(file):
    first, second = Results(file, SETTINGS), Results(file, SETTINGS)
    with first.locked():
        with pytest.raises(FileError, match="another trial is writing to it"), second.locked():
            pass
        first.add(run(seed=3))
    with second.locked():
        pass


def test_what_another_trial_is_writing_is_not_taken_for_cut_off(file):
    """Half of a line is there while a trial writes it; taken away, a finished run would be lost."""
    first = Results(file, SETTINGS)
    with first.locked():
        with file.open("ab") as half:
            half.write(b'{"arm": "base')
        before = file.read_bytes()
        with pytest.raises(FileError, match="another trial is writing to it"):
            Results(file, SETTINGS)
    assert file.read_bytes() == before


def test_runs_that_another_trial_has_finished_meanwhile_are_known(file):
    first, second = Results(file, SETTINGS), Results(file, SETTINGS)
    with first.locked():
        first.add(run(seed=3))
    assert second.find("baseline", 3) is None
    with second.locked():
        assert second.find("baseline", 3) == run(seed=3)
    assert len(second.runs) == len(first.runs)


def test_two_trials_that_begin_at_once_write_one_header(tmp_path):
    file = tmp_path / "trial.jsonl"
    first, second = Results(file, SETTINGS), Results(file, SETTINGS)
    with first.locked():
        first.add(run())
    with second.locked():
        second.add(run(seed=1))
    assert [run.seed for run in Results(file, SETTINGS).runs] == [0, 1]


DAMAGE = [
    ("arm", ["a"], "'arm' is ['a'], expected a name"),
    ("arm", None, "'arm' is None, expected a name"),
    ("seed", 1.5, "'seed' is 1.5, expected an integer"),
    ("steps", ["0"], "'steps' is ['0'], expected a list of integers from 0 on, at least one"),
    ("accuracy", [55.0, 3], "'accuracy' is [55.0, 3], expected a list of shares, at least one"),
    ("accuracy", [], "'accuracy' is [], expected a list of shares, at least one"),
    ("loss", [0.5], "the length of curves is {'steps': 2, 'accuracy': 2, 'loss': 1}, expected the"),
    ("loss", "none", "'loss' is 'none', expected a list of numbers"),
    ("layers", {"a": "b"}, "'layers' is {'a': 'b'}, expected an object of numbers"),
    ("figures", [1], "'figures' is [1], expected an object of numbers"),
    ("notes", "note", "'notes' is 'note', expected a list of texts"),
    ("accuracies", [1], "a key is 'accuracies', expected one of arm, seed, total"),
]


@pytest.mark.parametrize(("key", "value", "said"), DAMAGE)
def test_runs_edited_by_hand(file, key, value, said):
    lines = file.read_text().splitlines()
    lines[1] = json.dumps(json.loads(lines[1]) | {key: value})
    file.write_text("\n".join(lines) + "\n")
    before = file.read_bytes()
    with pytest.raises(FileError) as error:
        Results(file, SETTINGS)
    assert str(error.value).startswith(f"{file}: line 2 is no run of a trial ({said}")
    assert str(error.value).endswith("): repair or remove that line")
    assert file.read_bytes() == before


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)


@settings(max_examples=60)
@given(
    key=st.sampled_from([*asdict(run()), "fastplastic_trial"]), value=anything,
    place=st.integers(0, 10**4), noise=st.binary(max_size=20),
    kind=st.sampled_from(["value", "bytes", "line", "deep"]),
)  # fmt: skip
def test_nothing_but_our_errors_from_damaged_results(
    tmp_path_factory, key, value, place, noise, kind
):
    file = tmp_path_factory.getbasetemp() / "damaged.jsonl"
    file.unlink(missing_ok=True)
    results = Results(file, SETTINGS)
    results.add(run())
    results.add(run(seed=1))
    content = file.read_bytes()
    if kind == "value":
        lines = content.splitlines()
        number = place % 3
        lines[number] = json.dumps(json.loads(lines[number]) | {key: value}).encode()
        content = b"\n".join(lines) + b"\n"
    elif kind == "bytes":
        place %= len(content)
        content = content[:place] + noise + content[place + len(noise) :]
    elif kind == "deep":
        content += b"[" * 10**5 + b"\n"
    else:
        content += noise + b"\n"
    file.write_bytes(content)
    try:
        found = Results(file, SETTINGS)
    except FastPlasticError as error:
        assert "\n" not in str(error) and file.read_bytes() == content
    else:
        assert all(0 <= share <= 1 for each in found.runs for share in each.accuracy)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"lr": 0.2}, "lr is 0.1 there, 0.2 here"),
        ({"sizes": {"train": 6}}, "sizes.train is 5 there, 6 here"),
        ({"opt": "sgd"}, "opt is None there, 'sgd' here"),
    ],
)
def test_other_settings_are_refused_with_the_difference(file, change, said):
    before = file.read_bytes()
    with pytest.raises(FileError, match="results of other settings") as error:
        Results(file, SETTINGS | change)
    assert said in str(error.value) and file.read_bytes() == before


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"hello\n", "line 1 is no JSON object"),
        (b'{"a": 1}\n', "not a file of trial results"),
        (b"\x00\xff", "not a file of trial results|line 1 is no JSON"),
        (b"[1]\n", "line 1 is no JSON object"),
    ],
)
def test_another_file_is_refused_and_left_alone(tmp_path, content, said):
    path = tmp_path / "other"
    path.write_bytes(content)
    with pytest.raises(FileError, match=said):
        Results(path, SETTINGS)
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    "line", ["{}", '{"arm": 1}', json.dumps({"arm": "a", "seed": 0, "total": 1, "steps": [0],
    "accuracy": [], "loss": [], "train_loss": []}), "nonsense"],
)  # fmt: skip
def test_a_line_in_the_middle_that_is_no_run_is_named(file, line):
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:2], line, *lines[2:]]) + "\n")
    with pytest.raises(FileError, match="line 3 is no"):
        Results(file, SETTINGS)


def test_a_full_disk_leaves_the_finished_runs(file, monkeypatch):
    before = file.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    results = Results(file, SETTINGS)
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(FileError, match=r"No space left on device.*finished runs are kept"):
        results.add(run(seed=1))
    assert file.read_bytes() == before and len(results.runs) == 2


def test_a_file_that_cannot_be_written(tmp_path):
    with pytest.raises(FileError, match="cannot be read or written"):
        Results(tmp_path / "missing" / "trial.jsonl", SETTINGS)
    with pytest.raises(FileError, match="cannot be read or written"):
        Results(tmp_path, SETTINGS)
