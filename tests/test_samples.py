"""The rows that ranks are from: which positions, and that they hold the true activations."""

import math
import random
import subprocess
import sys
from dataclasses import asdict

import numpy
import pytest
import torch
import transformers
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastplastic import Profile, profile
from fastplastic.diagnostics import Ranks, ranks_of
from fastplastic.measure import row_samples as _samples
from fastplastic.measure.row_samples import ROWS, Reservoir, columns_of
from fastplastic.wiring import Site, UnitLayer


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


class Capture:
    """What ranks were computed from, in the order of the layers."""

    def __init__(self, monkeypatch):
        self.seen = []
        monkeypatch.setattr(_samples, "ranks_of", self)

    def __call__(self, matrix):
        self.seen.append(matrix)
        return ranks_of(matrix)

    def of(self, model, batches, **options):
        """Profile a model; return {layer name: rows}, in float32."""
        self.seen.clear()
        found = profile(model, batches, ranks=True, **options)
        measured = [layer for layer in found if layer.ranks is not None]
        assert [matrix.dtype for matrix in self.seen] == [torch.float32] * len(measured)
        for layer, matrix in zip(measured, self.seen, strict=True):
            assert (layer.ranks.rows, layer.ranks.units) == tuple(matrix.shape)
            assert layer.ranks == ranks_of(matrix)
        return {layer.name: matrix for layer, matrix in zip(measured, self.seen, strict=True)}


@pytest.fixture
def capture(monkeypatch):
    return Capture(monkeypatch)


def true_rows(model, batches, where, axis):
    """The true activations [positions, channels]: what goes into (or out of) a module."""
    rows = []

    def note(value):
        rows.append(value.detach().clone().movedim(axis, -1).flatten(0, -2))

    name, side = where
    module = model.get_submodule(name)
    if side == "input":
        handle = module.register_forward_pre_hook(lambda _, args: note(args[0]))
    else:
        handle = module.register_forward_hook(lambda *given: note(given[2]))
    with torch.no_grad(), torch.random.fork_rng():
        for x, _ in batches:
            model(x)
    handle.remove()
    return torch.cat(rows).float()


def batches_of(*shape, batches=2, **options):
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(*shape, generator=generator, **options), torch.arange(shape[0]) % 2)
        for _ in range(batches)
    ]


class Conv(nn.Sequential):
    """Convolution, norm, in-place activation function, dropout."""

    def __init__(self, act=None):
        super().__init__(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), act or nn.ReLU(inplace=True),
            nn.Dropout(0.5), nn.Conv2d(8, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        )  # fmt: skip


class Mlp(nn.Module):
    """An MLP over the last axis of tokens (B, T, C) or of images (B, H, W, C)."""

    def __init__(self, act=None):
        super().__init__()
        self.fc1 = nn.Linear(3, 8)
        self.act = act or nn.GELU()
        self.fc2 = nn.Linear(8, 2)

    def forward(self, x):
        y = self.fc2(self.act(self.fc1(x)))
        return y.flatten(1, -2).mean(1) if y.ndim > 2 else y


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
