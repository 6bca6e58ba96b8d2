import inspect

import numpy as np
import pytest
import torch

from fastplastic import criteria
from fastplastic.criteria import CRITERIA, ScoredLayer
from fastplastic.stats import STATISTICS, LayerStats, empty_table

NAN = float("nan")


def layer_stats(n_units: int, **rows: object) -> LayerStats:
    table = empty_table(n_units)
    for name, values in rows.items():
        table[STATISTICS.index(name)] = torch.as_tensor(values, dtype=torch.float64)
    return LayerStats(table)


def of_activations(h: np.ndarray) -> LayerStats:
    """Return the statistics of activations [positions, units]."""
    return layer_stats(
        h.shape[1],
        n=[len(h)] * h.shape[1],
        sum_h=h.sum(0),
        sum_abs_h=np.abs(h).sum(0),
        sum_sq_h=(h * h).sum(0),
        min_h=h.min(0),
        max_h=h.max(0),
    )


def equal(found: torch.Tensor, expected: object) -> bool:
    expected = torch.as_tensor(expected, dtype=torch.float64)
    assert found.dtype == torch.float64
    return torch.allclose(found, expected, rtol=1e-12, atol=0, equal_nan=True)


ACTIVATIONS = np.abs(np.random.default_rng(0).normal(size=(50, 6))) * [1, 0, 3, 0.01, 1, 1]


def test_dead_is_the_range_of_the_activation():
    low, high = [-1, 0, 0.5, 1, np.inf], [2, 0, 0.5, 1, -np.inf]
    stats = layer_stats(5, n=[3, 3, 3, 1, 0], min_h=low, max_h=high)
    assert equal(criteria.dead(stats), [3, 0, 0, NAN, NAN])


@pytest.mark.parametrize("name", ["frozen", "saturated"])
def test_flat_share(name):
    stats = layer_stats(4, n=[8, 8, 8, 0], n_flat=[0, 6, 8, 0])
    assert equal(CRITERIA[name].score(stats), [0, 0.75, 1, NAN])


def test_dormant_is_relative_to_the_mean_of_the_layer():
    activity = np.abs(ACTIVATIONS).mean(0)
    expected = activity / (activity.mean() + 1e-9)
    assert equal(criteria.dormant(of_activations(ACTIVATIONS)), expected)
    assert (expected <= CRITERIA["dormant"].threshold).tolist() == [0, 1, 0, 1, 0, 0]


def test_dormant_in_a_layer_without_activity_is_zero():
    assert equal(criteria.dormant(layer_stats(3, n=[5, 5, 5])), [0, 0, 0])


def test_an_unknown_unit_does_not_spoil_the_mean_of_the_others():
    stats = layer_stats(3, n=[2, 2, 0], sum_abs_h=[2, 6, 0])
    assert equal(criteria.dormant(stats), [1 / (2 + 1e-9), 3 / (2 + 1e-9), NAN])
    stats = layer_stats(3, n_dw=[4, 4, 0], sum_abs_dw=[2, 6, 0])
    assert equal(criteria.gradient(stats), [0.5, 1.5, NAN])


def test_gradient_is_relative_to_the_mean_of_the_layer():
    # Without an epsilon: gradients of deep layers are often smaller than one.
    stats = layer_stats(3, n_dw=[10, 10, 10], sum_abs_dw=[1e-12, 0, 3e-12])
    assert equal(criteria.gradient(stats), [0.75, 0, 2.25])


def test_activation_gradient_is_relative_to_the_mean_of_the_layer():
    stats = layer_stats(3, n_g=[10, 10, 0], sum_abs_g=[1e-12, 3e-12, 0])
    assert equal(criteria.activation_gradient(stats), [0.5, 1.5, NAN])


@pytest.mark.parametrize("name", ["gradient", "activation_gradient", "first_order"])
def test_a_layer_that_no_gradient_reaches_is_unknown(name):
    reached_by_none = layer_stats(
        3, n=[4, 4, 4], n_flat=[0, 1, 4], n_g=[9, 9, 9], n_dw=[10, 10, 10], n_dw_out=[5, 5, 5]
    )
    assert equal(CRITERIA[name].score(reached_by_none), [NAN] * 3)
    assert equal(CRITERIA[name].score(layer_stats(3)), [NAN] * 3)


def test_first_order_is_the_size_of_the_signed_sum():
    stats = layer_stats(4, n_dw_out=[5, 5, 5, 0], sum_w_out_dw_out=[-2, 0, 0.5, 0])
    assert equal(criteria.first_order(stats), [2, 0, 0.5, NAN])


def test_contribution_is_activity_times_outgoing_weight():
    stats = layer_stats(
        4, n=[2, 2, 2, 0], sum_abs_h=[4, 0, 2, 0], n_out=[10, 10, 0, 10], sum_abs_w_out=[5, 5, 0, 5]
    )
    assert equal(criteria.contribution(stats), [1, 0, NAN, NAN])


