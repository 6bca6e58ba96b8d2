"""The monitor in a user's own loop, against statistics taken by hand."""

import copy
import io
import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastplastic
from fastplastic import Monitor
from fastplastic.errors import InputError
from fastplastic.kernels.reference.activation_stats import activation_stats
from fastplastic.kernels.reference.gradient_stats import gradient_stats
from fastplastic.kernels.reference.parameter_stats import parameter_stats
from fastplastic.measure import observer as _observer
from fastplastic.measure.observer import Observer
from fastplastic.stats import STATISTICS, LayerStats
from fastplastic.wiring import Consumer, Site, UnitGraph, UnitLayer

GRADIENT_ROWS = (
    "n_g", "sum_abs_g", "sum_sq_g", "n_dw", "sum_abs_dw", "sum_sq_dw", "sum_abs_w_dw", "n_dw_out",
    "sum_w_out_dw_out",
)  # fmt: skip


class Net(nn.Module):
    """Two hidden layers; the first activation function overwrites its input."""

    def __init__(self, recompute=None):
        super().__init__()
        self.fc1 = nn.Linear(6, 8)
        self.act1 = nn.ReLU(inplace=True)
        self.fc2 = nn.Linear(8, 5)
        self.act2 = nn.GELU()
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(5, 3)
        self.recompute = recompute

    def body(self, x):
        return self.drop(self.act2(self.fc2(self.act1(self.fc1(x)))))

    def forward(self, x):
        if self.recompute is None:
            return self.head(self.body(x))
        return self.head(checkpoint(self.body, x, use_reentrant=self.recompute))


def net(**options):
    torch.manual_seed(0)
    return Net(**options).eval()


def inputs(seed, size=16):
    return torch.randn(size, 6, generator=torch.Generator().manual_seed(seed))


def step(model, seed=0, scale=1.0):
    (model(inputs(seed)).square().mean() * scale).backward()


def by_hand(model, seeds):
    """The tables of `Net`'s two hidden layers: activations, their gradients, weights per step."""
    tables = {"fc1": 0, "fc2": 0}
    for seed in seeds:
        z1 = model.fc1(inputs(seed))
        h1 = z1.relu()
        z2 = model.fc2(h1)
        h2 = nn.functional.gelu(z2)
        loss = model.head(h2).square().mean()
        weights = model.fc1.weight, model.fc2.weight, model.head.weight
        dw = torch.autograd.grad(loss, weights, retain_graph=True)
        g1, g2 = torch.autograd.grad(loss, [h1, h2])
        pairs = [("fc1", z1, g1, "relu", 0), ("fc2", z2, g2, "gelu", 1)]
        for name, z, g, function, i in pairs:
            rows, _ = parameter_stats([weights[i]], [dw[i]])
            _, columns = parameter_stats([weights[i + 1]], [dw[i + 1]])
            parts = [activation_stats(z, 1, function), gradient_stats(g, 1), rows, columns]
            tables[name] = merged(tables[name], torch.cat(parts))
    return tables


def merged(one, two):
    if isinstance(one, int):
        return two
    total = one + two
    low, high = STATISTICS.index("min_h"), STATISTICS.index("max_h")
    total[low] = torch.minimum(one[low], two[low])
    total[high] = torch.maximum(one[high], two[high])
    return total


def close(profile, tables, rtol=1e-5):
    for name, table in tables.items():
        torch.testing.assert_close(profile[name].stats.table, table, rtol=rtol, atol=1e-6)


def like(found, expected):
    """The kernels sum up in float32, the reference in float64."""
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def traces(model):
    """Everything a hook or an attribute could be left in."""
    sizes = [
        (len(value) if isinstance(value, dict) else None, key)
        for module in model.modules()
        for key, value in sorted(vars(module).items())
    ]
    hooks = [len(p._backward_hooks or {}) for p in model.parameters()]
    return sizes, hooks


def observe(model, graph, run):
    observer = Observer(model, graph)
    observer.attach()
    run()
    observer.detach()
    return observer.observation({})


