"""The additive table and the numbers read off it."""

import pytest
import torch
from helpers import REFERENCE as reference
from hypothesis import given
from hypothesis import strategies as st

from fastplastic import kernels
from fastplastic.stats import (
    ACTIVATION_STATISTICS,
    GRADIENT_STATISTICS,
    STATISTICS,
    LayerStats,
    UnitStats,
    columns_of,
    empty_table,
    merge_into,
)


def layer_stats(units=1, **rows):
    table = empty_table(units)
    for name, values in rows.items():
        table[STATISTICS.index(name)] = torch.as_tensor(values, dtype=torch.float64)
    return LayerStats(table)


def measured(h, g):
    """The table of activations [positions, units] and gradients to them."""
    table = empty_table(h.shape[1])
    sums = torch.cat([reference.activation_stats(h, 1, "relu"), reference.gradient_stats(g, 1)])
    table[: len(sums)] = sums
    return table


def test_rows_are_those_of_the_kernels():
    assert kernels.ACTIVATION_ROWS == ACTIVATION_STATISTICS
    assert kernels.GRADIENT_ROWS == GRADIENT_STATISTICS
    assert len(set(STATISTICS)) == len(STATISTICS) == 27


def test_empty_is_neutral():
    table = measured(torch.randn(5, 3), torch.randn(5, 3))
    empty, filled = empty_table(3), table.clone()
    merge_into(empty, table)
    merge_into(filled, empty_table(3))
    assert torch.equal(empty, table) and torch.equal(filled, table)


@given(
    sizes=st.lists(st.integers(0, 6), min_size=1, max_size=5),
    units=st.integers(1, 4),
    seed=st.integers(0, 10**6),
)
def test_merging_is_seeing_all_at_once(sizes, units, seed):
    generator = torch.Generator().manual_seed(seed)
    # Eighths: their sums are exact in any order.
    h, g = torch.randint(-40, 40, (2, sum(sizes), units), generator=generator) / 8
    merged = empty_table(units)
    for part_h, part_g in zip(h.split(sizes), g.split(sizes), strict=True):
        merge_into(merged, measured(part_h, part_g))
    assert torch.equal(merged, measured(h, g))


def test_a_layer_is_a_view_of_its_columns():
    stats = UnitStats(empty_table(5), columns_of({"a": 2, "none": 0, "b": 3}))
    stats.table[0] = torch.arange(5)
    assert stats["a"]["n"].tolist() == [0, 1]
    assert stats["b"]["n"].tolist() == [2, 3, 4]
    assert stats["b"].n_units == 3 and stats["none"].n_units == 0
    with pytest.raises(KeyError):
        stats["c"]
    with pytest.raises(KeyError):
        stats["a"]["no such statistic"]


def test_means_against_plain_formulas():
    h, g = torch.randn(50, 4).double(), torch.randn(50, 4).double()
    stats = LayerStats(measured(h, g))
    active = h.relu()
    torch.testing.assert_close(stats.mean_abs_h, active.abs().mean(0))
    torch.testing.assert_close(stats.std_h, active.std(0, correction=0))
    torch.testing.assert_close(stats.range_h, active.amax(0) - active.amin(0))
    torch.testing.assert_close(stats.flat_share, (h <= 0).double().mean(0))
    torch.testing.assert_close(stats.mean_abs_g, g.abs().mean(0))


def test_parameter_means():
    stats = layer_stats(
        2, n_dw=4, sum_abs_dw=[8, 0], n_out=[2, 0], sum_abs_w_out=[3, 0], n_dw_out=[5, 0],
        sum_w_out_dw_out=[-7, 0],
    )  # fmt: skip
    assert stats.mean_abs_dw.tolist() == [2, 0]
    assert stats.mean_abs_w_out[0] == 1.5
    assert stats.first_order[0] == 7
    # The second unit has no known consumer.
    assert stats.mean_abs_w_out[1].isnan()
    assert stats.first_order[1].isnan()
    assert stats.has_gradients


@pytest.mark.parametrize(
    "name",
    ["mean_abs_h", "std_h", "range_h", "flat_share", "mean_abs_g", "mean_abs_dw",
     "mean_abs_w_out", "first_order"],
)  # fmt: skip
def test_unknown_is_nan(name):
    assert getattr(layer_stats(3), name).isnan().all()


def test_one_position_has_no_range():
    assert layer_stats(n=1, min_h=2, max_h=2).range_h.isnan().all()
    assert layer_stats(n=2, min_h=2, max_h=2).range_h.item() == 0


def test_rounding_leaves_no_negative_variance():
    stats = layer_stats(n=3, sum_h=0.3, sum_sq_h=0.03 * (1 - 1e-15))
    assert stats.std_h.item() == 0


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("mean_abs_g", {"n_g": 5}),
        ("mean_abs_dw", {"n_dw": 5}),
        ("first_order", {"n_dw_out": 5}),
    ],
)
def test_layer_without_any_gradient_is_unknown(name, rows):
    """Zero for every unit says nothing; zero for one of them does."""
    assert getattr(layer_stats(2, **rows), name).isnan().all()
    total = {"mean_abs_g": "sum_abs_g", "mean_abs_dw": "sum_abs_dw"}.get(name, "sum_w_out_dw_out")
    assert getattr(layer_stats(2, **rows, **{total: [0, 5]}), name)[0] == 0
