"""Tensors that are read at a random sample of their positions: what is drawn, and what is told."""

import copy
import math

import pytest
import torch
from helpers import Net
from helpers.compiling import WARNINGS, compiled, nothing_compiled
from helpers.monitored import inputs, like, net, step
from helpers.program import SMALL
from helpers.recycling import network, train
from torch import nn

from fastplastic import Monitor, Recycler, profile
from fastplastic.errors import InputError
from fastplastic.kernels import activation_stats, gradient_stats
from fastplastic.measure import PositionSample
from fastplastic.measure.padding import tokens_of

__all__ = ["nothing_compiled"]
pytestmark = WARNINGS


def picked(x, axis, limit, tokens=None, seed=3, call=1):
    """Return what is read of a tensor in one of the calls of a model, [positions, units]."""
    sample = PositionSample(limit, seed)
    for _ in range(call):
        sample.begin()
    rows, along = sample.pick(x, axis, tokens)
    return rows.movedim(along, -1).flatten(0, -2)


def numbered(*shape):
    """Return a tensor of which each number is there once."""
    return torch.arange(math.prod(shape), dtype=torch.float32).reshape(shape)


images = numbered(4, 3, 8, 5)
TENSORS = {
    "NCHW": (images, 1),
    "channels_last": (images.contiguous(memory_format=torch.channels_last), 1),
    "NHWC": (numbered(4, 8, 5, 3), -1),
    "tokens": (numbered(6, 20, 3), 2),
    "tokens of a slice": (numbered(6, 20, 7)[:, 2:, 1:4], -1),
    "channels before tokens": (numbered(6, 3, 40), 1),
    "two-dimensional": (numbered(90, 3), 1),
    "units first": (numbered(3, 190), 0),
    "sequence first": (numbered(20, 6, 3).transpose(0, 1), 2),
    "one unit": (numbered(9, 1, 4, 5), 1),
}


@pytest.mark.parametrize("name", TENSORS)
def test_whole_positions_are_picked_and_none_twice(name):
    x, axis = TENSORS[name]
    rows = x.movedim(axis, -1).flatten(0, -2)
    found = picked(x, axis, 2)
    assert len(found) == 2
    # In the order of the tensor: where a row stands is told by its first number.
    places = [int((rows[:, 0] == row[0]).nonzero()) for row in found]
    assert places == sorted(set(places)) and torch.equal(found, rows[places])
    assert torch.equal(found, picked(x, axis, 2))
    others = [picked(x, axis, 2, seed=seed, call=call) for seed, call in [(4, 1), (3, 2), (3, 3)]]
    assert not all(torch.equal(found, other) for other in others)


def test_the_layout_in_memory_changes_nothing():
    (x, axis), (other, _) = TENSORS["NCHW"], TENSORS["channels_last"]
    assert torch.equal(picked(x, axis, 2), picked(other, axis, 2))


@pytest.mark.parametrize(
    ("limit", "name"), [(160, "channels_last"), (54, "channels_last"), (5, "NCHW"), (None, "NHWC")]
)
def test_what_is_read_whole_is_left_as_it_is(limit, name):
    """As many as there are, and what it would take longer to pick from than to read."""
    x, axis = TENSORS[name]
    sample = PositionSample(limit)
    sample.begin()
    assert sample.pick(x, axis, None) == (x, axis)
    assert sample.notes() == ()


@pytest.mark.parametrize("shape", [(0, 3), (5, 0), (2, 0, 3), (3,)])
def test_tensors_without_positions(shape):
    assert PositionSample(2).pick(torch.zeros(shape), -1, None)[0].shape == shape


def test_padding_is_left_out_before_positions_are_drawn():
    x = torch.full((3, 8, 2), 9.0)
    mask = torch.zeros(3, 8)
    mask[0, :5] = mask[2, 3:] = 1
    x[mask.bool()] = numbered(10, 2)
    tokens = tokens_of(mask)
    sizes = {len(picked(x, 2, limit, tokens)) for limit in (4, 10, 24)}
    assert sizes == {10}
    seen = torch.cat([picked(x, 2, 3, tokens, call=call) for call in range(1, 20)])
    assert set(seen[:, 0].tolist()) == set(range(0, 20, 2))


