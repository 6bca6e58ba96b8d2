"""Sums over rows and columns whose bits do not depend on their order."""

import math

import pytest
import torch

from fastplastic.model import Lines


@pytest.mark.parametrize("shape", [(301, 37), (64, 6, 3, 3)])
@pytest.mark.parametrize(("power", "centre"), [(1, 0.0), (2, 0.0), (2, 0.3)])
def test_sums_are_the_same_in_any_order(shape, power, centre):
    draw = torch.Generator().manual_seed(0)
    values = (
        torch.randn(shape, generator=draw)
        * torch.logspace(-6, 3, shape[0])[:, None][(...,) + (None,) * (len(shape) - 2)]
    )
    sums = Lines("w", values, 1).sums(power, centre)
    assert sums.shape == (1, shape[1]) and sums.dtype == torch.float64
    for _ in range(5):
        order = torch.randperm(shape[0], generator=draw)
        assert torch.equal(Lines("w", values[order], 1).sums(power, centre), sums)
    for column, found in zip(values.transpose(0, 1).double(), sums[0], strict=True):
        terms = (column - centre).pow(power)
        size = math.fsum(terms.abs().flatten().tolist())
        assert float(found) == pytest.approx(math.fsum(terms.flatten().tolist()), abs=1e-9 * size)


def test_groups_have_columns_of_their_own():
    values = torch.arange(48, dtype=torch.float32).view(6, 4, 2)
    sums = Lines("w", values, 1, groups=2).sums(1)
    expected = torch.stack([half.sum((0, 2)) for half in values.chunk(2)])
    assert torch.equal(sums, expected.double())


def test_only_what_is_live_counts():
    values = torch.tensor([[1.0, 2.0], [torch.nan, 4.0]])
    live = torch.tensor([[True, True], [False, True]])
    rows = Lines("w", values, 0, live=live)
    assert rows.sums(0).tolist() == [[2.0, 1.0]] and rows.sums(1).tolist() == [[3.0, 4.0]]
