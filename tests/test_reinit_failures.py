"""All or nothing: failures in the middle, other dtypes and layouts, plans from files."""

import json
import math
from dataclasses import replace

import pytest
import torch
from helpers.written import CASES, Case, convnet, filled, identical, mbconv, mlp, snapshot
from torch import nn

from fastplastic.model import fingerprint
from fastplastic.planning import Plan
from fastplastic.reinit import reinit_
from fastplastic.reinit import transaction as apply_module


@pytest.fixture(params=CASES, ids=lambda make: make.__name__)
def case(request) -> Case:
    return filled(request.param)


class Interruption(BaseException):
    pass


class Failing:
    """Stands in for what writes, and fails at the call numbered `at`, after or amid the write."""

    def __init__(self, monkeypatch, error: type[BaseException]) -> None:
        self.error, self.calls, self.at, self.late = error, 0, 0, False
        draw, fill = apply_module._draw, apply_module._fill

        def failing_draw(tensors, fresh, seed):
            # A draw that is cut off may leave anything in its regions.
            self.step(
                lambda: draw(tensors, fresh, seed), lambda: draw(tensors, fresh[:1], seed + 1)
            )

        def failing_fill(place, value):
            self.step(lambda: fill(place, value), lambda: fill(place, torch.nan))

        monkeypatch.setattr(apply_module, "_draw", failing_draw)
        monkeypatch.setattr(apply_module, "_fill", failing_fill)

    def step(self, write, cut_off) -> None:
        self.calls += 1
        if self.calls != self.at:
            write()
            return
        (write if self.late else cut_off)()
        raise self.error


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, Interruption])
def test_a_failure_at_any_write_leaves_everything_as_it_was(case, monkeypatch, error):
    before = snapshot(case.model)
    failing = Failing(monkeypatch, error)
    reinit_(case.model, case.plan)
    total = failing.calls
    assert total >= 2 and not identical(snapshot(case.model), before)
    case.model.load_state_dict(before)
    for failing.at in range(1, total + 1):
        for failing.late in (False, True):
            failing.calls = 0
            with pytest.raises(error):
                reinit_(case.model, case.plan)
            assert identical(snapshot(case.model), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype):
    made = convnet()
    made.model.to(dtype).requires_grad_(False)
    reinit_(made.model, replace(made.plan, fingerprint=fingerprint(made.model)))
    weight = made.model[0].weight
    assert weight.dtype == dtype and weight.isfinite().all() and not weight.requires_grad
    assert 0 < weight[[1, 5]].abs().max() <= 1 / math.sqrt(27) + 1e-2
    assert (made.model[3].weight[[0, 1], 1] == 0).all()


def test_channels_last_weights():
    made = convnet()
    other = convnet()
    other.model.load_state_dict(made.model.state_dict())
    other.model.to(memory_format=torch.channels_last)
    reinit_(made.model, made.plan)
    reinit_(other.model, made.plan)
    assert identical(snapshot(made.model), snapshot(other.model))
    assert other.model[3].weight.is_contiguous(memory_format=torch.channels_last)


def test_a_norm_without_parameters_or_statistics():
    made = convnet()
    model = made.model
    model[1] = nn.BatchNorm2d(6, affine=False)
    plan = replace(made.plan, fingerprint=fingerprint(model))
    model[1].running_mean.fill_(3.0)
    reinit_(model, plan)
    assert model[1].running_mean.tolist() == [3, 0, 3, 3, 3, 0]
    model[1] = nn.BatchNorm2d(6, track_running_stats=False)
    nn.init.constant_(model[1].weight, 3.0)
    reinit_(model, replace(made.plan, fingerprint=fingerprint(model)))
    assert model[1].weight.tolist() == [3, 1, 3, 3, 3, 1]


def test_a_plan_from_a_file_does_the_same(tmp_path):
    made = mbconv()
    start = snapshot(made.model)
    reinit_(made.model, made.plan)
    once = snapshot(made.model)
    made.model.load_state_dict(start)
    made.plan.save(tmp_path / "plan.json")
    reinit_(made.model, Plan.load(tmp_path / "plan.json"))
    assert identical(once, snapshot(made.model))


def test_an_empty_plan_writes_nothing():
    made = mlp()
    before = snapshot(made.model)
    report = reinit_(made.model, replace(made.plan, units={}, scores={}))
    assert report.count == 0 and report.written == () and identical(before, snapshot(made.model))


def test_the_report_says_what_was_done():
    made = convnet()
    report = reinit_(made.model, made.plan, init="kaiming_uniform", seed=4)
    assert (report.count, report.layers) == (2, {"0": 2})
    assert (report.init, report.outgoing, report.seed) == ("kaiming_uniform", "zero", 4)
    values = json.loads(json.dumps(report.to_dict()))
    names = [entry["name"] for entry in values["written"]]
    norms = ["1.weight", "1.bias", "1.running_mean", "1.running_var"]
    assert names == ["0.weight", "0.bias", *norms, "3.weight"]
    assert values["written"][0] == {
        "name": "0.weight", "kind": "parameter", "elements": 54, "total": 162, "share": 1 / 3,
    }  # fmt: skip
    assert values["layers"] == {"0": 2} and values["notes"] == []
