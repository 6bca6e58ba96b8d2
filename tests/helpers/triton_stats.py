"""What the tests of the Triton statistics share: poisoned memory, numbers, how near is near."""

import importlib
import math

import numpy as np
import pytest
import torch

from fastplastic.kernels import ACTIVATIONS, activate
from fastplastic.kernels.gpu import runtime as _triton_runtime
from helpers import REFERENCE as reference

# NumPy says so of the interpreter of Triton 3.6.
WARNINGS = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")

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
