"""The Triton statistics against the float64 reference, in the interpreter where there is no GPU."""

import importlib
import math

import numpy as np
import pytest
import torch
from helpers import REFERENCE as reference

from fastplastic.kernels import ACTIVATIONS, activate
from fastplastic.kernels.gpu import launch, unit_tables
from fastplastic.kernels.gpu import runtime as _triton_runtime

# NumPy says so of the interpreter of Triton 3.6.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ZERO_ENDS = [f.zero_below for f in ACTIVATIONS.values() if f.zero_below is not None]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# What the error may be above that of plain torch in the same dtype, relative to max(1, |value|).
# Half precision: an h that lies between two numbers may be rounded to the other one.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
COUNTS = [0, 6, 7, 8]


activation = importlib.import_module("fastplastic.kernels.gpu.activation_stats")
gradient = importlib.import_module("fastplastic.kernels.gpu.gradient_stats")
parameter = importlib.import_module("fastplastic.kernels.gpu.parameter_stats")
unit_launch = importlib.import_module("fastplastic.kernels.gpu.unit_launch")


@pytest.fixture(autouse=True)
def numpy_does_not_warn():
    """The interpreter computes with numpy, which warns of infinities where a GPU does not."""
    with np.errstate(all="ignore"):
        yield


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Fill scratch memory with NaN: an element that is read but was not written shows."""

    def scratch(*arguments):
        return _triton_runtime.scratch(*arguments).fill_(math.nan)

    for module in (unit_launch, parameter):
        monkeypatch.setattr(module, "scratch", scratch)


def noise(*shape, dtype=torch.float32, scale=3.0):
    generator = torch.Generator().manual_seed(sum(shape))
    z = torch.randn(*shape, generator=generator) * scale
    # Where GELU becomes 0, torch itself is not monotone.
    for end in ZERO_ENDS:
        z[(z - end).abs() < 0.1] = 0.5
    return z.to(device=DEVICE, dtype=dtype)


def near(found, expected, plain, dtype):
    """|found - float64| <= |plain torch in that dtype - float64| + a constant of the dtype."""
    limit = (plain.double() - expected).abs().nan_to_num(math.inf, math.inf)
    limit += TOLERANCE[dtype] * expected.abs().nan_to_num(0, 0, 0).clamp(min=1)
    same = (found == expected) | ((found - expected).abs() <= limit)
    assert same.all(), (found[~same], expected[~same], limit[~same])


def flat_units(x, axis):
    return x.movedim(axis, 0).flatten(1) if x.ndim > 1 else x[:, None]


def plain_sums(h, finite):
    """The three sums as torch itself makes them in the dtype of h."""
    h = h.where(finite, 0)
    return torch.stack([h.sum(1), h.abs().sum(1), (h * h).sum(1)])


def check_activation(z, axis=1, name="identity"):
    expected = reference.activation_stats(z, axis, name)
    found = activation.activation_stats(z, axis, name)
    assert found.dtype == torch.float64 and found.device == z.device
    assert torch.equal(found[COUNTS], expected[COUNTS])
    units = flat_units(z, axis)
    h = activate(units, name)
    plain = plain_sums(h, h.isfinite() & units.isfinite())
    near(found[1:4], expected[1:4], plain, z.dtype)
    near(found[4:6], expected[4:6], expected[4:6], z.dtype)
    # The network rounds h, so its extremes are numbers of the dtype.
    assert torch.equal(found[4:6], found[4:6].to(z.dtype).double())
    return found


def check_gradient(g, axis=1):
    expected, found = reference.gradient_stats(g, axis), gradient.gradient_stats(g, axis)
    assert torch.equal(found[[0, 3]], expected[[0, 3]])
    units = flat_units(g, axis)
    near(found[1:3], expected[1:3], plain_sums(units, units.isfinite())[1:], torch.float32)
    return found


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


def test_many_tensors_at_once():
    """Those of one call, of several dtypes and functions, some twice and some with nothing."""
    given = [
        (noise(3, 11, 5, 7), 1, "relu"), (noise(2, 17, 32), -1, "gelu"), (noise(0, 4), 1, "relu"),
        (noise(19, 24, dtype=torch.bfloat16), 1, "relu"), (noise(6, 5).double(), 1, "tanh"),
        (noise(2, 2, 3, 4, 4, 6)[:, :, :, 1:, 1:, ::2], 2, "relu"), (noise(8, 3), 0, "identity"),
    ]  # fmt: skip
    given.append(given[0])
    xs, axes, names = zip(*given, strict=True)
    sizes = [x.shape[axis] for x, axis in zip(xs, axes, strict=True)]
    columns = [2 + sum(sizes[:i]) for i in range(len(sizes))]
    out = torch.zeros(9, 3 + sum(sizes), dtype=torch.float64, device=DEVICE)
    out[4], out[5] = math.inf, -math.inf
    sums = torch.zeros(4, 3 + sum(sizes), dtype=torch.float64, device=DEVICE)
    for _ in range(2):
        activation.foreach_activation_stats(xs, axes, names, columns, out=out)
        gradient.foreach_gradient_stats(xs, axes, columns, out=sums)
    assert not sums[:, :2].any() and not sums[:, -1:].any() and not out[0, -1:].any()
    added = [0, 1, 2, 3, 6, 7, 8]
    for (x, axis, name), column, size in zip(given, columns, sizes, strict=True):
        part, once = out[:, column : column + size], activation.activation_stats(x, axis, name)
        torch.testing.assert_close(part[added], 2 * once[added], rtol=1e-6, atol=1e-6)
        assert torch.equal(part[4:6], once[4:6])
        once = gradient.gradient_stats(x, axis)
        torch.testing.assert_close(sums[:, column : column + size], 2 * once, rtol=1e-6, atol=1e-6)


# Tokens: read wide or not, some that lie in another order or are planes, one unit, float64, one
# that is longer than a tile; where no token counts, and where one of a tile does.
TOKENS = {
    "wide": noise(2, 19, 32),
    "narrow": noise(2, 19, 5),
    "half": noise(3, 50, 64, dtype=torch.bfloat16),
    "by token": noise(19, 2, 32).transpose(0, 1),
    "planes": noise(2, 32, 19).transpose(1, 2),
    "one unit": noise(2, 19, 1),
    "float64": noise(2, 19, 8).double(),
    "long": noise(3, 400, 8),
}


@pytest.mark.parametrize(
    ("kind", "name"),
    [(kind, "gelu") for kind in TOKENS]
    + [(kind, name) for kind in ("wide", "narrow") for name in ("relu", "tanh")],
)
def test_positions_that_do_not_count(kind, name):
    x = TOKENS[kind]
    batch, tokens, units = x.shape
    generator = torch.Generator().manual_seed(5)
    masks = [torch.rand(batch, tokens, generator=generator) > 0.4 for _ in range(3)]
    masks[1][:], masks[2][:, 1:] = False, False
    # What is not read may be anything.
    given = [x.where(m[..., None].to(DEVICE), math.nan) for m in masks]
    given = [torch.empty_like(x).copy_(z) for z in given]
    for xs, bys in [*zip(zip(given), zip(masks), strict=True), (given, masks)]:
        bys = [by.flatten().to(DEVICE) for by in bys]
        columns = [units * i for i in range(len(xs))]
        out, sums = (
            torch.zeros(rows, units * len(xs), dtype=torch.float64, device=DEVICE)
            for rows in (9, 4)
        )
        out[4], out[5] = math.inf, -math.inf
        axes = [-1] * len(xs)
        activation.foreach_activation_stats(xs, axes, [name] * len(xs), columns, out=out, masks=bys)
        gradient.foreach_gradient_stats(xs, axes, columns, out=sums, masks=bys)
        for z, by, column in zip(xs, bys, columns, strict=True):
            left = z.reshape(-1, units)[by]
            found = out[:, column : column + units], sums[:, column : column + units]
            # Sums are of h before it is rounded, its extremes are of h as it is rounded.
            exact = left if kind == "float64" else left.float()
            expected = reference.activation_stats(exact, 1, name)
            tolerance = {"rtol": 1e-5, "atol": 1e-4}
            torch.testing.assert_close(found[0][:4], expected[:4], **tolerance)
            rounding = TOLERANCE.get(z.dtype, 1e-6)
            torch.testing.assert_close(found[0][4:6], expected[4:6], rtol=rounding, atol=1e-6)
            assert torch.equal(found[0][6:], expected[6:])
            torch.testing.assert_close(found[1], reference.gradient_stats(left, 1), **tolerance)


@pytest.mark.parametrize(
    ("axes", "columns", "masks", "text"),
    [
        ([1], [0, 2], None, "2 tensors, 1 axes, 2 columns and 2 masks, expected as many"),
        ([1, 1], [0, 2], [None], "2 columns and 1 masks, expected as many"),
        ([1, 1], [0, 3], None, "2 units go to column 3 of 4, expected columns that there are"),
        ([1, 2], [0, 2], None, "axis is 2, expected a dimension"),
        (
            [1, 1],
            [0, 2],
            [None, torch.ones(2)],
            "a mask is torch.float32 .*, expected torch.bool",
        ),
        ([1, 1], [0, 2], [None, torch.ones(3).bool()], "expected torch.bool with 2 positions"),
    ],
)
def test_errors_of_many_tensors(axes, columns, masks, text):
    xs = [torch.ones(2, 2, device=DEVICE)] * 2
    out = torch.zeros(4, 4).double()
    with pytest.raises(ValueError, match=text):
        gradient.foreach_gradient_stats(xs, axes, columns, out=out, masks=masks)


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
