"""The tables of the study are made from its result files, and from nothing else."""

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
    for name in ("report", "study", "networks", "data"):
        sys.modules.pop(name, None)


def test_the_tables_are_those_of_the_results(report):
    config = tomllib.loads((FOLDER / "study.toml").read_text())
    found = list(report.finals(config))
    assert found
    assert report.readme(found, config) == (FOLDER / "README.md").read_text(), (
        "run python benchmarks/transfer/report.py"
    )


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