def outgoing(h: np.ndarray, w_out: np.ndarray, w_in: np.ndarray) -> LayerStats:
    """Return statistics of activations, with weights [*, units] that read, [units, *] that make."""
    stats = of_activations(h)
    rows = {
        "n_out": [len(w_out)] * h.shape[1], "sum_abs_w_out": np.abs(w_out).sum(0),
        "n_in": [w_in.shape[1]] * h.shape[1], "sum_abs_w": np.abs(w_in).sum(1),
    }  # fmt: skip
    for name, values in rows.items():
        stats.table[STATISTICS.index(name)] = torch.as_tensor(values, dtype=torch.float64)
    return stats


def test_contributions_of_continual_backpropagation():
    random = np.random.default_rng(1)
    h, w_out, w_in = ACTIVATIONS + 3, random.normal(size=(4, 6)), random.normal(size=(6, 5))
    w_in[4] = 0
    stats = outgoing(h, w_out, w_in)
    expected = h.std(0) * np.abs(w_out).mean(0)
    found = criteria.zero_contribution(stats)
    assert np.allclose(found, expected, rtol=1e-9, atol=1e-6)
    # A unit that is always 3 gives a constant, which the biases of its readers can hold.
    assert found[1] < 1e-6 < found[[0, 2, 3, 4, 5]].min()
    adaptable = criteria.adaptable_contribution(stats)
    assert adaptable[4].isnan()
    kept = [0, 2, 3, 5]
    assert np.allclose(adaptable[kept], expected[kept] / np.abs(w_in).mean(1)[kept], rtol=1e-9)


def test_phi_scales_the_range_of_the_function():
    z = np.random.default_rng(2).normal(size=(200, 6)) * [0.1, 1, 50, 0.1, 1, 50]
    h = np.concatenate([np.tanh(z[:, :3]), 1 / (1 + np.exp(-z[:, 3:]))], axis=1)
    layer = ScoredLayer("a", ((0, 3, "tanh"), (3, 5, "sigmoid"), (5, 6, "relu")))
    found = CRITERIA["phi"].score(of_activations(h), layer)
    scaled = np.concatenate([h[:, :3], 2 * h[:, 3:5] - 1], axis=1)
    assert np.allclose(found[:5], np.sqrt((scaled**2).mean(0)), rtol=1e-9)
    assert found[5].isnan() and found[2] > 0.95
    assert CRITERIA["phi"].unknown == "only tanh, hardtanh, sigmoid, hardsigmoid have one"


def test_random_is_fixed_by_seed_layer_and_unit():
    scores = criteria.random(layer_stats(1000), ScoredLayer("blocks.0", seed=7))
    assert scores.dtype == torch.float64 and 0 <= scores.min() and scores.max() < 1
    assert 0.45 < scores.mean() < 0.55 and scores.unique().numel() == 1000
    assert torch.equal(
        scores[:10], criteria.random(layer_stats(10), ScoredLayer("blocks.0", seed=7))
    )
    assert not torch.equal(
        scores, criteria.random(layer_stats(1000), ScoredLayer("blocks.1", seed=7))
    )
    assert not torch.equal(
        scores, criteria.random(layer_stats(1000), ScoredLayer("blocks.0", seed=8))
    )


def test_random_leaves_the_global_random_state_alone():
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    criteria.random(layer_stats(10), ScoredLayer("a"))
    assert torch.equal(torch_state, torch.get_rng_state())
    assert (numpy_state == np.random.get_state()[1]).all()


def test_the_registry_holds_the_defaults_of_the_sources():
    table = {name: (rule.candidate, rule.threshold) for name, rule in CRITERIA.items()}
    assert table == {
        "dead": ("small", 0.0),
        "frozen": ("large", 1.0),
        "saturated": ("large", 0.95),
        "phi": ("large", None),
        "dormant": ("small", 0.025),
        "gradient": ("small", 0.1),
        "activation_gradient": ("small", 0.01),
        "first_order": ("small", None),
        "contribution": ("small", None),
        "zero_contribution": ("small", None),
        "adaptable_contribution": ("small", None),
        "random": ("small", None),
    }


@pytest.mark.parametrize("name", CRITERIA)
def test_every_criterion_says_where_it_comes_from(name):
    rule = CRITERIA[name]
    assert rule.name == name and rule.source and rule.summary
    documented = inspect.getdoc(getattr(criteria, name))
    # One name of the source at least stands in the docstring too.
    source = rule.source.removeprefix("after ").removeprefix("variant of ").split()[0].rstrip(",")
    assert source in documented or "control" in documented


@pytest.mark.parametrize("name", CRITERIA)
def test_every_criterion_scores_an_empty_layer_and_one_unit(name):
    assert CRITERIA[name].score(layer_stats(0)).shape == (0,)
    assert CRITERIA[name].score(layer_stats(1), ScoredLayer("a", ((0, 1, "relu"),), 3)).shape == (
        1,
    )
