"""The study of sequences of tasks: resumable, and its tables are those of its results."""

import json
import sys
import tomllib
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent.parent / "benchmarks" / "continual"


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    for name in ("study", "report"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import study

    torch.manual_seed(0)
    pixels = torch.randn(200, 784), torch.randint(10, (200,))
    monkeypatch.setattr(study, "digits", lambda: pixels)
    yield study
    for name in ("study", "report"):
        sys.modules.pop(name, None)


ENTRY = {"images": 64, "hidden": [16], "batch": 16, "lr": 1e-2, "tasks": 3, "epochs": 2, "from": 2}


@pytest.mark.parametrize("problem", ["random-labels", "permuted-digits"])
def test_a_run_is_settled_by_its_seed(study, problem: str) -> None:
    first, again, other = (
        study.run(problem, ENTRY, "random", {"every": 4, "ratio": 0.2}, seed) for seed in (0, 0, 1)
    )
    assert first.online == again.online != other.online
    assert len(first.online) == 3 and first.resets == [6, 6, 6]


def test_every_method_runs(study) -> None:
    config = tomllib.loads((FOLDER / "study.toml").read_text())
    for method, own in config["methods"].items():
        variant = {"as": own["as"], "every": 5} if "as" in own else own.get("with", {})
        for options in own.get("tried", [variant]):
            done = study.run("random-labels", ENTRY, method, options, 0)
            assert len(done.online) == 3 and all(0 <= value <= 1 for value in done.online)


def test_units_at_random_take_the_same_dose_in_the_same_steps(study, monkeypatch) -> None:
    seen = []

    class Watched(study.AtRandom):
        def __init__(self, *args) -> None:
            super().__init__(*args)
            seen.append(self)

        def _stepped(self, *args: object) -> None:
            before = self._model[0].weight.detach().clone()
            super()._stepped(*args)
            changed = (self._model[0].weight != before).any(1).sum()
            due = self._dose.get(self._step)
            assert changed == (0 if due is None else due.counts.get("0", 0))

    monkeypatch.setattr(study, "AtRandom", Watched)
    options = {"every": 4, "threshold": 0.6}
    theirs = study.run("random-labels", ENTRY, "redo", options, 0)
    ours = study.run("random-labels", ENTRY, "random-as-redo", {"as": "redo", **options}, 0)
    assert ours.resets == theirs.resets and sum(theirs.resets) > 0
    assert ours.online[0] != theirs.online[0]
    units = [[int(unit) for unit in reset.units["0"]] for reset in seen[0]._dose.values()]
    assert len(seen) == 1 and any(units)


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_a_warm_start_is_judged_by_what_is_held_out(study, noise: float) -> None:
    entry = {**ENTRY, "images": 150, "noise": noise}
    first, second = study.tasks_of("warm-start", entry, 0)
    pixels, labels = study.digits()
    assert torch.equal(first.images, second.images[:75]) and len(second.images) == 150
    wrong = (first.labels != second.labels[:75]).double().mean()
    assert wrong == 0 if noise == 0 else 0.25 < wrong < 0.65
    known = {tuple(row) for row in second.images.tolist()}
    held_out, answers = first.held_out
    assert len(held_out) == 50 and not any(tuple(row) in known for row in held_out.tolist())
    found = [labels[(pixels == image).all(1)].item() for image in held_out]
    assert torch.equal(answers, torch.tensor(found))


def test_counters_alone_begin_anew(study) -> None:
    torch.manual_seed(0)
    model = study.network([16], leaky=False)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    study.CountersAnew(model, optimizer, every=3)
    seen = []
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.randn(8, 784)).sum().backward()
        before = model[0].weight.detach().clone()
        optimizer.step()
        assert not torch.equal(model[0].weight, before)
        seen.append(int(optimizer.state[model[0].weight]["step"]))
    assert seen == [1, 2, 0, 1]