def layer(name, units, **changes):
    fields = {
        "kind": "linear", "weight": f"{name}.weight", "bias": None, "unit_dim": 0,
        "n_units": units, "norm": None, "activations": ((0, units, "identity"),),
        "hidden": torch.ones(units, dtype=torch.bool),
    }  # fmt: skip
    return UnitLayer(name, **(fields | changes))


def site(module, where="output", axis=-1, units=None):
    return Site(module, where, axis, units)


def test_statistics_of_two_steps():
    model = net()
    with Monitor(model, inputs(9, 2)) as monitor:
        step(model, 1)
        step(model, 2)
    profile = monitor.compute()
    close(profile, by_hand(model, [1, 2]))
    assert (profile.samples, profile.batches, profile.mode) == (32, 2, "eval")
    assert profile.coverage.measured == profile.coverage.found == 3


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_activations_count_once(reentrant):
    model = net(recompute=reentrant)
    with Monitor(model, inputs(9, 2)) as monitor:
        # Reentrant checkpointing wants an input with a gradient.
        model(inputs(1).requires_grad_()).square().mean().backward()
    close(monitor.compute(), by_hand(model, [1]))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint_around_the_whole_model(reentrant):
    model = net()
    with Monitor(model, inputs(9, 2)) as monitor:
        x = inputs(1).requires_grad_()
        checkpoint(model, x, use_reentrant=reentrant).square().mean().backward()
    profile = monitor.compute()
    close(profile, by_hand(model, [1]))
    assert profile.batches == 1


def test_training_is_bit_identical_with_a_monitor():
    """Dropout draws, momentum, everything."""

    def train(model, around):
        torch.manual_seed(3)
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        model.train()
        with around:
            for seed in range(4):
                optimizer.zero_grad()
                step(model, seed)
                optimizer.step()
        return [p.detach().clone() for p in model.parameters()]

    plain = train(net(), torch.enable_grad())
    model = net()
    monitored = train(model, Monitor(model, inputs(9, 2)))
    assert all(torch.equal(a, b) for a, b in zip(plain, monitored, strict=True))


def test_making_one_and_leaving_one_changes_nothing():
    model = net().train()
    before, state = traces(model), copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    monitor = Monitor(model, inputs(9, 2))
    assert torch.equal(torch.get_rng_state(), random)
    assert traces(model) == before
    with pytest.raises(ZeroDivisionError), monitor:
        step(model)
        assert traces(model) != before
        raise ZeroDivisionError
    assert traces(model) == before
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert model.training


def test_gradients_are_those_of_one_backward_and_grad_is_left_alone():
    """Accumulation over two backward passes: the second is not counted with the first."""
    model, plain = net(), net()
    with Monitor(model, inputs(9, 2)) as monitor:
        step(model, 1)
        model.fc1.weight.grad.mul_(1000)
        step(model, 2)
    close(monitor.compute(), by_hand(model, [1, 2]))
    step(plain, 1)
    plain.fc1.weight.grad.mul_(1000)
    step(plain, 2)
    assert torch.equal(model.fc1.weight.grad, plain.fc1.weight.grad)


def test_every():
    model = net()
    with Monitor(model, inputs(9, 2), every=3) as monitor:
        for seed in range(7):
            step(model, seed)
    close(monitor.compute(), by_hand(model, [0, 3, 6]))
    assert monitor.compute().batches == 3


def test_pause_resume_reset_detach():
    model = net()
    monitor = Monitor(model, inputs(9, 2))
    step(model, 0)
    monitor.attach()
    step(model, 1)
    with monitor.pause():
        step(model, 2)
    monitor.pause()
    step(model, 3)
    monitor.resume()
    monitor.attach()
    step(model, 4)
    monitor.detach()
    step(model, 5)
    close(monitor.compute(), by_hand(model, [1, 4]))
    monitor.reset()
    sixth = by_hand(model, [6])
    with monitor:
        step(model, 6)
        close(monitor.compute(), sixth)
        step(model, 7)
    close(monitor.compute(), by_hand(model, [6, 7]))


def test_backward_after_leaving_is_not_counted():
    model = net()
    with Monitor(model, inputs(9, 2)) as monitor:
        loss = model(inputs(1)).square().mean()
    loss.backward()
    stats = monitor.compute()["fc1"].stats
    assert stats["n"].tolist() == [16] * 8
    assert not stats["n_g"].any()


