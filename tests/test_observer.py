"""What the hooks of a graph by hand see, tensor by tensor."""

import pytest
import torch
from helpers.monitored import inputs, like, net, step
from torch import nn

from fastplastic import Monitor
from fastplastic.kernels.reference.activation_stats import activation_stats
from fastplastic.kernels.reference.gradient_stats import gradient_stats
from fastplastic.kernels.reference.parameter_stats import parameter_stats
from fastplastic.measure import reader as _reader
from fastplastic.measure.observer import Observer
from fastplastic.stats import LayerStats
from fastplastic.wiring import Consumer, Site, UnitGraph, UnitLayer


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

    monkeypatch.setattr(_reader, "activation_stats", counting(activation_stats))
    monkeypatch.setattr(_reader, "gradient_stats", counting(gradient_stats))
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
            _reader,
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
    assert full.stats.table[0].tolist() == [15] * 6
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
        "fc2": "no hook can see its pre-activation; its weights are measured",
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
