"""The Triton statistics against the float64 reference, in the interpreter where there is no GPU."""

import math

import numpy as np
import pytest
import torch
from helpers import REFERENCE as reference
from helpers.triton_stats import (
    COUNTS,
    DEVICE,
    DTYPES,
    WARNINGS,
    activation,
    check_activation,
    check_gradient,
    gradient,
    noise,
    numpy_does_not_warn,
    parameter,
    poisoned,
)

from fastplastic.kernels import ACTIVATIONS
from fastplastic.kernels.gpu import launch, unit_tables

__all__ = ["numpy_does_not_warn", "poisoned"]
pytestmark = WARNINGS


# Shapes: one element; awkward primes; whole tiles; nothing at all; each layout that is read in
# another way: planes (padded or wide rows), channels_last, tokens, transposed, a crop (two outer
# dimensions), one that must be copied (four dimensions of positions), expanded, a step in units.
LAYOUTS = {
    "one element": (noise(1, 1), 1),
    "primes": (noise(37, 101), 1),
    "whole tiles": (noise(128, 256), 1),
    "no position": (noise(0, 64), 1),
    "no unit": (noise(3, 0), 1),
    "vector": (noise(13), 0),
    "planes": (noise(3, 11, 5, 7), 1),
    "wide planes": (noise(2, 5, 16, 32), 1),
    "channels_last": (noise(3, 37, 5, 7).contiguous(memory_format=torch.channels_last), 1),
    "tokens": (noise(2, 17, 29), -1),
    "transposed view": (noise(37, 101).t(), 1),
    "crop": (noise(2, 5, 9, 9)[:, :, 1:-1, 1:-1], 1),
    "crop of channels_last": (noise(2, 9, 9, 8)[:, 1:-1, 1:-1], 3),
    "step": (noise(4, 20, 9)[:, ::3, 1::2], 1),
    "copied": (noise(2, 2, 3, 4, 4, 6)[:, :, :, 1:, 1:, ::2], 2),
    "expanded positions": (noise(4, 5, 1, 1).expand(4, 5, 7, 7), 1),
    "expanded units": (noise(4, 1, 6).expand(4, 5, 6), 1),
    "units slow": (noise(5, 300), 0),
    "unaligned": (noise(8 * 64 + 1)[1:].view(8, 64), 1),
}


@pytest.mark.parametrize(("x", "axis"), LAYOUTS.values(), ids=LAYOUTS.keys())
def test_layouts(x, axis):
    check_activation(x, axis, "silu")
    check_gradient(x, axis)


