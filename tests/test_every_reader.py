"""No way out of a unit but through the columns that the graph names: two resets, one output.

All hidden units are re-initialised with outgoing weights of zero, with two seeds. What they compute
afterwards differs, and may not be seen.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastplastic import plan, profile, reinit_
from fastplastic.graph import build_graph


class Net(nn.Module):
    """A net whose units of "a" are read by "b", and by something else in `forward`."""

    def __init__(self, read, **layers: nn.Module) -> None:
        super().__init__()
        self.a, self.b, self.w = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.head, self.up, self.down = nn.Linear(6, 3), nn.Linear(6, 5), nn.Linear(5, 6)
        self._read = read
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.a(x))
        # These units are always hidden.
        other = self.down(F.relu(self.up(x)))
        return self.head(torch.tanh(self.b(h)) + self._read(self, h, x) + other)


def square(net: Net, x: Tensor) -> Tensor:
    return net.w(x).unsqueeze(1).expand(-1, 6, -1)


READS = {
    "addmm": lambda s, h, x: torch.addmm(h, x, s.w.weight),
    "addmm, scaled": lambda s, h, x: torch.addmm(h, x, s.w.weight, beta=0.5, alpha=2),
    "baddbmm": lambda s, h, x: torch.baddbmm(h[:, None], x[:, None], square(s, x))[:, 0],
    "addbmm": lambda s, h, x: torch.addbmm(h, x[:, None].transpose(0, 1), square(s, x)[:1]),
    "addmv": lambda s, h, x: torch.addmv(h.mean(0), s.w.weight, x[0]).expand(len(x), -1),
    "addr": lambda s, h, x: torch.addr(h, x[:, 0], s.w.weight[0]),
    "addcmul": lambda s, h, x: torch.addcmul(h, x, s.w(x)),
    "addcmul, later": lambda s, h, x: torch.addcmul(x, h, s.w(x)),
    "addcdiv": lambda s, h, x: torch.addcdiv(h, x, s.w(x).exp()),
    "lerp": lambda s, h, x: torch.lerp(x, s.w(x), h),
    "lerp, first": lambda s, h, x: torch.lerp(h, x, 0.5),
    "where": lambda s, h, x: torch.where(x > 0, h, s.w(x)),
    "where, mask": lambda s, h, x: torch.where(h > 0.5, x, s.w(x)),
    "masked_fill": lambda s, h, x: x.masked_fill(h > 0.5, 0.0),
    "masked_fill, value": lambda s, h, x: x.masked_fill(x > 0, h[0, 0]),
    "einsum": lambda s, h, x: torch.einsum("bi,ij->bj", h, s.w.weight),
    "einsum, sum of all": lambda s, h, x: torch.einsum("bi,bj->bj", h, s.w(x)),
    "a computed bias": lambda s, h, x: F.linear(x, s.w.weight, h[0]),
    "a computed weight": lambda s, h, x: F.linear(x, torch.outer(h[0], h[1])),
    "a computed filter": lambda s, h, x: F.conv1d(x[:, None], h[:1, None, :3], padding=1)[:, 0],
    "a bias of a convolution": lambda s, h, x: F.conv1d(
        x[:, :, None], s.w.weight[:, :, None], h[0]
    )[:, :, 0],
    "max": lambda s, h, x: torch.max(s.w(x), h),
    "maximum": lambda s, h, x: torch.maximum(x, h),
    "a computed norm": lambda s, h, x: F.layer_norm(x, (6,), h[0], h[1]),
    "a computed affine": lambda s, h, x: F.batch_norm(x, torch.zeros(6), torch.ones(6), h[0], h[1]),
    "query, key and mask": lambda s, h, x: F.scaled_dot_product_attention(
        x[:, None], s.w(x)[:, None], x[:, None], attn_mask=h[:, :1, None]
    )[:, 0],
    "power": lambda s, h, x: x.abs() ** h,
    "number to the power": lambda s, h, x: 2.0**h,
    "clamp": lambda s, h, x: torch.clamp(x, min=h),
    "clamp, by keyword": lambda s, h, x: torch.clamp(x, max=h),
    "prelu": lambda s, h, x: F.prelu(s.w(x), h[0]),
    "index": lambda s, h, x: h[torch.arange(len(x)).flip(0)],
    "gather": lambda s, h, x: h.gather(1, torch.zeros(len(x), 6, dtype=torch.int64)),
    "copied into": lambda s, h, x: s.w(x).copy_(h),
    "added in place": lambda s, h, x: s.w(x).add_(h),
    "cumulative": lambda s, h, x: h.cumsum(1),
    "repeated": lambda s, h, x: h.repeat_interleave(2, 1)[:, :6],
    "scatter": lambda s, h, x: x.scatter(1, torch.zeros(len(x), 6, dtype=torch.int64), h),
    "bilinear": lambda s, h, x: F.bilinear(h, x, s.w.weight[None].expand(6, -1, -1)),
    "distance": lambda s, h, x: torch.cdist(h, x)[:, :1].expand(-1, 6),
    "outer": lambda s, h, x: torch.einsum("bi,bj->bij", h, x).sum(1),
    "matrix product": lambda s, h, x: (h[:, None] @ square(s, x))[:, 0],
    "matrix product, second": lambda s, h, x: (x[:, None] @ h[:, :, None].expand(-1, -1, 6))[:, 0],
    "gate": lambda s, h, x: x * h.sigmoid(),
    "kept by a constant": lambda s, h, x: s.w(h * 2 + 1),
    "noise in train mode": lambda s, h, x: s.w(h * torch.rand_like(h) if s.training else h),
}


def resets(net: nn.Module, x: Tensor, seed: int) -> Tensor:
    net = copy.deepcopy(net).eval()
    found = profile(net, [(x, torch.arange(len(x)) % 3)])
    reinit_(net, plan(found, criterion="random", ratio=1.0, max_layer_fraction=1.0), seed=seed)
    with torch.no_grad():
        return net(x)


@pytest.mark.parametrize("read", READS.values(), ids=READS.keys())
def test_nothing_reads_a_hidden_unit_but_its_consumers(read) -> None:
    torch.manual_seed(0)
    net, x = Net(read), torch.randn(8, 6)
    graph = build_graph(net.eval(), x)
    assert graph.note is None, graph.note
    assert graph["up"].hidden.all()
    one, two = resets(net, x, 1), resets(net, x, 2)
    torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-6)


def test_units_that_only_known_layers_read_are_hidden() -> None:
    """The test above would pass, too, if nothing were ever hidden."""
    for name in ("kept by a constant", "noise in train mode"):
        graph = build_graph(Net(READS[name]).eval(), torch.randn(8, 6))
        assert graph["a"].hidden.all(), name
        assert {consumer.name for consumer in graph["a"].consumers} == {"b", "w"}


class Auxiliary(nn.Module):
    """A net with a head that runs in train mode only."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Linear(8, 3)
        self.aux = nn.Sequential(nn.Conv2d(8, 4, 1), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3))
        self.bn = nn.BatchNorm2d(8)

    def forward(self, x: Tensor):
        h = F.relu(self.bn(self.a(x)))
        out = self.head(F.relu(self.b(h)).mean((2, 3)))
        return (out, self.aux(h)) if self.training else out


