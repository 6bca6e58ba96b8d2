"""Which rows of activations stay in the sample, and what is made of them."""

import math
import random
import subprocess
import sys
from dataclasses import asdict

import numpy
import pytest
import torch
import transformers
from helpers.sampled import Capture, Conv, Mlp, batches_of, true_rows
from torch import nn

from fastplastic import Profile, profile
from fastplastic.diagnostics import Ranks
from fastplastic.measure import row_samples as _samples
from fastplastic.measure.row_samples import ROWS, columns_of
from fastplastic.wiring import Site, UnitLayer


@pytest.fixture
def capture(monkeypatch):
    return Capture(monkeypatch)


def wired(unit_of_channel, n_units, activations):
    return UnitLayer(
        "a", "linear", "a.weight", None, 0, n_units, None, activations,
        torch.zeros(n_units, dtype=torch.bool),
        z_sites=(Site("a", "output", 1, torch.tensor(unit_of_channel)),),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("unit_of_channel", "channels", "functions"),
    [
        ([0, 1, 2], [[0, 1, 2]], ((0, 2, "relu"), (2, 3, "tanh"))),
        ([-1, 2, 0, -1, 1], [[2, 4, 1]], ((0, 2, "relu"), (2, 3, "tanh"))),
        # Twice over, and each twice in a row.
        ([0, 1, 2, 0, 1, 2], [[0, 1, 2], [3, 4, 5]], ((0, 2, "relu"), (2, 3, "tanh"))),
        ([0, 0, 1, 1, 2, 2], [[0, 2, 4], [1, 3, 5]], ((0, 2, "relu"), (2, 3, "tanh"))),
        # Units that are not there, and one more often than the other.
        ([2, -1, 2, 1, 2], [[3, 0]], ((0, 1, "relu"), (1, 2, "tanh"))),
        ([0, 1], [[0, 1]], ((0, 2, "relu"),)),
        ([-1], [], ()),
    ],
)
def test_columns_are_units_wherever_they_stand(unit_of_channel, channels, functions):
    layer = wired(unit_of_channel, 3, ((0, 2, "relu"), (2, 3, "tanh")))
    found = columns_of(layer)
    assert (found[0].tolist(), found[1]) == (channels, functions)


def test_rows_of_repeated_channels():
    """Hand-made, as few models have it: two channels for each of two units."""
    samples = _samples.RowSamples()
    z = torch.tensor([[1.0, -2, 3, 4], [-5, 6, 7, -8]])
    samples.read([wired([0, 1, 0, 1], 2, ((0, 2, "relu"),))], z, 1)
    assert samples.rows("a").tolist() == [[1, 0], [3, 4], [0, 6], [7, 0]]
    samples.read([wired([0, 1, 0, 1], 2, ((0, 2, "relu"),))], z.T[:, :1], 0)
    assert samples.rows("a")[4:].tolist() == [[1, 0], [3, 4]]
    assert samples.rows("b") is None


def test_rows_of_no_position_and_of_a_single_one():
    samples = _samples.RowSamples()
    layer = wired([1, 0], 2, ((0, 2, "relu"),))
    samples.read([layer], torch.empty(3, 2, 0), 1)
    assert samples.rows("a") is None
    samples.read([layer], torch.tensor([-1.0, 2]), 0)
    assert samples.rows("a").tolist() == [[2, 0]]


@pytest.fixture
def big():
    """A model whose rows all differ, images of 24 x 24 and the true rows in their order."""
    torch.manual_seed(0)
    model = Conv(nn.GELU()).eval()
    ((x, y),) = batches_of(8, 3, 24, 24, batches=1)
    true = true_rows(model, [(x, y)], ("2", "output"), 1)
    assert len(true.unique(dim=0)) == len(true) == 8 * 576
    return model, x, y, true


def nearest(rows, true):
    """Return which of the true rows each row is; rows of other batch sizes differ in bits."""
    distance, index = torch.cdist(rows.double(), true.double()).min(1)
    assert distance.max() < 1e-5
    return sorted(index.tolist())


