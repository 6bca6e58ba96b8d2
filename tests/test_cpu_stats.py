"""The Numba statistics against the float64 reference."""

import math
import threading

import pytest
import torch
from helpers import NUMBA as cpu
from helpers import REFERENCE as reference

from fastplastic import kernels
from fastplastic.kernels import ACTIVATIONS
from fastplastic.kernels.cpu import tasks as _cpu_tasks

ZERO_ENDS = [f.zero_below for f in ACTIVATIONS.values() if f.zero_below is not None]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# What the error may be above that of plain torch in the same dtype, relative to max(1, |value|).
# Half precision: torch rounds every h, the kernel does not.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
COUNTS = [0, 6, 7, 8]


def noise(*shape, dtype=torch.float32, scale=3.0):
    generator = torch.Generator().manual_seed(sum(shape))
    z = torch.randn(*shape, generator=generator) * scale
    # Where GELU becomes 0, torch itself is not monotone.
    for end in ZERO_ENDS:
        z[(z - end).abs() < 0.1] = 0.5
    return z.to(dtype)


def near(found, expected, plain, dtype):
    """|found - float64| <= |plain torch in that dtype - float64| + a constant of the dtype."""
    limit = (plain.double() - expected).abs().nan_to_num(math.inf, math.inf)
    limit += TOLERANCE[dtype] * expected.abs().nan_to_num(0, 0, 0).clamp(min=1)
    same = (found == expected) | ((found - expected).abs() <= limit)
    same |= found.isnan() & expected.isnan()
    assert same.all(), (found[~same], expected[~same], limit[~same])


def units_of(x, axis):
    return x.movedim(axis, 0).flatten(1) if x.ndim > 1 else x[:, None]


def check_activation(z, axis=1, name="identity"):
    expected = reference.activation_stats(z, axis, name)
    found = cpu.activation_stats(z, axis, name)
    assert found.dtype == torch.float64
    assert torch.equal(found[COUNTS], expected[COUNTS])
    units = units_of(z, axis)
    h = kernels.activate(units, name)
    h = h.where(h.isfinite() & units.isfinite(), 0)
    plain = torch.stack([h.sum(1), h.abs().sum(1), (h * h).sum(1)])
    # Sums cancel; what each h may differ by does not.
    scale = expected[2].clamp(min=1)
    near(found[1:3] / scale, expected[1:3] / scale, plain[:2] / scale, z.dtype)
    near(found[3], expected[3], plain[2], z.dtype)
    near(found[4:6], expected[4:6], expected[4:6], z.dtype)
    # The network rounds h, so its extremes are numbers of the dtype.
    assert torch.equal(found[4:6], found[4:6].to(z.dtype).double())
    return found


def check_gradient(g, axis=1):
    expected, found = reference.gradient_stats(g, axis), cpu.gradient_stats(g, axis)
    assert torch.equal(found[[0, 3]], expected[[0, 3]])
    units = units_of(g, axis)
    units = units.where(units.isfinite(), 0)
    plain = torch.stack([units.abs().sum(1), (units * units).sum(1)])
    near(found[1:3], expected[1:3], plain, torch.float32)
    return found