@pytest.mark.parametrize("name", [*ACTIVATIONS, "leaky_relu:0.25"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activations(name, dtype):
    z = noise(37, 21, dtype=dtype)
    z[0, 0], z[1, 1] = 0.0, -0.0
    check_activation(z, 1, name)


# Each way to read wide rows, with a tile that is not full: tokens, planes, planes read by halves.
WIDE = {
    "tokens": ((19, 24), torch.float32),
    "planes": ((2, 5, 40), torch.float32),
    "half planes": ((2, 5, 84), torch.bfloat16),
}


WAYS = [("tokens", name) for name in ACTIVATIONS]
WAYS += [(way, name) for way in ("planes", "half planes") for name in ("relu", "gelu", "silu")]


@pytest.mark.parametrize(("way", "name"), WAYS)
def test_what_is_beside_a_tensor_does_not_count(way, name):
    """Far from 0, where a 0 or a NaN would be the smallest or largest number."""
    paths = (unit_tables.ADJACENT, unit_tables.PLANES, unit_tables.HALF_PLANES)
    shape, dtype = WIDE[way]
    z = noise(*shape, dtype=dtype).abs().clamp(max=4) + 0.5
    form = unit_tables.Form(tuple(z.shape), z.stride(), 1, dtype, True, name, False)
    assert unit_tables._share(form).path in paths
    check_activation(z, 1, name)
    check_activation(-z, 1, name)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("way", "name"), WAYS)
def test_wide_rows_are_read_again_where_one_is_not_finite(way, name, value):
    shape, dtype = WIDE[way]
    z = noise(*shape, dtype=dtype)
    z[1, 3] = value
    assert activation.activation_stats(z, 1, name)[8, 3] == z[1, 3].numel()


@pytest.mark.parametrize("name", [name for name, f in ACTIVATIONS.items() if f.flat])
def test_flat_is_decided_exactly(name):
    """At the float32 numbers on both sides of every end, where one step changes the answer."""
    ends = [end for interval in ACTIVATIONS[name].flat for end in interval if math.isfinite(end)]
    values = np.array(ends, dtype=np.float32)
    near_ends = [values, *(np.nextafter(values, np.float32(to)) for to in (-9e9, 9e9))]
    z = torch.from_numpy(np.concatenate(near_ends))[None].to(DEVICE)
    found = activation.activation_stats(z, 1, name)[7]
    assert torch.equal(found, reference.activation_stats(z, 1, name)[7])
    assert 0 < found.sum() < z.numel()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_nonfinite_is_counted_and_does_not_spread(name):
    z = noise(50, 4)
    z[3, 1], z[7, 1], z[9, 2] = math.nan, math.inf, -math.inf
    found = check_activation(z, 1, name)
    assert found[8].tolist() == [0, 2, 1, 0]
    assert found.isfinite().all()


def test_nonfinite_only():
    z = torch.full((2, 1), math.nan, device=DEVICE)
    stats = activation.activation_stats(z, 1, "relu")
    assert stats[:, 0].tolist() == [0, 0, 0, 0, math.inf, -math.inf, 0, 0, 2]
    assert gradient.gradient_stats(z)[:, 0].tolist() == [0, 0, 0, 2]


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_overflow_of_h_in_half_precision_is_counted(dtype):
    z = torch.full((2, 1), torch.finfo(dtype).max, device=DEVICE, dtype=dtype)
    assert activation.activation_stats(z, 1, "selu")[8].item() == 2
    assert activation.activation_stats(z, 1, "gelu")[8].item() == 0


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_extreme_values(name):
    """Far out, squares and inner products overflow; next to 0, h must not vanish."""
    huge = torch.tensor([[-1e30, 1e30, -200.0, 200.0, -89.0, -1e4]], device=DEVICE)
    found = activation.activation_stats(huge, 1, name)
    expected = reference.activation_stats(huge, 1, name)
    assert torch.equal(found[COUNTS], expected[COUNTS])
    torch.testing.assert_close(found[[1, 4, 5]], expected[[1, 4, 5]], rtol=1e-5, atol=1e-30)
    small = torch.tensor([[1e-30, -1e-30, 1e-10, -1e-10, 1e-4, -1e-4]], device=DEVICE)
    found = activation.activation_stats(small, 1, name)
    expected = reference.activation_stats(small, 1, name)
    assert torch.equal(found[COUNTS], expected[COUNTS])
    torch.testing.assert_close(found[[1, 2, 4]], expected[[1, 2, 4]], rtol=1e-5, atol=0)


def test_squares_beyond_float32_are_infinite_for_that_unit_alone():
    x = torch.tensor([[1e30, 1.0], [1.0, 2.0]], device=DEVICE)
    assert gradient.gradient_stats(x)[2].tolist() == [math.inf, 5]
    assert activation.activation_stats(x)[3].tolist() == [math.inf, 5]


def test_denormals_are_not_zero():
    x = torch.tensor([[1e-40, -1e-42, 0.0, -0.0]], device=DEVICE)
    assert activation.activation_stats(x)[6].tolist() == [0, 0, 1, 1]
    assert gradient.gradient_stats(x)[1].tolist() == x[0].double().abs().tolist()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients(dtype):
    g = noise(37, 21, dtype=dtype, scale=1e-3)
    g[0, 0], g[1, 0], g[2, 2] = math.nan, -math.inf, math.inf
    assert check_gradient(g)[3].sum() == 3


def test_many_splits_are_folded():
    """A column that all programs share, more partial sums than the fold reads at once."""
    x = noise(40_001, 1)
    assert 40_001 // 32 // launch.unit_depth(40_001 // 32) > launch.FOLD_PARTS
    check_gradient(x)
    check_activation(x, 1, "relu")


def test_counters_hold_the_longest_program(monkeypatch):
    monkeypatch.setattr(launch, "_LEAST_DEPTH", 128)
    x = torch.zeros(255 * 32, 1, device=DEVICE)
    assert activation.activation_stats(x, 1, "relu")[COUNTS, 0].tolist() == [*[len(x)] * 3, 0]


def test_out_is_added_to_and_may_be_a_part_of_a_table():
    z = noise(9, 5)
    table = torch.full((9, 12), -7.0, dtype=torch.float64, device=DEVICE)
    out = table[:, 3:8]
    out.zero_()
    out[4], out[5] = math.inf, -math.inf
    for _ in range(2):
        assert activation.activation_stats(z, 1, "relu", out=out) is out
    once = activation.activation_stats(z, 1, "relu")
    assert torch.equal(out[[0, 1, 6, 7]], 2 * once[[0, 1, 6, 7]])
    assert torch.equal(out[4:6], once[4:6])
    assert (table[:, :3] == -7).all() and (table[:, 8:] == -7).all()
    wide = torch.zeros(4, 12, dtype=torch.float64, device=DEVICE)[:, 3:8]
    gradient.gradient_stats(z, out=gradient.gradient_stats(z, out=wide))
    assert torch.equal(wide, 2 * gradient.gradient_stats(z))


def test_same_input_same_bits():
    z = noise(3, 11, 5, 7)
    twice = [activation.activation_stats(z, 1, "gelu") for _ in range(2)]
    assert torch.equal(*twice)
    w, dw = noise(37, 101), noise(37, 101, scale=0.1)
    first, second = (parameter.parameter_stats([w], [dw]) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def test_float64_goes_to_the_reference():
    z = noise(5, 4).double()
    assert torch.equal(activation.activation_stats(z), reference.activation_stats(z))
    assert torch.equal(gradient.gradient_stats(z), reference.gradient_stats(z))
    found, expected = (m.parameter_stats([z], [z]) for m in (parameter, reference))
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda x: activation.activation_stats(x, 1, "rely"), "activation is 'rely', expected"),
        (lambda x: activation.activation_stats(x, 2), r"axis is 2, expected .* \(2, 2\)"),
        (lambda x: gradient.gradient_stats(x.long()), "is torch.int64, expected"),
        (lambda x: gradient.gradient_stats(x, out=x), "out is torch.float32"),
        (lambda x: parameter.parameter_stats([x], []), "there are 1 weights, 0 gradients"),
    ],
)
def test_errors(call, text):
    with pytest.raises(ValueError, match=text):
        call(torch.ones(2, 2, device=DEVICE))