def test_no_grad():
    model = net()
    with Monitor(model, inputs(9, 2)) as monitor, torch.no_grad():
        model(inputs(1))
    profile = monitor.compute()
    stats, expected = profile["fc2"].stats, by_hand(model, [1])["fc2"]
    like(stats.table[:9], expected[:9])
    assert not stats.table[9:13].any()
    # Weights are read at the end, without gradients.
    torch.testing.assert_close(stats["sum_abs_w"], expected[STATISTICS.index("sum_abs_w")])
    assert not stats["n_dw"].any()
    assert profile["fc2"].no_gradient
    assert any("no gradient reached 3 layers" in note for note in profile.notes)


def test_inference_mode():
    model = net()
    with Monitor(model, inputs(9, 2)) as monitor:
        with torch.inference_mode():
            model(inputs(1))
        step(model, 2)
    one, two = by_hand(model, [1, 2]), by_hand(model, [2])
    table = monitor.compute()["fc1"].stats.table
    torch.testing.assert_close(table[:9], one["fc1"][:9])
    torch.testing.assert_close(table[9:], two["fc1"][9:], rtol=1e-6, atol=1e-9)


def test_frozen_parameter_and_one_that_thaws():
    model = net()
    model.fc1.weight.requires_grad_(False)
    model.fc2.weight.requires_grad_(False)
    with Monitor(model, inputs(9, 2)) as monitor:
        step(model, 1)
        model.fc2.weight.requires_grad_(True)
        step(model, 2)
    profile = monitor.compute()
    assert profile["fc1"].stats["n_dw"].tolist() == [0] * 8
    assert profile["fc1"].stats["n_in"].tolist() == [6] * 8
    assert profile["fc1"].no_gradient
    assert profile["fc2"].stats["n_dw"].tolist() == [8] * 5


class Scaler:
    def __init__(self, scale):
        self.scale = scale

    def get_scale(self):
        return self.scale


@pytest.mark.parametrize("kind", [float, lambda scale: lambda: scale, Scaler])
def test_grad_scale(kind):
    model = net()
    with Monitor(model, inputs(9, 2), grad_scale=kind(1024.0)) as monitor:
        step(model, 1, scale=1024.0)
        step(model, 2, scale=1024.0)
    close(monitor.compute(), by_hand(model, [1, 2]))


def test_grad_scale_that_changes():
    model = net()
    scaler = Scaler(2.0)
    with Monitor(model, inputs(9, 2), grad_scale=scaler) as monitor:
        step(model, 1, scale=2.0)
        scaler.scale = 64.0
        step(model, 2, scale=64.0)
        scaler.scale = 1e9
    close(monitor.compute(), by_hand(model, [1, 2]))


def test_overflowing_steps_are_dropped_and_said():
    model = net()
    with Monitor(model, inputs(9, 2), grad_scale=8.0) as monitor:
        step(model, 1, scale=8.0)
        step(model, 2, scale=float("inf"))
        step(model, 3, scale=8.0)
    profile = monitor.compute()
    expected = by_hand(model, [1, 3])
    for name in ("fc1", "fc2"):
        stats = profile[name].stats
        rows = [STATISTICS.index(row) for row in GRADIENT_ROWS]
        torch.testing.assert_close(stats.table[rows], expected[name][rows], rtol=1e-6, atol=1e-9)
        assert stats["n"].tolist() == [48] * stats.n_units
        assert not stats["n_nonfinite_g"].any()
        assert not stats["n_nonfinite_dw"].any()
    text = "1 of 3 steps had gradients that are not finite under the loss scale: left out"
    assert text in profile.notes


def test_overflow_without_a_scale_is_counted():
    model = net()
    with Monitor(model, inputs(9, 2)) as monitor:
        step(model, 1)
        step(model, 2, scale=float("inf"))
    stats = monitor.compute()["fc2"].stats
    assert stats["n_nonfinite_g"].sum() > 0
    assert stats["n_nonfinite_dw"].sum() > 0
    assert stats.table.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model = net().to(dtype)
    x = inputs(1).to(dtype)
    with Monitor(model, x[:2]) as monitor:
        model(x).float().square().mean().backward()
    z = model.fc2(model.fc1(x).relu())
    expected = activation_stats(z, 1, "gelu")
    profile = monitor.compute()
    # The reference rounds every h to the dtype, as the network does, the kernel does not.
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(profile["fc2"].stats.table[:9], expected, rtol=eps, atol=eps)
    assert profile.dtype == str(dtype).removeprefix("torch.")


