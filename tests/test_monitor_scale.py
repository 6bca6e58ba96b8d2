"""A monitor under a loss scale and in half precision."""

import pytest
import torch
from helpers.monitored import by_hand, close, inputs, net, step
from torch.utils._python_dispatch import TorchDispatchMode

from fastplastic import Monitor
from fastplastic.kernels.reference.activation_stats import activation_stats
from fastplastic.stats import STATISTICS

aten = torch.ops.aten
GRADIENT_ROWS = (
    "n_g", "sum_abs_g", "sum_sq_g", "n_dw", "sum_abs_dw", "sum_sq_dw", "sum_abs_w_dw", "n_dw_out",
    "sum_w_out_dw_out",
)  # fmt: skip


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
        # The weights of a step are as good as any.
        assert stats["n_in"].tolist() == [3 * {"fc1": 6, "fc2": 8}[name]] * stats.n_units
    text = "1 of 3 steps had gradients that are not finite under the loss scale: left out"
    assert text in profile.notes


def amp_scaler(scale):
    return torch.amp.GradScaler("cpu", init_scale=scale)


def test_a_grad_scaler_of_torch_that_changes():
    model = net()
    scaler = amp_scaler(64.0)
    with Monitor(model, inputs(9, 2), grad_scale=scaler) as monitor:
        step(model, 1, scale=64.0)
        scaler.update(8.0)
        step(model, 2, scale=8.0)
        scaler.update(1e9)
    close(monitor.compute(), by_hand(model, [1, 2]))


def test_a_scaler_that_came_to_zero_drops_the_step():
    model = net()
    scaler = amp_scaler(4.0)
    with Monitor(model, inputs(9, 2), grad_scale=scaler) as monitor:
        step(model, 1, scale=4.0)
        scaler.scale(torch.ones(()))
        scaler.update(0.0)
        step(model, 2, scale=0.0)
    stats = monitor.compute()["fc2"].stats
    assert stats["n_g"].tolist() == [16] * stats.n_units
    assert any(note.startswith("1 of 2 steps had gradients") for note in monitor.compute().notes)


class NoWaiting(TorchDispatchMode):
    """Raises where the host would wait for a value of a tensor."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        packet = function.overloadpacket
        assert packet not in (aten._local_scalar_dense, aten.nonzero, aten.equal), packet
        return function(*args, **(kwargs or {}))


def test_the_host_does_not_wait_under_a_scaler(monkeypatch):
    model = net()
    scaler = amp_scaler(8.0)
    scaler.scale(torch.ones(()))
    with Monitor(model, inputs(9, 2), grad_scale=scaler) as monitor:
        with monkeypatch.context() as patched, NoWaiting():
            for name in ("cpu", "item", "tolist", "__bool__", "__float__", "__int__"):
                patched.setattr(torch.Tensor, name, lambda *_, name=name: pytest.fail(name))
            step(model, 1, scale=8.0)
            step(model, 2, scale=float("inf"))
            step(model, 3, scale=8.0)
    profile = monitor.compute()
    assert any(note.startswith("1 of 3 steps had gradients") for note in profile.notes)
    assert profile["fc2"].stats["n_g"].tolist() == [32] * profile["fc2"].n_units


def test_steps_after_compute_are_added():
    model = net()
    with Monitor(model, inputs(9, 2), grad_scale=8.0) as monitor:
        step(model, 1, scale=8.0)
        step(model, 2, scale=float("inf"))
        monitor.compute()
        step(model, 3, scale=float("inf"))
        step(model, 4, scale=8.0)
    profile = monitor.compute()
    assert any(note.startswith("2 of 4 steps had gradients") for note in profile.notes)
    assert profile["fc2"].stats["n_g"].tolist() == [32] * profile["fc2"].n_units


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