# Shapes: one element; awkward primes; nothing at all; each way of reading: rows of lanes in one and
# several tiles and chunks, joined rows with a rest, long runs with a tail; each layout: planes,
# channels_last, tokens, transposed, some channels of a tensor, a crop and an expanded tensor (both
# copied in pieces), units that are not adjacent.
LAYOUTS = {
    "one element": (noise(1, 1), 1),
    "primes": (noise(37, 101), 1),
    "no position": (noise(0, 64), 1),
    "no unit": (noise(3, 0), 1),
    "vector": (noise(13), 0),
    "many rows": (noise(3001, 5), 1),
    "joined rows": (noise(2500, 3, 17), 1),
    "chunks of rows": (noise(1200, 1100), 1),
    "tiles": (noise(9, 5000), 1),
    "planes in tiles": (noise(9, 300, 7, 7), 1),
    "more rows than are summed in float32": (noise(2100, 1), 1),
    "runs": (noise(3, 5, 24, 24), 1),
    "runs with a tail": (noise(2, 3, 1, 4217), 1),
    "long run": (noise(1, 1, 70000), 1),
    "many runs": (noise(1100, 2, 520), 1),
    "channels_last": (noise(3, 37, 5, 7).contiguous(memory_format=torch.channels_last), 1),
    "tokens": (noise(2, 17, 29), -1),
    "transposed view": (noise(37, 101).t(), 1),
    "some channels": (noise(5, 19, 40)[:, :, 3:21], 2),
    "some planes": (noise(5, 19, 4, 4)[:, 3:12], 1),
    "crop": (noise(2, 5, 9, 9)[:, :, 1:-1, 1:-1], 1),
    "step": (noise(4, 20, 9)[:, ::3], 1),
    "step of long runs": (noise(4, 6, 600)[:, ::3], 1),
    "step of tokens": (noise(4, 20, 9)[:, :, ::2], 2),
    "expanded positions": (noise(4, 5, 1, 1).expand(4, 5, 7, 7), 1),
    "expanded units": (noise(4, 1, 6).expand(4, 5, 6), 1),
    "units slow": (noise(5, 300), 0),
    "unaligned": (noise(8 * 64 + 1)[1:].view(8, 64), 1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(layout, dtype):
    x, axis = LAYOUTS[layout]
    x = x.to(dtype)
    check_activation(x, axis, "relu")
    check_gradient(x, axis)


@pytest.mark.parametrize("name", [*ACTIVATIONS, "leaky_relu:0.2"])
def test_activations(name):
    """With all kinds of zeros and, in some units, NaN and infinities."""
    z = noise(20, 12)
    z[0, :4] = torch.tensor([0.0, -0.0, 1e-40, -1e-40])
    z[3, 5], z[4, 6], z[5, 7], z[6, 7] = math.nan, math.inf, -math.inf, math.nan
    z[:, 8] = -math.inf
    check_activation(z, 1, name)


# With and without a sign, flat where zero or elsewhere, in one or two intervals, h as z or not.
@pytest.mark.parametrize(
    "name",
    ["relu", "relu6", "gelu", "silu", "selu", "sigmoid", "tanh", "hardswish", "leaky_relu:0.2"],
)
def test_activations_in_long_runs(name):
    long = noise(2, 3, 600)
    long[0, 0, 0], long[1, 1, 599], long[0, 2] = math.inf, -math.inf, math.nan
    check_activation(long, 1, name)


@pytest.mark.parametrize("name", ["gelu", "leaky_relu"])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_half_precision_functions(name, dtype):
    z = noise(300, 7, dtype=dtype)
    z[0, 0], z[1, 1], z[2, 2] = math.nan, math.inf, -math.inf
    # Smallest and largest numbers; what leaky ReLU makes of them in float16 is rounded to 0.
    z[3, :4] = torch.tensor([6e-8, -6e-8, 6e4, -6e4], dtype=dtype)
    check_activation(z, 1, name)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_overflow_of_h_in_half_precision_is_counted(dtype):
    """SELU goes beyond the largest number of the dtype; in rows of lanes and in long runs."""
    z = torch.full((2, 300), torch.finfo(dtype).max, dtype=dtype)
    for x, axis in ((z, 1), (z[:, None], 1)):
        assert cpu.activation_stats(x, axis, "selu")[8].sum() == 600
        assert cpu.activation_stats(x, axis, "gelu")[8].sum() == 0


@pytest.mark.parametrize("name", [name for name, f in ACTIVATIONS.items() if f.flat])
def test_flat_is_decided_exactly(name):
    """At the float32 numbers on both sides of every end of an interval."""
    ends = [end for ends in ACTIVATIONS[name].flat for end in ends if math.isfinite(end)]
    z = torch.tensor(ends, dtype=torch.float32)
    z = torch.cat([z, z.nextafter(torch.tensor(9.0)), z.nextafter(torch.tensor(-9.0))])[None]
    assert torch.equal(
        cpu.activation_stats(z, 1, name)[7], reference.activation_stats(z, 1, name)[7]
    )


@pytest.mark.parametrize("name", ["identity", "relu", "selu"])
def test_extreme_values(name):
    """Squares, and selu itself, overflow in float32; squares underflow."""
    z = noise(9, 4)
    z[2, 0], z[3, 1], z[4, 2] = 3e38, -1e30, 1e25
    z[:, 3] = 1e-20
    found = check_activation(z, 1, name)
    assert found[3, 2] > 1e49


def test_nan_stays_in_its_unit():
    g = noise(3000, 6)
    clean = cpu.gradient_stats(g)
    g[17, 2] = math.nan
    found = check_gradient(g)
    others = [0, 1, 3, 4, 5]
    assert torch.equal(found[:, others], clean[:, others])
    assert found[3].tolist() == [0, 0, 1, 0, 0, 0]


@pytest.mark.parametrize("kind", ["activation", "gradient"])
def test_adding_to_a_table(kind):
    function = getattr(cpu, f"{kind}_stats")
    x = noise(50, 6)
    fresh = function(x)
    big = torch.full((fresh.shape[0], 20), math.nan, dtype=torch.float64)
    table = big[:, 3:9]
    table.copy_(fresh)
    assert function(x, out=table) is table
    expected = 2 * fresh
    expected[4:6] = fresh[4:6] if kind == "activation" else expected[4:6]
    assert torch.equal(table, expected)
    assert big[:, :3].isnan().all() and big[:, 9:].isnan().all()


def test_same_bits_with_any_number_of_threads():
    z, w = noise(8, 64, 28, 28), noise(1300, 90)
    before = torch.get_num_threads()
    tables = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            tables.append([cpu.activation_stats(z, 1, "gelu"), *cpu.parameter_stats([w], [w])])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(*pair) for pair in zip(*tables, strict=True))


def test_threads_of_the_caller():
    """Hooks run on threads of autograd: many at once give what one gives."""
    z = noise(64, 40)
    expected = cpu.activation_stats(z, 1, "relu")
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(cpu.activation_stats(z, 1, "relu")))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert all(torch.equal(table, expected) for table in found)