def test_of_many_positions_rows_of_all_places_stay(capture, big):
    model, x, y, true = big
    rows = capture.of(model, [(x, y)])["0"]
    assert rows.shape == (ROWS, 8) == (1024, 8)
    positions = nearest(rows, true)
    assert len(set(positions)) == ROWS
    # Eight images, 128 each with a standard deviation of 9; and as many places in an image.
    for parts in (numpy.array(positions) // 576, numpy.array(positions) % 8):
        counts = numpy.bincount(parts, minlength=8)
        assert 128 - 45 < counts.min() <= counts.max() < 128 + 45


def test_the_same_positions_stay_in_other_batches_and_another_layout(capture, big):
    model, x, y, true = big
    positions = nearest(capture.of(model, [(x, y)])["0"], true)
    parts = [(x[start:stop], y[start:stop]) for start, stop in ((0, 1), (1, 4), (4, 8))]
    assert nearest(capture.of(model, parts)["0"], true) == positions
    model, x = (value.to(memory_format=torch.channels_last) for value in (model, x))
    assert nearest(capture.of(model, [(x, y)])["0"], true) == positions


def test_samples_do_not_depend_on_random_state(capture):
    torch.manual_seed(0)
    model, found = Conv().eval(), []
    for seed in (1, 2):
        torch.manual_seed(seed), random.seed(seed), numpy.random.seed(seed)
        found.append(capture.of(model, batches_of(8, 3, 24, 24))["0"])
    assert torch.equal(*found)


def test_padding_is_no_row(capture):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=12, num_labels=3,
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config).eval()
    batch = {
        "input_ids": torch.arange(40).reshape(4, 10),
        "attention_mask": (torch.arange(10) < torch.tensor([[10], [7], [3], [1]])).long(),
        "labels": torch.tensor([0, 1, 2, 0]),
    }
    rows = capture.of(model, [batch] * 2)["bert.encoder.layer.0.intermediate.dense"]
    true = []
    dense = model.bert.encoder.layer[0].output.dense
    dense.register_forward_pre_hook(lambda _, args: true.append(args[0].detach()))
    model(**batch)
    real = true[0][batch["attention_mask"].bool()]
    assert rows.shape == (2 * 21, 24)
    torch.testing.assert_close(rows, torch.cat([real, real]))


def test_half_precision(capture):
    torch.manual_seed(0)
    model = Mlp().eval().bfloat16()
    batches = batches_of(4, 7, 3, dtype=torch.bfloat16)
    rows = capture.of(model, batches)["fc1"]
    assert torch.equal(rows, true_rows(model, batches, ("fc2", "input"), -1))


def test_rows_that_are_not_finite_are_left_out(capture):
    torch.manual_seed(0)
    model = Mlp().eval()
    batches = batches_of(5, 3)
    batches[0][0][1, 2], batches[1][0][4, 0] = math.nan, math.inf
    rows = capture.of(model, batches)["fc1"]
    kept = torch.cat([batches[0][0][[0, 2, 3, 4]], batches[1][0][:4]])
    torch.testing.assert_close(rows, model.act(model.fc1(kept)).detach())


def test_without_a_finite_row_there_are_no_ranks(capture, tmp_path):
    torch.manual_seed(0)
    model = Mlp().eval()
    model.fc1.weight.data[1] = math.nan
    model.fc2.weight.data[:, 1] = 0
    found = profile(model, batches_of(5, 3), ranks=True)
    assert not capture.seen
    assert [layer.ranks for layer in found] == [None, None]
    assert "ranks" not in found["fc1"].to_dict()
    found.save(tmp_path / "p")
    assert Profile.load(tmp_path / "p")["fc1"].ranks is None


def test_a_layer_that_is_always_zero_uses_no_direction():
    torch.manual_seed(0)
    model = Mlp(nn.ReLU()).eval()
    nn.init.constant_(model.fc1.bias, -1e4)
    assert profile(model, batches_of(5, 3), ranks=True)["fc1"].ranks == Ranks(0.0, 0, 0.0, 10, 8)


def test_dead_units_and_copies_lower_the_ranks():
    """What they are for: 64 independent units, then 48 of them 0 or copies of others."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2))
    before = profile(model, batches_of(100, 64), ranks=True)["0"].ranks
    weight, bias = model[0].weight.data, model[0].bias.data
    weight[16:32], bias[16:32] = weight[:16], bias[:16]
    weight[32:], bias[32:] = 0, 0
    after = profile(model, batches_of(100, 64), ranks=True)["0"].ranks
    assert before.effective_rank > 48 and before.srank > 48
    assert after.effective_rank <= 16.01 and after.srank <= 16
    assert after.stable_rank < before.stable_rank


@pytest.mark.parametrize("training", [True, False])
def test_all_other_numbers_are_the_same(training):
    torch.manual_seed(0)
    model = Conv().train(training)
    found = []
    for ranks in (False, True):
        torch.manual_seed(3)
        found.append(profile(model, batches_of(4, 3, 5, 6), ranks=ranks, gradients=True))
    without, having = found
    for one, other in zip(without, having, strict=True):
        assert torch.equal(one.stats.table, other.stats.table)
        assert one.ranks is None and other.ranks is not None
        values = other.to_dict()
        assert values.pop("ranks") == asdict(other.ranks)
        assert one.to_dict() == values
    for name, gradient in without.gradients.items():
        assert torch.equal(gradient, having.gradients[name])


def test_who_asks_for_none_does_not_load_them(tmp_path):
    program = (
        "import sys, torch, fastplastic\n"
        "model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))"
        "\nbatch = torch.randn(5, 3), torch.zeros(5).long()\n"
        "fastplastic.profile(model, [batch])\n"
        "print([name in sys.modules for name in names])\n"
        "fastplastic.profile(model, [batch], ranks=True)\n"
        "print([name in sys.modules for name in names])\n"
    )
    names = "names = ['fastplastic.measure.row_samples']\n"
    result = subprocess.run(
        [sys.executable, "-c", names + program], capture_output=True, text=True, check=True,
        cwd=tmp_path,
    )  # fmt: skip
    assert result.stdout.splitlines() == ["[False]", "[True]"]
