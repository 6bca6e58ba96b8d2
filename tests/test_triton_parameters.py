"""The Triton statistics of weights against the float64 reference."""

import math

import pytest
import torch
from helpers import REFERENCE as reference
from helpers.triton_stats import (
    DEVICE,
    DTYPES,
    TOLERANCE,
    WARNINGS,
    noise,
    numpy_does_not_warn,
    parameter,
    poisoned,
)

from fastplastic.kernels.gpu import runtime as _triton_runtime

__all__ = ["numpy_does_not_warn", "poisoned"]
pytestmark = WARNINGS


# One weight of each way to read: rows that can be read wide or not, a single element, longer than
# a tile and taller than a chunk, the layouts of convolutions, transposed views, groups (depthwise
# too), one that must be copied, nothing.
WEIGHTS = {
    "wide rows": (noise(16, 64), 1),
    "odd rows": (noise(37, 101), 1),
    "one element": (noise(1, 1), 1),
    "more than a task": (noise(133, 140), 1),
    "convolution": (noise(16, 8, 3, 3), 1),
    "channels_last": (noise(16, 8, 3, 3).contiguous(memory_format=torch.channels_last), 1),
    "some columns of channels_last": (
        noise(16, 8, 3, 3).contiguous(memory_format=torch.channels_last)[:, :4],
        1,
    ),
    "transposed": (noise(37, 101).t(), 1),
    "transposed convolution": (noise(8, 16, 3, 3).transpose(0, 1), 1),
    "grouped": (noise(8, 3, 3, 3), 4),
    "grouped, transposed": (noise(6, 8).t(), 4),
    "depthwise": (noise(6, 1, 3, 3), 6),
    "depthwise, channels_last": (
        noise(6, 1, 3, 3).contiguous(memory_format=torch.channels_last),
        6,
    ),
    "two filters a channel": (noise(12, 1, 3, 3), 6),
    "copied": (noise(20, 30)[:, ::2], 1),
    "expanded": (noise(1, 6).expand(5, 6), 1),
    "no row": (noise(0, 64), 1),
    "no column": (noise(4, 0), 1),
}


def gradient_of(weight, kind):
    torch.manual_seed(0)
    if kind == "none":
        return None
    if kind == "expanded":
        return torch.full((), 0.5, device=DEVICE, dtype=weight.dtype).expand(weight.shape)
    dw = torch.randn(weight.shape).to(weight) * 0.1
    return dw if kind == "contiguous" else torch.empty_like(weight).copy_(dw)


def check_parameters(weights, gradients, groups=None):
    found = parameter.parameter_stats(weights, gradients, groups)
    expected = reference.parameter_stats(weights, gradients, groups)
    scale = [1 + t.abs() for t in expected]
    # Sums with signs cancel: their error is that of the sum of sizes.
    scale[1][4] += expected[0][6].max().nan_to_num(0) if expected[0].shape[1] else 0
    for one, other, size in zip(found, expected, scale, strict=True):
        assert torch.equal(one.isnan(), other.isnan())
        error = ((one - other).abs() / size).nan_to_num(0)
        assert (error <= TOLERANCE[torch.float32]).all(), error.max()
    assert torch.equal(found[0][[0, 3, 7]], expected[0][[0, 3, 7]])
    assert torch.equal(found[1][[0, 3, 5]], expected[1][[0, 3, 5]])
    return found


@pytest.mark.parametrize(("weight", "groups"), WEIGHTS.values(), ids=WEIGHTS.keys())
@pytest.mark.parametrize("kind", ["like the weight", "contiguous", "expanded", "none"])
def test_parameters(weight, groups, kind):
    check_parameters([weight], [gradient_of(weight, kind)], [groups])


def test_all_weights_at_once():
    weights = [weight for weight, _ in WEIGHTS.values()]
    kinds = ["like the weight", "none", "contiguous"] * len(weights)
    gradients = [gradient_of(w, kind) for w, kind in zip(weights, kinds, strict=False)]
    check_parameters(weights, gradients, [groups for _, groups in WEIGHTS.values()])


def test_weights_of_several_dtypes():
    weights = [noise(6, 8, dtype=dtype) for dtype in DTYPES] + [noise(6, 8, dtype=DTYPES[1])]
    gradients = [gradient_of(w, "contiguous") for w in weights[:3]] + [noise(6, 8)]
    check_parameters(weights, gradients)


def test_nonfinite_weight_gradients_and_weights():
    w, dw = noise(5, 7), noise(5, 7, scale=0.1)
    dw[0, 0], dw[0, 1], dw[2, 1] = math.nan, math.inf, -math.inf
    w[0, 0] = math.nan
    rows, columns = check_parameters([w], [dw])
    assert rows[7].tolist() == [2, 0, 1, 0, 0]
    assert columns[5].tolist() == [1, 2, 0, 0, 0, 0, 0]
    assert rows[1].isnan().tolist() == [True, False, False, False, False]
    assert rows[3:].isfinite().all()


@pytest.mark.parametrize("transposed", [False, True])
def test_nonfinite_values_in_rows_that_are_read_wide(transposed):
    """All sums of a task are made again where its first ones are spoilt."""
    w, dw = noise(133, 256), noise(133, 256, scale=0.1)
    dw[0, 0], dw[0, 1], dw[2, 1], dw[132, 130] = math.nan, math.inf, -math.inf, math.inf
    w[0, 0], w[1, 5], w[132, 130] = math.inf, math.inf, 0
    # Nothing is spoilt here.
    assert check_parameters([w[:128, 128:]], [dw[:128, 128:]])[0].isfinite().all()
    if transposed:
        w, dw = w.t(), dw.t()
    rows, columns = check_parameters([w], [dw])
    assert rows[7].sum() == columns[5].sum() == 4
    assert rows[4:].isfinite().sum() == rows[4:].numel() - 1
    check_parameters([w], [None])


def test_tables_are_added_to():
    w, dw = noise(5, 7), noise(5, 7, scale=0.1)
    once = parameter.parameter_stats([w], [dw])
    tables = [torch.zeros(len(t), 30, dtype=torch.float64, device=DEVICE) for t in once]
    out = tuple(wide[:, 4 : 4 + t.shape[1]] for wide, t in zip(tables, once, strict=True))
    for _ in range(2):
        assert parameter.parameter_stats([w], [dw], out=out)[0] is out[0]
    for total, table, wide in zip(out, once, tables, strict=True):
        torch.testing.assert_close(total, 2 * table)
        assert not wide[:, :4].any() and not wide[:, 4 + table.shape[1] :].any()


def test_steady_state_sends_changed_addresses_only(monkeypatch):
    w, dw, other = noise(6, 8), noise(6, 8), noise(6, 8) * 2
    parameter.parameter_stats([w], [dw])
    sent = []
    send = _triton_runtime.send
    monkeypatch.setattr(_triton_runtime, "send", lambda *a: (sent.append(a), send(*a)))
    parameter.parameter_stats([w], [dw])
    assert not sent
    found = parameter.parameter_stats([w], [other])
    assert len(sent) == 1
    torch.testing.assert_close(found[0], reference.parameter_stats([w], [other])[0])
    # Addresses that were used lately are still there.
    found = parameter.parameter_stats([w], [dw])
    assert len(sent) == 1
    torch.testing.assert_close(found[0], reference.parameter_stats([w], [dw])[0])
