"""The figures of a profile by their names, and what writes them."""

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from fastplastic import Profile, profile
from fastplastic.errors import InputError
from fastplastic.integrations import metrics, write_metrics
from fastplastic.training import Reset

RESETS = [
    Reset(step=3, counts={"0": 2}, overlap=None),
    Reset(step=6, counts={"0": 1, "2": 4}, overlap=0.25),
]


@pytest.fixture(scope="module")
def seen() -> Profile:
    """Two of 8 units are dead, one more is nearly always flat, one of 4 after them is dormant."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 3))
    images = torch.randn(64, 6)
    images[0] = 10.0
    with torch.no_grad():
        model[0].bias[:2] = -100.0
        model[0].weight[2], model[0].bias[2] = 0.5, -20.0
        model[2].weight[0], model[2].bias[0] = 0.0, 1e-4
    return profile(model, [(images, torch.arange(64) % 3)])


def test_names_and_values(seen: Profile) -> None:
    assert metrics(seen) == {
        # Two dead ReLUs, and the tanh that is the same everywhere; the 3 outputs are units, too.
        "plasticity/dead": 3 / 15,
        "plasticity/frozen": 2 / 15,
        "plasticity/saturated": 3 / 15,
        "plasticity/dormant": 3 / 15,
        "plasticity/low_gradient": 2 / 15,
    }


def test_layers(seen: Profile) -> None:
    values = metrics(seen, layers=True)
    assert values.items() >= metrics(seen).items()
    own = {name: value for name, value in values.items() if name.startswith("plasticity/dead/")}
    assert own == {
        "plasticity/dead/0": 2 / 8, "plasticity/dead/2": 1 / 4, "plasticity/dead/4": 0.0,
    }  # fmt: skip
    assert all(type(value) is float for value in values.values())


def test_what_is_not_known_is_left_out() -> None:
    model = nn.Sequential(nn.Linear(6, 8))
    found = profile(model, [(torch.randn(4, 6), torch.zeros(4).long())], backward=False)
    values = metrics(found, layers=True)
    assert not any("low_gradient" in name for name in values)
    assert "plasticity/dead/0" in values and not any(map(math.isnan, values.values()))


def test_resets(seen: Profile) -> None:
    values = metrics(seen, resets=RESETS)
    assert values["plasticity/reset"] == 7 and values["plasticity/overlap"] == 0.25
    values = metrics(seen, resets=[])
    assert values["plasticity/reset"] == 0 and "plasticity/overlap" not in values
    assert "plasticity/overlap" not in metrics(seen, resets=RESETS[:1])


def test_tensorboard(seen: Profile, tmp_path: Path) -> None:
    with SummaryWriter(tmp_path) as writer:
        write_metrics(writer, seen, 7, layers=True, histograms=True, resets=RESETS)
    events = EventAccumulator(str(tmp_path)).Reload()
    wanted = metrics(seen, layers=True, resets=RESETS)
    assert set(events.Tags()["scalars"]) == wanted.keys()
    for name, value in wanted.items():
        (event,) = events.Scalars(name)
        assert event.step == 7 and event.value == pytest.approx(value)
    assert set(events.Tags()["histograms"]) == {
        f"plasticity/{title}/{layer}"
        for title in ("dormant_score", "flat_share")
        for layer in ("0", "2", "4")
    }
    (event,) = events.Histograms("plasticity/flat_share/0")
    assert event.histogram_value.num == 8 and event.histogram_value.max == 1.0


class LogWriter:
    """Weights & Biases, trackio: log(dict, step=)."""

    def __init__(self) -> None:
        self.rows: list[Any] = []

    def log(self, data: dict[str, float], step: int | None = None) -> None:
        self.rows.append((step, data))


class MetricsWriter(LogWriter):
    """MLflow, the loggers of Lightning: log_metrics(dict, step=), and other things named log."""

    def log_metrics(self, data: dict[str, float], step: int | None = None) -> None:
        self.rows.append((step, data))

    def log(self, *_: Any, **__: Any) -> None:
        raise AssertionError("not for dictionaries")


@pytest.mark.parametrize("writer", [LogWriter(), MetricsWriter()])
def test_writers_of_dictionaries(seen: Profile, writer: LogWriter) -> None:
    write_metrics(writer, seen, 7)
    assert writer.rows == [(7, metrics(seen))]
    with pytest.raises(InputError, match=f"a {type(writer).__name__} without add_histogram, exp"):
        write_metrics(writer, seen, 7, histograms=True)
    assert len(writer.rows) == 1


def test_what_cannot_be_written_to(seen: Profile) -> None:
    with pytest.raises(InputError, match="the writer is a list, expected one with add_scalar, log"):
        write_metrics([], seen, 7)


def test_no_framework_is_loaded_for_the_figures() -> None:
    program = "import sys, fastplastic.integrations\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert "fastplastic" in loaded
    assert not loaded & {"transformers", "lightning", "accelerate", "tensorboard", "timm"}


def test_what_is_no_profile() -> None:
    with pytest.raises(InputError, match=r"a NoneType was given, expected a profile: of a monitor"):
        write_metrics(object(), None, 1)