class Conv(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(4, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.act = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(8, 6, 3, groups=2)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.conv2(self.act(self.bn(self.conv1(x)))).mean((2, 3)))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_convolution_norm_and_groups(layout):
    torch.manual_seed(0)
    model = Conv().eval().to(memory_format=layout)
    model.bn.running_mean.normal_()
    x = torch.randn(3, 4, 9, 7).to(memory_format=layout)
    with Monitor(model, x[:2]) as monitor:
        model(x).square().mean().backward()
    z = model.bn(model.conv1(x))
    h = z.relu()
    h.retain_grad()
    model.head(model.conv2(h).mean((2, 3))).square().mean().backward()
    stats = monitor.compute()["conv1"].stats
    like(stats.table[:9], activation_stats(z, 1, "relu"))
    like(stats.table[9:13], gradient_stats(h.grad, 1))
    w, dw = model.conv2.weight.detach().double(), model.conv2.weight.grad.double() / 2
    for unit in range(8):
        # Column `unit` of the grouped weight: index unit % 4 in the rows of group unit // 4.
        rows = slice(0, 3) if unit < 4 else slice(3, 6)
        mine, slope = w[rows, unit % 4], dw[rows, unit % 4]
        assert stats["n_out"][unit] == mine.numel()
        torch.testing.assert_close(stats["sum_abs_w_out"][unit], mine.abs().sum())
        torch.testing.assert_close(stats["sum_w_out_dw_out"][unit], (mine * slope).sum())
    # The saliency that needs no activation: sum of h dL/dh, over positions.
    saliency = (h.detach().double() * h.grad.double()).sum((0, 2, 3))
    torch.testing.assert_close(stats["sum_w_out_dw_out"], saliency, rtol=1e-4, atol=1e-7)


def test_module_called_twice_sums_over_calls():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return self.fc(self.fc(x).relu())

    model = Twice()
    units = torch.arange(4)
    place = site("fc", units=units)
    graph = UnitGraph((layer("fc", 4, z_sites=(place,), g_sites=(place,)),))
    x = torch.randn(5, 4)
    seen = observe(model, graph, lambda: model(x).sum().backward())
    stats = LayerStats(seen.stats.table)
    z = model.fc(x)
    both = torch.cat([z, model.fc(z.relu())])
    like(stats.table[:9], activation_stats(both, 1))
    assert stats["n_g"].tolist() == [10] * 4


def concat_model():
    class Concat(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(3, 2)
            self.b = nn.Linear(3, 3)
            self.act = nn.Tanh()
            self.head = nn.Linear(5, 1)

        def forward(self, x):
            return self.head(self.act(torch.cat([self.a(x), self.b(x)], -1)))

    torch.manual_seed(0)
    return Concat()


def test_layers_that_share_a_tensor_read_it_once(monkeypatch):
    model = concat_model()
    first, second = torch.tensor([0, 1, -1, -1, -1]), torch.tensor([-1, -1, 0, 1, 2])
    graph = UnitGraph(
        tuple(
            layer(
                name, units, activations=((0, units, "tanh"),),
                z_sites=(Site("act", "input", -1, own),), g_sites=(Site("act", "output", -1, own),),
            )
            for name, units, own in (("a", 2, first), ("b", 3, second))
        )
    )  # fmt: skip
    read = []

    def counting(function):
        def call(x, *args, out):
            read.append(x.numel())
            return function(x, *args, out=out)

        return call

    monkeypatch.setattr(_observer, "activation_stats", counting(activation_stats))
    monkeypatch.setattr(_observer, "gradient_stats", counting(gradient_stats))
    x = torch.randn(7, 3)
    seen = observe(model, graph, lambda: model(x).sum().backward())
    assert sorted(read) == [14, 21, 35]
    z = torch.cat([model.a(x), model.b(x)], -1)
    h = z.tanh()
    h.retain_grad()
    model.head(h).sum().backward()
    like(seen.stats.table[:9], activation_stats(z, 1, "tanh"))
    like(seen.stats.table[9:13], gradient_stats(h.grad, 1))


def test_two_layers_in_the_same_channels(monkeypatch):
    model = nn.Sequential(nn.Linear(3, 4))
    place = site("0", units=torch.arange(4))
    graph = UnitGraph(tuple(layer(name, 4, z_sites=(place,), g_sites=(place,)) for name in "ab"))
    calls = []
    for name, function in (("activation", activation_stats), ("gradient", gradient_stats)):
        monkeypatch.setattr(
            _observer,
            f"{name}_stats",
            lambda *args, out, f=function: calls.append(f) or f(*args, out=out),
        )
    x = torch.randn(5, 3)
    seen = observe(model, graph, lambda: model(x).sum().backward())
    assert calls == [activation_stats, gradient_stats]
    assert torch.equal(seen.stats.table[:, :4], seen.stats.table[:, 4:])
    like(seen.stats.table[:9, :4], activation_stats(model[0](x), 1))


def test_two_axes_of_one_tensor():
    model = nn.Sequential(nn.Identity())
    graph = UnitGraph(
        tuple(
            layer(f"axis {axis}", size, z_sites=(site("0", axis=axis, units=torch.arange(size)),))
            for axis, size in ((1, 4), (2, 4), (-2, 4))
        )
    )
    x = torch.randn(5, 4, 4)
    seen = observe(model, graph, lambda: model(x))
    expected = [activation_stats(x, axis) for axis in (1, 2, 1)]
    torch.testing.assert_close(seen.stats.table[:9], torch.cat(expected, 1))


def test_channels_of_one_unit_add_up():
    """Two channels per unit, one unit out of order, one channel of nobody, two functions."""
    model = nn.Sequential(nn.Linear(3, 7), nn.Identity())
    units = torch.tensor([1, 0, 2, 2, -1, 1, 0])
    functions = ((0, 2, "relu"), (2, 3, "tanh"))
    place = Site("0", "output", 1, units)
    graph = UnitGraph((layer("0", 3, activations=functions, z_sites=(place,), g_sites=(place,)),))
    x = torch.randn(6, 3)
    seen = observe(model, graph, lambda: model(x).sum().backward())
    z = model[0](x)
    for unit in range(3):
        own = z[:, units == unit].reshape(-1, 1)
        expected = activation_stats(own, 1, "tanh" if unit == 2 else "relu")[:, 0]
        like(seen.stats.table[:9, unit], expected)
    assert seen.stats.table[9].tolist() == [12, 12, 12]


def test_padding_is_left_out():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 6)
            self.head = nn.Linear(6, 2)

        def forward(self, x, attention_mask=None):
            return self.head(self.fc(x).relu()).mean(1)

    torch.manual_seed(0)
    model = Tokens()
    x = torch.randn(3, 5, 4)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 1, 1, 1, 0]])
    place = site("fc", units=torch.arange(6))
    graph = UnitGraph((layer("fc", 6, z_sites=(place,), g_sites=(place,)),))

    def run():
        model(x, attention_mask=mask).square().sum().backward()

    seen = observe(model, graph, run)
    kept = model.fc(x)[mask.bool()]
    like(seen.stats.table[:9], activation_stats(kept, 1))
    assert seen.stats.table[9].tolist() == [10] * 6
    assert seen.masked
    images = torch.randn(3, 5, 7, 4)
    other = observe(model, graph, lambda: model(images, attention_mask=mask))
    assert other.stats.table[0].tolist() == [105] * 6
    full = observe(model, graph, lambda: model(x, attention_mask=torch.ones(3, 5)))
    assert full.table[0].tolist() == [15] * 6
    assert not full.masked


