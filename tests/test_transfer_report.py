"""The tables of the study are made from its result files, and from nothing else."""

import json
import sys
import tomllib
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks" / "transfer"


@pytest.fixture
def report(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import report

    yield report
    for name in ("predict", "measure", "report", "variants", "study", "networks", "data"):
        sys.modules.pop(name, None)


def test_the_tables_are_those_of_the_results(report):
    config = tomllib.loads((FOLDER / "study.toml").read_text())
    found = list(report.finals(config))
    assert found
    assert report.readme(found, config) == (FOLDER / "README.md").read_text(), (
        "run python benchmarks/transfer/report.py"
    )


def test_what_the_package_says_is_what_the_study_found(report):
    import predict

    cases = list(predict.cases())
    text = predict.README.read_text()
    assert predict.inserted(text, "cases", predict.tables(cases)) == text
    found = {"advice": predict.advice(cases), "criteria": predict.criteria()}
    assert json.loads(predict.FILE.read_text()) == found, (
        "run python benchmarks/transfer/predict.py"
    )


def test_the_limit_errs_least_and_lies_in_the_widest_gap(report):
    import predict

    def case(network, dead, helped):
        return predict.Case(network, "t", {"dead": dead}, 0.0, helped)

    apart = [case("a", 0.1, False), case("b", 0.2, False), case("c", 0.5, True)]
    assert predict.limit_of(apart) == pytest.approx(0.35)
    assert predict.advice(apart) == {
        "figure": "dead", "limit": 0.35, "networks": 3, "above": [1, 1], "below": [0, 2],
        "wrong": [1, 3],
    }  # fmt: skip
    assert predict.auc([3.0, 1.0, 2.0], [True, False, True]) == 1.0
    assert predict.auc([1.0, 1.0], [True, False]) == 0.5


def test_a_limit_of_the_others_finds_its_direction_itself(report):
    import predict

    def case(network, growth, helped):
        return predict.Case(network, "t", {"growth": growth}, 0.0, helped)

    large = [case(str(n), 5.0 + n, True) for n in range(3)]
    small = [case(str(n), 1.0 + n / 10, False) for n in range(3, 6)]
    assert predict.errors([*large, *small], "growth") == 0
    turned = [case(c.network, c.figures["growth"], not c.helped) for c in (*large, *small)]
    assert predict.errors(turned, "growth") == 0
    assert predict.errors([*large, *small, case("9", 9.0, False)], "growth") == 1


def test_every_target_is_made_of_real_images(report):
    import data

    pixels = data.torch.arange(2 * 28 * 28).reshape(2, 28, 28) % 256
    images = pixels.to(data.torch.uint8)
    assert data.torch.equal(data.inverted(data.inverted(images)), images)
    assert data.torch.equal(data.permuted(images).flatten(1).sort().values,
                            images.flatten(1).sort().values)  # fmt: skip
    assert data.torch.equal(data.noisy(images), data.noisy(images))
    form = data.Form(channels=3, size=64, mean=(0.5,), std=(0.5,))
    prepared = data.prepared(images, form)
    assert prepared.shape == (2, 3, 64, 64) and prepared.min() >= -1 and prepared.max() <= 1
    labels = data.torch.arange(1000) % 10
    chosen = data.balanced(labels, 50, seed=3)
    assert labels[chosen].bincount().tolist() == [5] * 10 and len(chosen.unique()) == 50
    assert not data.torch.equal(chosen, data.balanced(labels, 50, seed=4))
