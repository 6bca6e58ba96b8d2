"""Many tensors read by one call, and positions that do not count."""

import math

import pytest
import torch
from helpers import REFERENCE as reference
from helpers.triton_stats import (
    DEVICE,
    TOLERANCE,
    WARNINGS,
    activation,
    gradient,
    noise,
    numpy_does_not_warn,
    poisoned,
)

__all__ = ["numpy_does_not_warn", "poisoned"]
pytestmark = WARNINGS


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