def test_input_by_keyword():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, *, x):
            return self.fc(input=x)

    model = Named()
    graph = UnitGraph((layer("fc", 3, z_sites=(site("fc", "input", units=torch.arange(3)),)),))
    x = torch.randn(4, 3)
    seen = observe(model, graph, lambda: model(x=x))
    like(seen.stats.table[:9], activation_stats(x, 1))
    assert seen.samples == 4


def test_tensor_that_does_not_fit_is_reported():
    model = net()
    wrong = layer("fc1", 8, z_sites=(site("fc1", axis=1, units=torch.arange(9) % 8),))
    none = layer("fc2", 5, z_sites=())
    right = layer("head", 3, z_sites=(site("head", units=torch.arange(3)),))
    skipped = (("extra", "not reached"),)
    graph = UnitGraph((wrong, none, right), skipped)
    monitor = Monitor(model, inputs(9, 2))
    monitor._graph = graph
    monitor._observer = Observer(model, graph)
    with monitor:
        step(model, 1)
    coverage = monitor.compute().coverage
    assert (coverage.found, coverage.measured) == (4, 1)
    assert dict(coverage.skipped) == {
        "extra": "not reached",
        "fc1": "its hook saw torch.float32 (16, 8), expected 9 channels on axis 1",
        "fc2": "no hook can see its pre-activation",
    }