@pytest.mark.parametrize("training", [False, True])
def test_a_head_of_train_mode_is_a_reader_in_both_modes(training: bool) -> None:
    torch.manual_seed(0)
    net, x = Auxiliary(), torch.randn(8, 3, 6, 6)
    net(x)
    net.train(training)
    graph = build_graph(net, x)
    assert [consumer.name for consumer in graph["a"].consumers] == ["b", "aux.0"] or training
    assert {consumer.name for consumer in graph["a"].consumers} == {"b", "aux.0"}
    assert graph["a"].hidden.all() and graph["aux.0"].hidden.all()
    assert graph.skipped == () and [layer.name for layer in graph.layers if layer.head] == [
        "head", "aux.3",
    ]  # fmt: skip
    batches = [(x, torch.arange(8) % 3)]
    found = profile(net, batches)
    heads = []
    for seed in (1, 2):
        fresh = copy.deepcopy(net)
        chosen = plan(found, criterion="random", ratio=1.0, max_layer_fraction=1.0, include=["a"])
        assert chosen.count == 8
        reinit_(fresh, chosen, seed=seed)
        fresh.train()
        fresh.bn.eval()
        heads.append(torch.cat(fresh(x)))
    torch.testing.assert_close(*heads, rtol=1e-6, atol=1e-6)


def test_layers_of_train_mode_are_not_measured_in_eval_mode() -> None:
    net, x = Auxiliary(), torch.randn(8, 3, 6, 6)
    net(x)
    found = profile(net.eval(), [(x, torch.arange(8) % 3)])
    assert [name for name, _ in found.coverage.skipped] == ["aux.0", "aux.3"]
    assert {reason for _, reason in found.coverage.skipped} == {
        "it was not run on this data in eval mode"
    }
    assert found["aux.0"].to_dict()["dead"] is None


class Otherwise(nn.Module):
    """A net that reads its units in another order in train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.a(x))
        return self.b(h.flip(1) if self.training else h)


def test_units_that_are_read_otherwise_in_train_mode_are_not_hidden() -> None:
    graph = build_graph(Otherwise().eval(), torch.randn(8, 6))
    assert graph["a"].reasons == {"read otherwise by b in train mode": 4}


class OnlyInEval(nn.Module):
    """A net whose train mode cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.a(x))
        return self.b(h) if not self.training or float(h.sum()) > -1 else h


def test_of_a_model_whose_train_mode_cannot_be_traced_nothing_is_hidden() -> None:
    graph = build_graph(OnlyInEval().eval(), torch.randn(8, 6))
    assert graph["a"].activation == "relu"
    assert graph["a"].reasons == {"the model could not be traced in train mode": 4}
    assert graph.note is not None and graph.note.startswith(
        "the model could not be traced in train mode: which layers read its units there is not "
        "known, and none can be re-initialised (GuardOnDataDependentSymNode: "
    )
    assert not any(layer.hidden.any() for layer in graph.layers)


class Optional(nn.Module):
    """A net with a branch that runs only where it is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.extra = nn.Linear(6, 4), nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor, extra: bool = False) -> Tensor:
        h = F.relu(self.a(x))
        return self.b(h) + self.extra(h) if extra else self.b(h)


def test_a_layer_that_is_in_no_trace_but_runs_leaves_nothing_hidden() -> None:
    net, x = Optional().eval(), torch.randn(8, 6)
    targets = torch.arange(8) % 3
    plainly = profile(net, [(x, targets)])
    assert plainly["a"].hidden.all()
    asked = profile(net, [((x, True), targets)], example_inputs=(x, False))
    assert not asked["a"].hidden.any()
    assert asked["a"].reason == "extra ran, which is not in the trace of the model (4)"
    assert ("extra", "not reached in the traced forward pass") in asked.coverage.skipped
    for layer in (asked, plainly):
        assert layer["a"].measured.all()
