import torch
from torch import nn

import fastplastic
from fastplastic.cli.report import report_of


def rows_of(model, *shape):
    data = [(torch.rand(4, *shape), torch.zeros(4, dtype=torch.int64))]
    return report_of(fastplastic.profile(model.eval(), data), ())


def kill(layer, *units):
    """Make units whose ReLU is never open."""
    nn.init.uniform_(layer.weight, 0.1, 1)
    nn.init.zeros_(layer.bias)
    with torch.no_grad():
        layer.bias[list(units)] = -1e3


def test_only_units_that_can_be_reset_count_as_weak():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 5), nn.ReLU())
    kill(model[0], 1, 6)
    kill(model[2], 3)
    report = rows_of(model, 4)
    hidden, output = report.rows
    assert (hidden.hidden, hidden.dead, hidden.saturated, hidden.weak) == (8, 2, 2, 2)
    assert (output.hidden, output.dead, output.saturated, output.weak) == (0, 1, 1, 0)
    assert (hidden.fixed, output.fixed) == (False, True)
    assert [(units, layers) for _, units, layers in report.fixed] == [(5, 1)]


def test_a_unit_of_several_rows_is_as_weak_as_the_weakest():
    model = nn.Sequential(
        nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=6), nn.ReLU(),
        nn.Conv2d(6, 4, 1), nn.Flatten(),
    )  # fmt: skip
    kill(model[0])
    kill(model[2], 2)
    report = rows_of(model, 3, 3, 3)
    lead, depthwise, _ = report.rows
    assert (lead.hidden, lead.dead, lead.weak) == (6, 0, 1)
    assert (depthwise.hidden, depthwise.dead, depthwise.weak, depthwise.fixed) == (0, 1, 0, False)
    reasons = [(reason, units) for reason, units, _ in report.fixed]
    assert reasons[0] == ("re-initialised together with those of another layer", 6)


def test_values_that_are_not_finite_are_counted_as_units():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    with torch.no_grad():
        model[0].bias[3] = torch.inf
    assert [row.nonfinite for row in rows_of(model, 4).rows] == [1, 2]
