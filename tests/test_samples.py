"""The rows that ranks are from: which positions, and that they hold the true activations."""

import math

import numpy
import pytest
import torch
from helpers.sampled import Capture, Conv, Mlp, batches_of, true_rows
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastplastic.measure.row_samples import Reservoir


def sampled(name, size, parts):
    """Let positions compete in parts of these sizes; return which stay, by their place."""
    reservoir, start = Reservoir(name, size), 0
    held = numpy.full(size, -1)
    for part in parts:
        chosen, places = reservoir.enter(part)
        assert len(set(places)) == len(places) == len(chosen)
        held[places] = chosen + start
        start += part
    return held[held >= 0]


def test_all_positions_stay_while_there_are_few():
    assert sampled("a", 20, [3, 0, 5, 12]).tolist() == list(range(20))
    assert sampled("a", 20, []).tolist() == []


def test_the_sample_has_no_position_twice_and_does_not_depend_on_the_parts():
    whole = sampled("a", 50, [1000])
    assert len(set(whole)) == 50
    for parts in ([30, 970], [50, 950], [999, 1], [1] * 1000, [100] * 10):
        assert set(sampled("a", 50, parts)) == set(whole)
    assert set(sampled("b", 50, [1000])) != set(whole)


def test_every_position_stays_as_often_as_any_other():
    stays = numpy.zeros((2000, 60))
    for number, row in enumerate(stays):
        row[sampled(f"layer{number}", 20, [7, 0, 13, 40])] = 1
    # A third of 2000 each, with a standard deviation of 21; the names are the seeds.
    counts = stays.T @ stays
    assert abs(counts.diagonal() - 2000 / 3).max() < 4.5 * 21
    # Two of them together 2000 * 20 / 60 * 19 / 59 times, with a standard deviation of 14.
    pairs = counts[~numpy.eye(60, dtype=bool)]
    assert abs(pairs - 2000 * 380 / 3540).max() < 5.5 * 14


@pytest.fixture
def capture(monkeypatch):
    return Capture(monkeypatch)


class Twice(Mlp):
    """A layer that is called twice."""

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x))) + self.fc2(self.act(self.fc1(-x)))


class Gated(Mlp):
    """Half of the units go through the activation function, the others are factors."""

    def forward(self, x):
        gate, up = self.fc1(x).chunk(2, -1)
        return self.fc2(torch.cat([self.act(gate), up], -1))


class Branches(nn.Module):
    """A grouped convolution beside one that is not, read together."""

    def __init__(self):
        super().__init__()
        self.left = nn.Conv2d(3, 4, 1, groups=1)
        self.right = nn.Conv2d(3, 6, 3, groups=3, padding=1)
        self.act = nn.ReLU()
        self.out = nn.Conv2d(10, 2, 1)

    def forward(self, x):
        return self.out(self.act(torch.cat([self.right(x), self.left(x)], 1))).mean((2, 3))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_rows_of_a_convolution(capture, training, layout):
    """Before dropout: half of the zeros of the consumer's input are no activations."""
    torch.manual_seed(0)
    model = Conv().train(training).to(memory_format=layout)
    batches = [(x.to(memory_format=layout), y) for x, y in batches_of(4, 3, 5, 6)]
    rows = capture.of(model, batches)["0"]
    assert rows.shape == (2 * 4 * 5 * 6, 8)
    torch.testing.assert_close(rows, true_rows(model, batches, ("2", "output"), 1))


@pytest.mark.parametrize(
    "act",
    [nn.LeakyReLU(0.2), nn.SiLU(), nn.GELU("tanh"), nn.Hardswish(), nn.ELU(), nn.Tanh()],
    ids=str,
)
def test_rows_are_after_the_activation_function(capture, act):
    torch.manual_seed(0)
    model = Conv(act).eval()
    batches = batches_of(4, 3, 5, 6)
    torch.testing.assert_close(
        capture.of(model, batches)["0"], true_rows(model, batches, ("2", "output"), 1)
    )


@pytest.mark.parametrize("shape", [(4, 3), (4, 7, 3), (4, 5, 6, 3)])
def test_rows_where_units_are_the_last_axis(capture, shape):
    torch.manual_seed(0)
    model = Mlp().eval()
    batches = batches_of(*shape)
    rows = capture.of(model, batches)
    for name, where in (("fc1", ("fc2", "input")), ("fc2", ("fc2", "output"))):
        torch.testing.assert_close(rows[name], true_rows(model, batches, where, -1))
        assert len(rows[name]) == 2 * math.prod(shape[:-1])


def test_rows_of_a_layer_that_is_called_twice(capture):
    torch.manual_seed(0)
    model = Twice().eval()
    batches = batches_of(4, 3)
    rows = capture.of(model, batches)["fc1"]
    torch.testing.assert_close(rows, true_rows(model, batches, ("act", "output"), -1))
    assert len(rows) == 2 * 2 * 4


def test_what_is_computed_again_in_the_backward_pass_is_no_row(capture):
    class Checkpointed(Mlp):
        def forward(self, x):
            return checkpoint(super().forward, x, use_reentrant=False)

    torch.manual_seed(0)
    model = Checkpointed().eval()
    batches = batches_of(4, 3)
    rows = capture.of(model, batches)["fc1"]
    torch.testing.assert_close(rows, true_rows(model, batches, ("act", "output"), -1))


def test_rows_of_a_gated_layer(capture):
    """Units with an activation function and units without are columns of one matrix."""
    torch.manual_seed(0)
    model = Gated(nn.SiLU()).eval()
    batches = batches_of(4, 3)
    torch.testing.assert_close(
        capture.of(model, batches)["fc1"], true_rows(model, batches, ("fc2", "input"), -1)
    )


def test_rows_of_layers_that_meet_in_one_tensor(capture):
    torch.manual_seed(0)
    model = Branches().eval()
    batches = batches_of(2, 3, 4, 4)
    rows, true = capture.of(model, batches), true_rows(model, batches, ("out", "input"), 1)
    torch.testing.assert_close(rows["right"], true[:, :6])
    torch.testing.assert_close(rows["left"], true[:, 6:])


class SharedNorm(nn.Module):
    """One norm has the units of two layers, each in other channels."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(3, 4), nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(8)
        self.out = nn.Linear(8, 2)

    def forward(self, x):
        return self.out(self.norm(torch.cat([self.left(x), self.right(x)], 1)).relu())


def test_rows_behind_a_norm_that_has_the_units_of_two_layers(capture):
    torch.manual_seed(0)
    model = SharedNorm().eval()
    model.norm.bias.data.normal_()
    batches = batches_of(6, 3)
    rows, true = capture.of(model, batches), true_rows(model, batches, ("out", "input"), 1)
    assert {"left", "right"} <= rows.keys()
    for name, columns in (("left", true[:, :4]), ("right", true[:, 4:])):
        torch.testing.assert_close(rows[name], columns)


def test_rows_of_one_unit_along_an_axis_of_positions(capture):
    """Each of the nine channels that the hook sees is a position of the only unit."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 1, 1), nn.ReLU(), nn.Flatten(), nn.Linear(9, 2)).eval()
    batches = batches_of(4, 2, 9)
    rows = capture.of(model, batches)["0"]
    assert rows.shape == (2 * 4 * 9, 1)
    true = true_rows(model, batches, ("1", "output"), 1)
    torch.testing.assert_close(rows.sort(0).values, true.sort(0).values)