def test_layer_that_does_not_run_is_reported():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 4), nn.Linear(6, 4)

        def forward(self, x, other=False):
            return self.b(x) if other else self.a(x)

    model = Branches()
    layers = tuple(layer(n, 4, z_sites=(site(n, units=torch.arange(4)),)) for n in "ab")
    observer = Observer(model, UnitGraph(layers))
    observer.attach()
    model(inputs(1))
    observer.detach()
    from fastplastic.measure.run import assemble

    profile = assemble(model, UnitGraph(layers), observer.observation({}), seed=0)
    assert profile.coverage.skipped == (("b", "it was not run on this data in train mode"),)


@pytest.mark.parametrize(
    ("modes", "expected"),
    [((True,), "train"), ((False,), "eval"), ((True, False), "mixed")],
)
def test_mode(modes, expected):
    model = net()
    with Monitor(model, inputs(9, 2)) as monitor:
        for training in modes:
            step(model.train(training))
    profile = monitor.compute()
    assert profile.mode == expected
    note = "some modules were in train mode and some in eval mode"
    assert (note in profile.notes) == (expected == "mixed")


def test_one_module_in_another_mode_is_mixed():
    model = net().train()
    model.drop.eval()
    with Monitor(model, inputs(9, 2)) as monitor:
        step(model)
    profile = monitor.compute()
    assert profile.mode == "mixed"
    assert "some modules were in train mode and some in eval mode" in profile.notes


def test_modules_called_outside_of_the_model_are_not_counted():
    model = net()
    with Monitor(model, inputs(9, 2)) as monitor:
        model.fc1(inputs(0))
        step(model, 1)
        model.fc1(inputs(2))
        with pytest.raises(RuntimeError, match="shapes"):
            model(torch.ones(2, 5))
        model.fc1(inputs(3))
    assert monitor.compute()["fc1"].stats["n"].tolist() == [16] * 8


def test_interrupt_in_the_forward_pass():
    """Hooks that end a forward pass are not called for Ctrl-C."""

    def interrupt(*_):
        raise KeyboardInterrupt

    model = net()
    monitor = Monitor(model, inputs(9, 2))
    handle = model.act2.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt), monitor:
        step(model)
    handle.remove()
    with monitor:
        model.fc2(torch.ones(3, 8))
        step(model)
    assert monitor.compute()["fc2"].stats["n"].tolist() == [32] * 5


def test_a_copy_of_an_observed_model_is_not_observed():
    model = net()
    with Monitor(model, inputs(9, 2)) as monitor:
        twin = copy.deepcopy(model)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        again = torch.load(file, weights_only=False)
        step(twin)
        step(again)
        with pytest.raises(InputError, match="none of 3 weight layers was measured"):
            monitor.compute()
        step(model, 1)
    close(monitor.compute(), by_hand(model, [1]))
    assert torch.equal(twin(inputs(1)), model(inputs(1)))


def test_backward_passes_on_several_threads():
    """Their hooks run at the same time; no sum may be lost."""
    model = net()
    with Monitor(model, inputs(9, 2)) as monitor:
        losses = [model(inputs(seed)).square().mean() for seed in range(24)]
        threads = [threading.Thread(target=loss.backward) for loss in losses]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    close(monitor.compute(), by_hand(model, range(24)))


