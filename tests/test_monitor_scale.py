"""A monitor under a loss scale and in half precision."""

import pytest
import torch
from helpers.monitored import by_hand, close, inputs, net, step

from fastplastic import Monitor
from fastplastic.kernels.reference.activation_stats import activation_stats
from fastplastic.stats import STATISTICS

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
