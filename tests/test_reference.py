"""The float64 reference against numpy, loops and autograd."""

import math
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from torch.nn import functional

from fastplastic import kernels
from fastplastic.kernels import (
    ACTIVATION_ROWS,
    ACTIVATIONS,
    GRADIENT_ROWS,
    PARAMETER_COLUMNS,
    PARAMETER_ROWS,
    backend,
)
from fastplastic.kernels.reference import pieces
from fastplastic.kernels.reference.activation_stats import activation_stats
from fastplastic.kernels.reference.gradient_stats import gradient_stats
from fastplastic.kernels.reference.parameter_stats import parameter_stats

# Written out a second time, on purpose: the names are what the rest of the package relies on.
TORCH = {
    "identity": lambda z: z * 1,
    "relu": torch.relu,
    "relu6": functional.relu6,
    "hardtanh": lambda z: functional.hardtanh(z, -1, 1),
    "leaky_relu": lambda z: functional.leaky_relu(z, 0.01),
    "elu": lambda z: functional.elu(z, 1.0),
    "selu": torch.selu,
    "celu": lambda z: torch.celu(z, 1.0),
    "gelu": lambda z: functional.gelu(z, approximate="none"),
    "gelu_tanh": lambda z: functional.gelu(z, approximate="tanh"),
    "quick_gelu": lambda z: z * torch.sigmoid(1.702 * z),
    "silu": functional.silu,
    "mish": functional.mish,
    "softplus": functional.softplus,
    "hardswish": functional.hardswish,
    "hardsigmoid": functional.hardsigmoid,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def noise(*shape, dtype=torch.float32, scale=3.0):
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(*shape, generator=generator) * scale).to(dtype)


def slopes(name, z):
    """Return f'(z) in float64 by autograd; leaky ReLU's slope of 0.01 does not count as flat."""
    z = z.detach().double().requires_grad_()
    slope = torch.autograd.grad(TORCH[name](z).sum(), z)[0]
    return slope + (0.1 if name == "leaky_relu" else 0)


def naive(z, axis, name):
    """The statistics of one unit after the other, in numpy."""
    h = TORCH[name](z)
    flat = slopes(name, z).abs() <= 0.01
    columns = []
    for unit in range(z.shape[axis]):
        zs, hs, flats = (x.select(axis, unit).flatten() for x in (z, h, flat))
        values = hs.double().numpy()
        finite = np.isfinite(values) & np.isfinite(zs.double().numpy())
        kept = values[finite]
        columns.append([
            len(kept), kept.sum(), np.abs(kept).sum(), (kept * kept).sum(),
            kept.min(initial=np.inf), kept.max(initial=-np.inf), (kept == 0).sum(),
            flats.numpy()[finite].sum(), (~finite).sum(),
        ])  # fmt: skip
    return torch.tensor(np.array(columns, dtype=np.float64).reshape(-1, 9).T)