def test_every_position_comes_equally_often_and_means_are_unbiased():
    calls, limit, n = 2000, 5, 20
    values = torch.tensor([0.0] * 13 + [1.0] * 6 + [40.0])
    sample = PositionSample(limit, 1)
    counts, means = torch.zeros(n), []
    for _ in range(calls):
        sample.begin()
        rows, _ = sample.pick(torch.stack([torch.arange(n), values], 1), 1, None)
        counts[rows[:, 0].long()] += 1
        means.append(rows[:, 1].mean())
    share = limit / n
    assert (counts / calls - share).abs().max() < 4 * math.sqrt(share * (1 - share) / calls)
    error = math.sqrt((1 - share) / limit) * values.std()
    found = torch.stack(means)
    assert (found.mean() - values.mean()).abs() < 4 * error / math.sqrt(calls)
    assert found.std() == pytest.approx(float(error), rel=0.1)


def by_hand(model, seeds, limit):
    """The activations and gradients of `fc2`, at the positions of each step."""
    sample = PositionSample(limit, torch.initial_seed())
    h, g = 0, 0
    for seed in seeds:
        z = model.fc2(model.fc1(inputs(seed)).relu())
        hidden = nn.functional.gelu(z)
        (slope,) = torch.autograd.grad(model.head(hidden).square().mean(), hidden)
        sample.begin()
        h = h + activation_stats(sample.pick(z.detach(), 1, None)[0], 1, "gelu")
        g = g + gradient_stats(sample.pick(slope, 1, None)[0], 1)
    return h, g


def watched(model, seeds, **options):
    with Monitor(model, inputs(9, 2), **options) as monitor:
        for seed in seeds:
            step(model, seed)
    return monitor


@pytest.mark.parametrize("recompute", [None, True, False])
def test_activations_and_gradients_are_read_at_the_positions_of_their_step(recompute):
    model = net(recompute=recompute)
    with Monitor(model, inputs(9, 2), sample_positions=5) as monitor:
        for seed in (1, 2):
            # Reentrant checkpointing wants an input with a gradient.
            model(inputs(seed).requires_grad_()).square().mean().backward()
    stats = monitor.compute()["fc2"].stats
    h, g = by_hand(net(), [1, 2], 5)
    sums = [0, 1, 2, 3, 6, 7, 8]
    like(stats.table[sums], h[sums])
    like(stats.table[9:13], g)
    assert stats["n"].tolist() == stats["n_g"].tolist() == [10] * 5


def test_weights_are_read_whole_as_without():
    model = net()
    found = watched(model, [1, 2], sample_positions=5).compute()
    expected = watched(net(), [1, 2]).compute()
    for layer in expected.layers:
        assert torch.equal(found[layer.name].stats.table[13:], layer.stats.table[13:])


def test_as_many_positions_as_there_are_change_no_bit():
    found = watched(net(), [1, 2], sample_positions=16).compute()
    expected = watched(net(), [1, 2]).compute()
    for layer in expected.layers:
        assert torch.equal(found[layer.name].stats.table, layer.stats.table)
    assert found.notes == expected.notes


def test_the_same_seed_gives_the_same_figures_and_no_global_number_is_drawn():
    tables = []
    for seed in (5, 5, 6):
        model = net()
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        monitor = watched(model, [1, 2], sample_positions=4)
        assert torch.equal(torch.get_rng_state(), before)
        tables.append(monitor.compute()["fc1"].stats.table)
    assert torch.equal(tables[0], tables[1]) and not torch.equal(tables[0], tables[2])
    # After a reset, from the start.
    torch.manual_seed(6)
    monitor.reset()
    with monitor:
        step(model, 1), step(model, 2)
    assert torch.equal(monitor.compute()["fc1"].stats["sum_h"], tables[2][1])