# The compiler itself looks at .grad of tensors inside the graph.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_model():
    """Hooks are called as they are, never traced."""
    torch._dynamo.reset()
    model = net()
    with Monitor(model, inputs(9, 2)) as monitor:
        compiled = torch.compile(model, backend="eager")
        for seed in (1, 2):
            compiled(inputs(seed)).square().mean().backward()
    close(monitor.compute(), by_hand(model, [1, 2]))


def test_weight_that_two_layers_share():
    """Its gradient is the sum over both uses, seen once."""
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    x = torch.randn(5, 4)
    place = site("0", units=torch.arange(4))
    reader = Consumer("2", "0.weight", 1, 1, torch.arange(4))
    graph = UnitGraph((layer("0", 4, z_sites=(place,), consumers=(reader,)),))
    observer = Observer(model, graph, parameters=True)
    observer.attach()
    model(x).square().sum().backward()
    observer.detach()
    stats = LayerStats(observer.observation({}).stats.table)
    expected, _ = parameter_stats([model[0].weight], [model[0].weight.grad])
    torch.testing.assert_close(stats["sum_abs_dw"], expected[4])
    assert stats["n_dw"].tolist() == [4] * 4
    assert stats["n_dw_out"].tolist() == [4] * 4


@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_convolution(groups):
    """Its weight is (in, out / groups, ...): columns on dimension 0, units on dimension 1."""
    model = nn.Sequential(
        nn.Conv2d(2, 4, 1), nn.ReLU(), nn.ConvTranspose2d(4, 6, 2, groups=groups), nn.Flatten()
    )
    reader = Consumer("2", "2.weight", 0, groups, torch.arange(4))
    up = layer(
        "2",
        6,
        kind="conv transpose",
        unit_dim=1,
        z_sites=(site("2", axis=1, units=torch.arange(6)),),
    )
    down = layer("0", 4, z_sites=(site("0", axis=1, units=torch.arange(4)),), consumers=(reader,))
    observer = Observer(model, UnitGraph((down, up)), parameters=True)
    observer.attach()
    model(torch.randn(3, 2, 4, 4)).square().sum().backward()
    observer.detach()
    table = observer.observation({}).stats.table
    weight = model[2].weight.detach().double()
    torch.testing.assert_close(
        LayerStats(table[:, :4])["sum_abs_w_out"], weight.abs().sum((1, 2, 3))
    )
    per = 6 // groups
    for unit, found in enumerate(LayerStats(table[:, 4:])["sum_abs_w"]):
        rows = slice(4 // groups * (unit // per), 4 // groups * (unit // per + 1))
        torch.testing.assert_close(found, weight[rows, unit % per].abs().sum())


@pytest.mark.parametrize("every", [0, -1, 1.5, True, "2"])
def test_bad_every(every):
    with pytest.raises(InputError, match=f"every is {every!r}, expected a positive"):
        Monitor(net(), inputs(0), every=every)


@pytest.mark.parametrize("scale", [0, -2.0, float("nan"), float("inf")])
def test_bad_scale(scale):
    with pytest.raises(InputError, match=r"grad_scale is .*, expected a positive number"):
        Monitor(net(), inputs(0), grad_scale=scale)


def test_scale_of_another_kind():
    with pytest.raises(InputError, match="'x', expected a number, a function or a GradScaler"):
        Monitor(net(), inputs(0), grad_scale="x")


def test_nothing_measured():
    model = net()
    with Monitor(model, inputs(9, 2)) as monitor:
        pass
    with pytest.raises(InputError, match=r"none of 3 weight layers was measured \(fc1: it was not"):
        monitor.compute()


def test_compute_can_be_merged_and_repeated():
    model = net()
    with Monitor(model, inputs(9, 2)) as monitor:
        step(model, 1)
        first = monitor.compute()["fc1"].stats.table
        assert torch.equal(first, monitor.compute()["fc1"].stats.table)
        step(model, 2)
    assert not torch.equal(first, monitor.compute()["fc1"].stats.table)


def test_public_name():
    assert fastplastic.Monitor is Monitor