def test_variants_take_the_setting_of_their_preset(study, tmp_path: Path) -> None:
    config = tomllib.loads((FOLDER / "study.toml").read_text())
    best = config["methods"]["redo"]["tried"][1]
    file = tmp_path / "tune" / "random-labels.redo.jsonl"
    for options in config["methods"]["redo"]["tried"]:
        for seed in config["tune"]["seeds"]:
            study.append(file, study.Run("redo", options, seed, [0.4 + 0.2 * (options == best)]))
    found = [
        study.best_options(config, "random-labels", name, tmp_path)
        for name in ("random-as-redo", "redo-keeping-counters")
    ]
    assert found == [{"as": "redo", **best}, {**best, "reset_steps": False}]


def test_a_fresh_network_knows_nothing_of_the_task_before(study) -> None:
    torch.manual_seed(0)
    model = study.network([16], leaky=False)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    keeper = study.Keeper("fresh", {}, model, optimizer, 0, [])
    torch.randn(8, 784).mm(model[0].weight.T).sum().backward()
    optimizer.step()
    before = [p.detach().clone() for p in model.parameters()]
    keeper.between_tasks(1)
    assert not optimizer.state
    assert all((p != q).all() for p, q in zip(before, model.parameters(), strict=True))


def test_a_line_that_was_cut_off_is_written_anew(study, tmp_path: Path) -> None:
    file = tmp_path / "runs.jsonl"
    runs = [study.Run("none", {}, seed, [0.5, 0.25]) for seed in (0, 1)]
    study.append(file, runs[0])
    file.write_text(file.read_text() + '{"method": "none", "opti')
    assert study.read(file) == runs[:1]
    study.append(file, runs[1])
    assert study.read(file) == runs
    assert [json.loads(line)["seed"] for line in file.read_text().splitlines()] == [0, 1]


def test_the_setting_that_did_best_in_the_tuning_goes_on(study, tmp_path: Path) -> None:
    config = {
        "tune": {"seeds": [9]}, "problems": {"p": {"seeds": 2}},
        "methods": {"m": {"tried": [{"a": 1}, {"a": 2}]}, "none": {"tried": [{}]}},
    }  # fmt: skip
    with pytest.raises(LookupError, match=r"p.m: not tuned yet"):
        study.best_options(config, "p", "m", tmp_path)
    for value, accuracy in ((1, 0.4), (2, 0.6)):
        file = tmp_path / "tune" / "p.m.jsonl"
        study.append(file, study.Run("m", {"a": value}, 9, [accuracy]))
    assert study.best_options(config, "p", "m", tmp_path) == {"a": 2}
    assert list(study.wanted(config, "final", "p", "m", tmp_path)) == [({"a": 2}, 0), ({"a": 2}, 1)]
    assert list(study.wanted(config, "tune", "p", "none", tmp_path)) == []


def test_the_tables_are_those_of_the_results(study) -> None:
    import report

    config = tomllib.loads((FOLDER / "study.toml").read_text())
    found = {problem: report.sequences(config, problem) for problem in config["problems"]}
    text = report.README.read_text()
    assert report.filled(text, report.parts(found)) == text


def test_a_table(study) -> None:
    import report

    def sequence(method: str, late: list[float]):
        runs = {s: study.Run(method, {}, s, [0.7, value], [3, 1]) for s, value in enumerate(late)}
        return report.Sequence(method, runs, dict(enumerate(late)))

    found = {
        "none": sequence("none", [0.20, 0.22, 0.21]), "redo": sequence("redo", [0.50, 0.55, 0.51]),
        "random-as-redo": sequence("random-as-redo", [0.40, 0.45, 0.40]),
    }  # fmt: skip
    rows = list(report.table(found))
    assert rows[2].startswith("| `redo` |  | 3 | 70.0 | 52.0 [45.4, 58.6] | +31.0 p 0.00")
    assert rows[2].endswith("|  | +10.3 p 0.001 | 2 |")
    assert rows[3].startswith("| `random-as-redo` |") and rows[3].endswith("|  |  | 2 |")
    assert rows[4].startswith("| `none` |  | 3 | 70.0 | 21.0")