def test_every():
    monitor = watched(net(), range(7), sample_positions=4, every=3)
    stats = monitor.compute()["fc1"].stats
    assert stats["n"].tolist() == stats["n_g"].tolist() == [12] * 8


def test_a_note_says_what_is_only_a_bound():
    (note,) = watched(net(), [1], sample_positions=4).compute().notes
    for words in ("at 4 of them", "the largest has 16", "up to 43.3% of the spread", "(1 - p)^n"):
        assert words in note


def test_a_unit_that_fires_rarely_seems_dead_as_often_as_the_note_says():
    model = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 2))
    nn.init.ones_(model[0].weight), nn.init.zeros_(model[0].bias)
    x = torch.full((64, 1), -1.0)
    x[10] = 1
    monitor = Monitor(model, x, sample_positions=16)
    dead = []
    with monitor:
        for _ in range(40):
            monitor._observer._positions.restart(len(dead) + 1)
            model(x).sum().backward()
            dead.append(bool(monitor.compute()["0"].dead[0]))
            monitor.reset()
    # 1 - 16/64, of 40.
    assert 0.55 < sum(dead) / len(dead) < 0.95
    assert not profile(model, [(x, torch.zeros(64, dtype=torch.int64))])["0"].dead.any()


def masked_model():
    def forward(own, x, attention_mask=None):
        return own.head(torch.relu(own.fc(x)))

    class Masked(Net):
        def forward(self, x, attention_mask=None):
            return self._forward(self, x, attention_mask)

    torch.manual_seed(0)
    return Masked(forward, fc=nn.Linear(4, 6), head=nn.Linear(6, 2))


def test_attention_masks():
    model, mask = masked_model(), torch.ones(3, 8)
    mask[1:, 2:] = 0
    x = torch.randn(3, 8, 4)
    x[~mask.bool()] = 1e6
    with Monitor(model, {"x": x, "attention_mask": mask}, sample_positions=3) as monitor:
        for _ in range(3):
            model(x=x, attention_mask=mask).square().mean().backward()
    found = monitor.compute()
    stats = found["fc"].stats
    assert stats["n"].tolist() == stats["n_g"].tolist() == [9] * 6
    assert stats["max_h"].max() < 100
    assert "the largest has 12" in " ".join(found.notes)


def test_profile_takes_it_too():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)
    )
    batches = [(torch.randn(4, 3, 10, 10), torch.tensor([0, 1, 2, 0])) for _ in range(2)]
    whole = profile(model, batches)
    for layout in (torch.contiguous_format, torch.channels_last):
        model.to(memory_format=layout)
        given = [(x.to(memory_format=layout), y) for x, y in batches]
        before = torch.get_rng_state()
        found = profile(model, given, sample_positions=3, ranks=True)
        assert torch.equal(torch.get_rng_state(), before)
        assert found["0"].stats["n"].tolist() == [6] * 8
        assert found["0"].ranks.rows == 6
        assert any("sample_positions" in note for note in found.notes)
        assert (found["0"].stats["max_h"] <= whole["0"].stats["max_h"] + 1e-5).all()
    assert "3 of them" in " ".join(profile(model, batches, sample_positions=3).notes)
    assert whole.notes == profile(model, batches, sample_positions=5000).notes


@pytest.mark.parametrize("way", ["wrapped", "in place", "function"])
@pytest.mark.parametrize("fullgraph", [False, True])
def test_compiled_steps_are_refused(way, fullgraph):
    model = net()
    with Monitor(model, inputs(9, 2), sample_positions=5) as monitor:
        function = compiled(model, way, fullgraph=fullgraph)
        expected = (InputError, torch._dynamo.exc.Unsupported) if fullgraph else InputError
        with pytest.raises(expected, match="measure with every=2 or more, which runs"):
            step(function, 1)
        with monitor.pause():
            step(function, 2)