class SumsInAWorker(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return cpu.activation_stats(noise(700, 40) + index, 1, "relu")


def test_workers_of_a_data_loader():
    """They are forked while the threads of this process wait for work."""
    expected = [SumsInAWorker()[index] for index in range(4)]
    loader = torch.utils.data.DataLoader(SumsInAWorker(), batch_size=None, num_workers=2)
    for found, table in zip(loader, expected, strict=True):
        assert torch.equal(found, table)


def test_inside_a_compiled_function():
    torch._dynamo.reset()
    z = noise(50, 6)
    compiled = torch.compile(lambda x: kernels.activation_stats(x * 2, 1, "relu"), backend="eager")
    assert torch.equal(compiled(z), cpu.activation_stats(z * 2, 1, "relu"))


def test_threads_of_our_own_where_torch_has_none(monkeypatch):
    z, w = noise(16, 40, 30, 30), noise(900, 70)
    expected = [cpu.activation_stats(z, 1, "gelu"), *cpu.parameter_stats([w], [w])]
    monkeypatch.setattr(_cpu_tasks, "_torch_parallel", lambda: None)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        found = [cpu.activation_stats(z, 1, "gelu"), *cpu.parameter_stats([w], [w])]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_float64_is_summed_by_the_reference():
    z = noise(20, 5, dtype=torch.float64)
    assert torch.equal(cpu.activation_stats(z, 1, "silu"), reference.activation_stats(z, 1, "silu"))
    assert torch.equal(cpu.gradient_stats(z), reference.gradient_stats(z))


def test_inputs_are_untouched():
    z = noise(30, 7).requires_grad_()
    before = z.detach().clone()
    assert not cpu.activation_stats(z).requires_grad
    assert not cpu.gradient_stats(z).requires_grad
    assert torch.equal(z, before)


def test_errors_are_those_of_the_reference():
    for call in (
        lambda twin: twin.activation_stats(torch.ones(2, 2), 1, "rely"),
        lambda twin: twin.activation_stats(torch.ones(2, 2), 5),
        lambda twin: twin.gradient_stats(torch.ones(2, 2, dtype=torch.int32)),
        lambda twin: twin.gradient_stats(torch.ones(2, 2), out=torch.zeros(4, 3).double()),
        lambda twin: twin.parameter_stats([torch.ones(2, 2)], [torch.ones(2, 3)]),
    ):
        with pytest.raises(ValueError) as expected:
            call(reference)
        with pytest.raises(ValueError) as found:
            call(cpu)
        assert str(found.value) == str(expected.value)


# Weights: a matrix, one row, one column, more rows than a segment; each layout of convolutions;
# transposed views; groups, with one row each too; strides that must be copied; half precision.
WEIGHTS = {
    "matrix": (noise(37, 101), 1),
    "one element": (noise(1, 1), 1),
    "empty": (noise(0, 64), 1),
    "one column": (noise(50, 1), 1),
    "one row": (noise(1, 50), 1),
    "segments": (noise(1100, 40), 1),
    "tiles": (noise(5, 5000), 1),
    "convolution": (noise(33, 17, 3, 3), 1),
    "convolution in tiles": (noise(7, 400, 3, 3), 1),
    "channels_last": (noise(33, 17, 3, 3).contiguous(memory_format=torch.channels_last), 1),
    "transposed": (noise(41, 23).t(), 1),
    "transposed convolution": (noise(41, 23, 2, 2).transpose(0, 1), 1),
    "groups": (noise(24, 5, 3, 3), 4),
    "depthwise": (noise(300, 1, 3, 3), 300),
    "copied": (noise(20, 30)[::2, ::3], 1),
    "bfloat16": (noise(20, 30, dtype=torch.bfloat16), 1),
    "float16": (noise(20, 30, dtype=torch.float16), 1),
    "float64": (noise(20, 30, dtype=torch.float64), 1),
}


def check_parameters(weights, gradients, groups=None):
    found = cpu.parameter_stats(weights, gradients, groups)
    for table, expected in zip(
        found, reference.parameter_stats(weights, gradients, groups), strict=True
    ):
        assert torch.equal(table[[0, 3, -1]], expected[[0, 3, -1]])
        scale = expected.abs().nan_to_num(0).sum(1, keepdim=True).clamp(min=1)
        near(table / scale, expected / scale, expected / scale, torch.float32)
        torch.testing.assert_close(table[1:3], expected[1:3], rtol=2e-6, atol=0, equal_nan=True)
    return found


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("form", ["same strides", "other strides", "float32", "none"])
def test_parameters(kind, form):
    weight, groups = WEIGHTS[kind]
    gradient = (noise(*weight.shape, scale=0.1) + 0.01).to(weight.dtype)
    if form == "same strides":
        gradient = torch.empty_like(weight).copy_(gradient)
    elif form == "float32":
        gradient = gradient.float()
    check_parameters([weight], [None if form == "none" else gradient], [groups])


def test_many_parameters_at_once():
    weights = [weight for weight, _ in WEIGHTS.values()]
    groups = [groups for _, groups in WEIGHTS.values()]
    gradients = [None if i % 3 == 2 else w * 0.5 + 0.1 for i, w in enumerate(weights)]
    found = check_parameters(weights, gradients, groups)
    again = cpu.parameter_stats(weights, gradients, groups, out=tuple(t.clone() for t in found))
    for once, twice in zip(found, again, strict=True):
        torch.testing.assert_close(twice, 2 * once, rtol=1e-12, atol=0)


@pytest.mark.parametrize("transposed", [False, True])
def test_nonfinite_gradients_of_weights(transposed):
    w, dw = noise(70, 90), noise(90, 70).t().contiguous()
    w[0, 0], w[5] = 1e30, -3e38
    dw[3, 4], dw[5, 4], dw[7] = math.nan, math.inf, -math.inf
    if transposed:
        w, dw = w.t(), dw.t()
    check_parameters([w], [dw])


def test_a_weight_that_is_nan_shows():
    w, dw = noise(6, 5), noise(6, 5)
    w[2, 3] = math.nan
    rows, columns = check_parameters([w], [dw])
    assert rows[1].isnan().tolist() == [False, False, True, False, False, False]
    assert columns[1].isnan().tolist() == [False, False, False, True, False]