def same(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_row_names():
    assert ACTIVATION_ROWS == (
        "n", "sum_h", "sum_abs_h", "sum_sq_h", "min_h", "max_h", "n_zero", "n_flat",
        "n_nonfinite_h",
    )  # fmt: skip
    assert GRADIENT_ROWS == ("n_g", "sum_abs_g", "sum_sq_g", "n_nonfinite_g")
    assert set(TORCH) == set(ACTIVATIONS)
    assert PARAMETER_ROWS == (
        "n", "sum_abs_w", "sum_sq_w", "n_dw", "sum_abs_dw", "sum_sq_dw", "sum_abs_w_dw",
        "n_nonfinite_dw",
    )  # fmt: skip
    assert PARAMETER_COLUMNS == (
        "n", "sum_abs_w", "sum_sq_w", "n_dw", "sum_w_dw", "n_nonfinite_dw",
    )  # fmt: skip


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activations(name, dtype):
    z = noise(37, 11, dtype=dtype)
    z[0, 0], z[1, 1] = 0.0, -0.0
    same(activation_stats(z, 1, name), naive(z, 1, name))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_flat_is_exact(name):
    """On a fine grid, and at the numbers on both sides of where |f'| crosses 0.01."""
    z = torch.linspace(-12, 12, 24001, dtype=torch.float64)
    flat = slopes(name, z).abs() <= 0.01
    for i in torch.nonzero(flat[1:] != flat[:-1]).flatten().tolist():
        low, high = z[i].item(), z[i + 1].item()
        for _ in range(60):
            middle = (low + high) / 2
            is_low = (slopes(name, torch.tensor([middle])).abs() <= 0.01).item() == flat[i].item()
            low, high = (middle, high) if is_low else (low, middle)
        # Autograd's own rounding decides within a few units in the last place.
        z = torch.cat([z, torch.tensor([low - 1e-13, high + 1e-13], dtype=torch.float64)])
    for kind in (torch.float64, torch.float32, torch.bfloat16):
        values = z.to(kind)
        found = activation_stats(values[None], 1, name)[7].bool()
        assert torch.equal(found, slopes(name, values).abs() <= 0.01)


@pytest.mark.parametrize(
    ("name", "z", "flat"),
    [
        ("relu", 0.0, 1), ("relu", 1e-30, 0), ("relu6", 6.0, 1), ("relu6", 5.999, 0),
        ("hardtanh", -1.0, 1), ("hardtanh", 0.999, 0), ("leaky_relu", -5.0, 0),
        ("hardswish", -3.0, 1), ("hardswish", -1.5, 1), ("hardsigmoid", 3.0, 1),
        ("identity", 0.0, 0), ("gelu", -0.7518, 1), ("silu", -1.2785, 1), ("tanh", -3.0, 1),
    ],
)  # fmt: skip
def test_flat_at_kinks_and_minima(name, z, flat):
    assert activation_stats(torch.tensor([[z]]), 1, name)[7].item() == flat


def test_zeros_are_those_of_the_network():
    """GELU is exactly 0 far below 0 in float32 but not in float64; SiLU never is."""
    z = torch.full((1, 2), -7.0)
    assert activation_stats(z, 1, "gelu")[6].tolist() == [1, 1]
    assert not functional.gelu(z).any()
    assert activation_stats(z.double(), 1, "gelu")[6].tolist() == [0, 0]
    assert activation_stats(z, 1, "silu")[6].tolist() == [0, 0]


def test_leaky_relu_with_a_slope():
    stats = activation_stats(torch.tensor([[-2.0], [4.0]]), 1, "leaky_relu:0.25")
    assert stats[:, 0].tolist() == [2, 3.5, 4.5, 16.25, -0.5, 4, 0, 0, 0]


# Shapes: one element; awkward primes; more elements than one piece holds, with the units on the
# slow axis, on the fast one and in between; nothing at all; a scalar per unit.
LAYOUTS = {
    "one element": (noise(1, 1), 1),
    "vector": (noise(13), 0),
    "nchw": (noise(3, 37, 5, 7), 1),
    "channels_last": (noise(3, 37, 5, 7).contiguous(memory_format=torch.channels_last), 1),
    "btc": (noise(2, 17, 29), 2),
    "btc, negative axis": (noise(2, 17, 29), -1),
    "bhwc": (noise(2, 5, 7, 13), 3),
    "transposed view": (noise(37, 101).t(), 1),
    "permuted view": (noise(4, 5, 6, 7).permute(2, 0, 3, 1), 1),
    "strided view": (noise(4, 20, 9)[:, ::3, 1::2], 1),
    "expanded": (noise(1, 5, 1).expand(3, 5, 4), 1),
    "large, units slow": (noise(5, 90, 701).transpose(0, 1), 0),
    "large, units fast": (noise(1, 40000, 9), 2),
    "large, units between": (noise(2, 3, 60000), 1),
    "one sample larger than a piece": (noise(1, 3, 200000), 1),
}


@pytest.mark.parametrize(("x", "axis"), LAYOUTS.values(), ids=LAYOUTS.keys())
def test_layouts(x, axis):
    same(activation_stats(x, axis, "relu"), naive(x, axis, "relu"))
    flat = x.movedim(axis, 0).reshape(x.shape[axis], -1).double()
    expected = [
        torch.full((len(flat),), flat.shape[1]), flat.abs().sum(1), (flat**2).sum(1),
        torch.zeros(len(flat)),
    ]  # fmt: skip
    same(gradient_stats(x, axis), torch.stack([row.double() for row in expected]))


@pytest.mark.parametrize("threads", [1, 16])
def test_pieces_cover_everything_with_any_number_of_threads(monkeypatch, threads):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    x = noise(3, 90, 16001).transpose(0, 1)
    same(activation_stats(x, 0, "relu"), naive(x, 0, "relu"))
    sizes = [piece.numel() for _, (piece,) in pieces.pieces((x,), 0)]
    assert sum(sizes) == x.numel()
    assert max(sizes) <= (2**15 - 1 if threads == 1 else 16 * 2**17)
    assert len(sizes) > 1
    assert (max(sizes) >= 2**15) == (threads == 16)


@pytest.mark.parametrize("shape", [(0, 4), (3, 4, 0)])
def test_nothing_seen(shape):
    stats = activation_stats(torch.empty(shape), 1, "gelu")
    assert stats[:, 0].tolist() == [0, 0, 0, 0, math.inf, -math.inf, 0, 0, 0]
    assert stats.shape == (9, 4)
    assert gradient_stats(torch.empty(shape), 1).tolist() == [[0] * 4] * 4


def test_no_units():
    assert activation_stats(torch.empty(3, 0), 1).shape == (9, 0)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_nonfinite_is_counted_and_does_not_spread(name):
    """sigmoid(inf) is 1 and relu(-inf) is 0, but a position that far out is not a number seen."""
    z = noise(50, 4)
    z[3, 1], z[7, 1], z[9, 2] = math.nan, math.inf, -math.inf
    stats = activation_stats(z, 1, name)
    same(stats, naive(z, 1, name))
    assert stats[8].tolist() == [0, 2, 1, 0]
    assert stats[0].tolist() == [50, 48, 49, 50]
    assert stats.isfinite().all()


@pytest.mark.parametrize(
    ("name", "value"), [("relu", -math.inf), ("sigmoid", math.inf), ("hardtanh", -math.inf)]
)
def test_infinite_z_with_finite_h_is_counted(name, value):
    stats = activation_stats(torch.tensor([[value], [0.5]]), 1, name)
    assert stats[[0, 6, 7, 8], 0].tolist() == [1, 0, 0, 1]


def test_overflow_of_h_is_counted():
    assert activation_stats(torch.full((2, 1), 65504.0).half(), 1, "selu")[8].item() == 2


def test_nonfinite_only():
    stats = activation_stats(torch.full((2, 1), math.nan), 1, "relu")
    assert stats[:, 0].tolist() == [0, 0, 0, 0, math.inf, -math.inf, 0, 0, 2]


def test_a_device_that_must_not_wait_gives_the_same(monkeypatch):
    """Off the CPU nothing is looked up: values are masked always."""
    z = noise(30, 6)
    z[2, 3] = math.inf
    expected = [activation_stats(z, 1, "gelu"), gradient_stats(z, 1)]
    monkeypatch.setattr(pieces, "_all_finite", lambda x: False)
    same(activation_stats(z, 1, "gelu"), expected[0])
    same(gradient_stats(z, 1), expected[1])


def test_nonfinite_gradients():
    g = noise(20, 3)
    g[0, 0], g[1, 0], g[2, 2] = math.nan, -math.inf, math.inf
    stats = gradient_stats(g, 1)
    assert stats[0].tolist() == [18, 20, 19]
    assert stats[3].tolist() == [2, 0, 1]
    same(stats[1, 0], g[2:, 0].double().abs().sum())
    same(stats[2, 2], (g[:, 2].double() ** 2)[[i for i in range(20) if i != 2]].sum())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_are_float64(dtype):
    """A million times 0.1 in float32 is 958 off; here only the rounding of 0.1 itself is left."""
    x = torch.full((1_000_000, 1), 0.1, dtype=dtype)
    value = x[0, 0].double().item()
    assert gradient_stats(x, 1)[1].item() == pytest.approx(1e6 * value, rel=1e-12)


def along(w, dw, dim):
    """All sums of a weight and its gradient for each index of one dimension."""
    wide, dwide = (x.double().movedim(dim, 0).flatten(1) for x in (w, dw))
    count = torch.full((len(wide),), wide.shape[1]).double()
    return {
        "n": count, "sum_abs_w": wide.abs().sum(1), "sum_sq_w": (wide**2).sum(1),
        "n_dw": count, "sum_abs_dw": dwide.abs().sum(1), "sum_sq_dw": (dwide**2).sum(1),
        "sum_abs_w_dw": (wide * dwide).abs().sum(1), "sum_w_dw": (wide * dwide).sum(1),
        "n_nonfinite_dw": 0 * count,
    }  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parameters(dtype):
    w, dw = noise(7, 5, 3, dtype=dtype), noise(5, 7, 3, dtype=dtype, scale=0.1).transpose(0, 1)
    rows, columns = parameter_stats([w], [dw])
    for name, values in zip(PARAMETER_ROWS, rows, strict=True):
        same(values, along(w, dw, 0)[name])
    for name, values in zip(PARAMETER_COLUMNS, columns, strict=True):
        same(values, along(w, dw, 1)[name])
    alone = parameter_stats([w], [None])
    for with_dw, without in zip((rows, columns), alone, strict=True):
        same(without[:3], with_dw[:3])
        assert not without[3:].any()


def test_groups_of_parameters():
    w, dw = noise(6, 2, 3), noise(6, 2, 3, scale=0.1)
    rows, columns = parameter_stats([w, w], [dw, dw], [3, 1])
    assert rows.shape == (8, 12)
    assert columns.shape == (6, 8)
    same(rows[:, :6], rows[:, 6:])
    for group in range(3):
        part = slice(2 * group, 2 * group + 2)
        same(columns[:, part], parameter_stats([w[part]], [dw[part]])[1])
    same(columns[:, 6:], parameter_stats([w], [dw])[1])


def test_parameters_over_many_pieces():
    w, dw = noise(300, 1000), noise(1000, 300, scale=0.01).t()
    _, columns = parameter_stats([w], [dw])
    same(columns[4], (w.double() * dw.double()).sum(0))
    same(columns[1], w.double().abs().sum(0))


def test_nonfinite_weight_gradients():
    w, dw = torch.ones(2, 3), torch.ones(2, 3)
    dw[0, 0], dw[0, 1] = math.nan, math.inf
    rows, columns = parameter_stats([w], [dw])
    assert rows.tolist() == [[3, 3], [3, 3], [3, 3], [1, 3], [1, 3], [1, 3], [1, 3], [2, 0]]
    assert columns[3:].tolist() == [[1, 1, 2], [1, 1, 2], [1, 1, 0]]


def test_adding_to_tables():
    z, w = noise(9, 5), noise(4, 3)
    table = torch.zeros(9, 10, dtype=torch.float64)[:, 2:7]
    table[4:6] = torch.tensor([[1.0], [2.0]])
    found = activation_stats(z, out=table)
    assert found is table
    same(table[:4], activation_stats(z)[:4])
    same(table[4], z.amin(0).double().clamp(max=1))
    same(table[5], z.amax(0).double().clamp(min=2))
    once = gradient_stats(z)
    same(gradient_stats(z, out=once.clone()), 2 * once)
    once = parameter_stats([w], [w])
    twice = parameter_stats([w], [w], out=(once[0].clone(), once[1].clone()))
    for one, two in zip(once, twice, strict=True):
        same(two, 2 * one)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: activation_stats(torch.ones(2, 2), 1, "rely"), "activation is 'rely', expected"),
        (lambda: activation_stats(torch.ones(2, 2), 1, "relu:3"), "activation is 'relu:3', expe"),
        (lambda: activation_stats(torch.ones(2, 2), 1, "leaky_relu:x"), "or leaky_relu:SLOPE"),
        (lambda: activation_stats(torch.ones(2, 2), 2), r"axis is 2, expected .* \(2, 2\)"),
        (lambda: gradient_stats(torch.ones(2, 2), -3), "axis is -3, expected"),
        (lambda: gradient_stats(torch.ones(2, 2, dtype=torch.int64)), "is torch.int64, expected"),
        (
            lambda: parameter_stats([torch.ones(2, 2)], [torch.ones(2, 3)]),
            r"gradient has shape \(2, 3\), expected that of the weight, \(2, 2\)",
        ),
        (lambda: parameter_stats([torch.ones(2, 2)], []), "1 weights, 0 gradients and 1 groups"),
        (lambda: parameter_stats([torch.ones(3, 2)], [None], [2]), r"\(3, 2\) and 2 groups, expec"),
        (lambda: parameter_stats([torch.ones(3)], [None]), r"shape \(3,\) and 1 groups, expected"),
        (
            lambda: activation_stats(torch.ones(2, 2), out=torch.zeros(9, 2)),
            r"out is torch.float32 \(9, 2\) .* expected float64 \(9, 2\)",
        ),
        (
            lambda: gradient_stats(torch.ones(2, 2), out=torch.zeros(2, 4).double().t()),
            r"with strides \(1, 4\), expected float64 \(4, 2\) with adjacent columns",
        ),
    ],
)
def test_errors(call, text):
    with pytest.raises(ValueError, match=text):
        call()


def test_inputs_are_untouched():
    z = noise(4, 5).requires_grad_()
    before = z.detach().clone()
    for name in ACTIVATIONS:
        assert not activation_stats(z, 1, name).requires_grad
    assert torch.equal(z, before)


def test_backend():
    assert backend("cpu") == backend(torch.device("cpu")) == "numba"
    assert backend("meta") == backend("mps") == "pytorch"
    assert backend("cuda") == ("triton" if find_spec("triton") else "pytorch")


def test_public_names():
    assert set(kernels.__all__) == {
        "ACTIVATIONS", "ACTIVATION_ROWS", "DTYPES", "GRADIENT_ROWS", "Law", "PARAMETER_COLUMNS",
        "PARAMETER_ROWS", "SCORES", "Selection", "activate", "activation_stats", "backend",
        "foreach_activation_stats", "foreach_gradient_stats", "gradient_stats", "parameter_stats",
        "WeightShard", "resample_", "select", "selection_masks", "tell_of_compiling", "untraced",
    }  # fmt: skip