def test_part_of_a_model_that_is_compiled_breaks_its_graph():
    model = net()
    expected = watched(model, [1, 2], sample_positions=5).compute()
    with Monitor(model, inputs(9, 2), sample_positions=5) as monitor:
        model.fc2.compile(backend="aot_eager")
        for seed in (1, 2):
            step(model, seed)
    for layer in expected.layers:
        like(monitor.compute()[layer.name].stats.table, layer.stats.table)


def test_compiled_models_are_measured_in_eager_steps():
    model = net()
    expected = watched(copy.deepcopy(model), [1, 2, 3], every=2, sample_positions=5).compute()
    with Monitor(model, inputs(9, 2), every=2, sample_positions=5) as monitor:
        function = compiled(model)
        for seed in (1, 2, 3):
            step(function, seed)
    assert torch.equal(monitor.compute()["fc1"].stats.table, expected["fc1"].stats.table)
    batches = [(inputs(1), torch.zeros(16, dtype=torch.int64))]
    found = profile(compiled(net()), batches, sample_positions=5)
    assert next(iter(found.layers)).stats["n"].tolist() == [5] * 8


OPTIONS = {
    "redo": {"every": 4, "threshold": 0.8},
    "cbp": {"rate": 0.02, "maturity": 3},
    "custom": {"criterion": "activation_gradient", "ratio": 0.4, "every": 6, "outgoing": "fresh"},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_recyclers_choose_by_a_sample_and_resume_to_the_same_bits(name):
    def recycled(stop=None, limit=5):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        example, more = torch.randn(2, 8), OPTIONS[name] | {"sample_positions": limit}
        recycler = Recycler(model, example, optimizer, name, seed=2, **more)
        train(model, optimizer, recycler, range(stop or 12))
        if stop:
            recycler.detach()
            # Another process has another seed.
            torch.manual_seed(77)
            follower = Recycler(model, example, optimizer, name, seed=2, **more)
            follower.load_state_dict(recycler.state_dict())
            train(model, optimizer, follower, range(stop, 12))
            recycler = follower
        recycler.detach()
        return recycler.log, model.state_dict()

    log, state = recycled()
    assert log
    for other in (recycled(), recycled(stop=5)):
        assert all(torch.equal(state[key], value) for key, value in other[1].items())
    assert not all(torch.equal(state[key], x) for key, x in recycled(limit=None)[1].items())


def test_recyclers_read_other_positions_in_each_step_and_run_compiled_models():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    recycler = Recycler(
        model, torch.randn(2, 8), optimizer, "redo", every=1, threshold=0.0, sample_positions=5
    )
    function, sums = compiled(model), []
    x = torch.randn(16, 8)
    for _ in range(3):
        function(x).sum().backward()
        stats = recycler._watch.take()["0"].stats
        assert stats["n"].tolist() == [5] * 16
        sums.append(stats["sum_abs_h"].sum().item())
        optimizer.step()
        recycler.step()
    recycler.detach()
    assert len(set(sums)) == 3


def test_what_is_refused():
    model = network()
    x, optimizer = torch.randn(2, 8), torch.optim.SGD(model.parameters(), 0.1)
    for value in (0, -1, True, 1.5, "all"):
        text = f"sample_positions is {value!r}, expected a positive integer: leave it out to read"
        with pytest.raises(InputError, match=text):
            Monitor(model, x, sample_positions=value)
        with pytest.raises(InputError, match=text):
            profile(model, [(x, torch.tensor([0, 1]))], sample_positions=value)
        with pytest.raises(InputError, match=r"sample_positions is .*, expected an integer of at"):
            Recycler(model, x, optimizer, "redo", sample_positions=value)
    with pytest.raises(InputError, match=r"batches are read whole: leave one of them out"):
        Recycler(model, x, optimizer, "redo", sample_positions=9, batches=lambda: [])


def test_the_command_line(run):
    outcome = run("profile", *SMALL, "--sample-positions", 10)
    assert outcome.code == 0
    assert "read at 10 of them in each step" in " ".join(outcome.output.split())
    assert run("profile", *SMALL, "--sample-positions", 0).code == 2
