"""Scores and selections of the papers, computed once more by hand in NumPy, on small networks.

The reference side reads the weights as arrays and uses nothing of the library: forward pass,
backward pass and statistics are written out here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch import nn

from fastplastic import Profile, plan, profile
from fastplastic.kernels import select, selection_masks

Batches = list[tuple[np.ndarray, np.ndarray]]

# Share of the pre-activation that each planted unit is left with; a dead one is never positive.
DEAD, FAINT, WEAK = 0.0, 0.005, 0.03
PLANTED = {1: DEAD, 4: DEAD, 2: FAINT, 5: WEAK}
CLASSES = 4
# Of different sizes: means of activations are over samples, those of gradients over batches.
SIZES = (7, 9, 4)


@dataclass(frozen=True)
class Case:
    """A network of weight layers with ReLU between them, and what the formulas need of it.

    Attributes:
        model: The network in PyTorch.
        batches: Inputs and labels.
        padding: Padding of each weight layer.
    """

    model: nn.Sequential
    batches: Batches
    padding: tuple[int, ...]

    @property
    def layers(self) -> list[tuple[str, nn.Module]]:
        return [
            (name, layer) for name, layer in self.model.named_children() if hasattr(layer, "weight")
        ]

    @property
    def hidden(self) -> list[str]:
        """Names of the layers but the last."""
        return [name for name, _ in self.layers[:-1]]


@cache
def case(name: str) -> Case:
    if name == "mlp":
        model = nn.Sequential(
            nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, CLASSES)
        )
        return filled(Case(model, labelled(6), (0, 0, 0)))
    model = nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.ReLU(),
        nn.Flatten(), nn.Linear(12 * 16, CLASSES),
    )  # fmt: skip
    return filled(Case(model, labelled(2, 6, 6), (1, 0, 0)))


def labelled(*shape: int) -> Batches:
    random = np.random.default_rng(0)
    return [
        (random.normal(size=(size, *shape)).astype(np.float32), random.integers(0, CLASSES, size))
        for size in SIZES
    ]


def filled(made: Case) -> Case:
    """Draw the weights and plant dead and weak units in every hidden layer."""
    random = np.random.default_rng(1)
    for name, layer in made.layers:
        weight = random.normal(size=layer.weight.shape, scale=layer.weight[0].numel() ** -0.5)
        bias = random.uniform(0, 0.5, size=layer.bias.shape)
        for unit, share in PLANTED.items() if name in made.hidden else ():
            weight[unit] *= share or 1
            bias[unit] = bias[unit] * share if share else -20
        layer.weight.data.copy_(torch.from_numpy(weight))
        layer.bias.data.copy_(torch.from_numpy(bias))
    return made


@cache
def measured(name: str) -> Profile:
    made = case(name)
    batches = [(torch.from_numpy(x), torch.from_numpy(y)) for x, y in made.batches]
    return profile(made.model, batches, gradients=True)


@dataclass(frozen=True)
class Pass:
    """One batch through a network; a list has one entry per weight layer.

    Attributes:
        h: Outputs, after the ReLU where there is one, [samples, units, *].
        g: Gradients of the loss to them.
        dw: Gradients of the loss to the weights.
    """

    h: list[np.ndarray]
    g: list[np.ndarray]
    dw: list[np.ndarray]


def padded(x: np.ndarray, by: int) -> np.ndarray:
    return np.pad(x, ((0, 0), (0, 0), (by, by), (by, by)))


def output_of(x: np.ndarray, w: np.ndarray, bias: np.ndarray, padding: int) -> np.ndarray:
    if w.ndim == 2:
        return x.reshape(len(x), -1) @ w.T + bias
    windows = sliding_window_view(padded(x, padding), w.shape[2:], (2, 3))
    return np.einsum("nchwij,ocij->nohw", windows, w) + bias[:, None, None]


def gradients_of(
    dz: np.ndarray, x: np.ndarray, w: np.ndarray, padding: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the gradients of the loss to the input and to the weight of a layer."""
    if w.ndim == 2:
        return (dz @ w).reshape(x.shape), dz.T @ x.reshape(len(x), -1)
    kernel = w.shape[2]
    windows = sliding_window_view(padded(x, padding), (kernel, kernel), (2, 3))
    spread = sliding_window_view(padded(dz, kernel - 1), (kernel, kernel), (2, 3))
    dx = np.einsum("nohwij,ocij->nchw", spread, w[:, :, ::-1, ::-1])
    inner = slice(padding, dx.shape[2] - padding)
    return dx[:, :, inner, inner], np.einsum("nohw,nchwij->ocij", dz, windows)


def weights_of(made: Case) -> list[np.ndarray]:
    return [layer.weight.detach().numpy().astype(np.float64) for _, layer in made.layers]


def run(made: Case, x: np.ndarray, labels: np.ndarray) -> Pass:
    """Compute the mean cross-entropy of a batch, and its gradients from the last layer down."""
    weights = weights_of(made)
    inputs = [x.astype(np.float64)]
    for i, (_, layer) in enumerate(made.layers):
        z = output_of(inputs[-1], weights[i], layer.bias.detach().numpy(), made.padding[i])
        inputs.append(z if i == len(weights) - 1 else np.maximum(z, 0))
    odds = np.exp(inputs[-1])
    dz = odds / odds.sum(1, keepdims=True)
    dz[np.arange(len(x)), labels] -= 1
    dz /= len(x)
    g, dw = [dz], []
    for i in reversed(range(len(weights))):
        dx, gradient = gradients_of(dz, inputs[i], weights[i], made.padding[i])
        dz = dx * (inputs[i] > 0)
        g.insert(0, dx)
        dw.insert(0, gradient)
    return Pass(inputs[1:], g[1:], dw)


@cache
def passes(name: str) -> list[Pass]:
    made = case(name)
    return [run(made, x, labels) for x, labels in made.batches]


@dataclass(frozen=True)
class Units:
    """What the formulas of unit scores read of one layer.

    Attributes:
        h: Outputs of all samples [samples, units, *].
        g: Gradients of the loss to them.
        w_in: Incoming weights [units, *].
        w_out: Outgoing weights [readers, units, *].
        dw: Gradient of the incoming weights, the mean over the batches.
        hg: Sum of h * g over a batch, the mean over the batches, [units].
    """

    h: np.ndarray
    g: np.ndarray
    w_in: np.ndarray
    w_out: np.ndarray
    dw: np.ndarray
    hg: np.ndarray


def units_of(name: str, i: int) -> Units:
    weights, done = weights_of(case(name)), passes(name)
    n_units, out = len(weights[i]), weights[i + 1]
    return Units(
        h=np.concatenate([one.h[i] for one in done]),
        g=np.concatenate([one.g[i] for one in done]),
        w_in=weights[i],
        # Flattening keeps the positions of a channel together.
        w_out=out.reshape(len(out), n_units, -1),
        dw=np.mean([one.dw[i] for one in done], axis=0),
        hg=np.mean([over_units(one.h[i] * one.g[i], np.sum) for one in done], axis=0),
    )


def over_units(x: np.ndarray, reduce: Callable, unit_axis: int = 1) -> np.ndarray:
    """Return what `reduce` makes of everything of each unit."""
    return reduce(np.moveaxis(x, unit_axis, 0).reshape(x.shape[unit_axis], -1), axis=1)


def mean_size(x: np.ndarray, unit_axis: int = 1) -> np.ndarray:
    return over_units(np.abs(x), np.mean, unit_axis)


def relative(x: np.ndarray) -> np.ndarray:
    return x / x.mean()


# In this order: ReDo (arXiv 2302.12902), GraMa (arXiv 2505.24061) and its variant, Taylor pruning
# (Molchanov 2019), and the utilities of continual backpropagation (Dohare, Nature 2024), the last
# two with the standard deviation of h in place of the mean distance from its mean.
FORMULAS: dict[str, Callable[[Units], np.ndarray]] = {
    "dormant": lambda u: relative(mean_size(u.h)),
    "gradient": lambda u: relative(mean_size(u.dw, 0)),
    "activation_gradient": lambda u: relative(mean_size(u.g)),
    "first_order": lambda u: np.abs(u.hg),
    "contribution": lambda u: mean_size(u.h) * mean_size(u.w_out),
    "zero_contribution": lambda u: over_units(u.h, np.std) * mean_size(u.w_out),
    "adaptable_contribution": lambda u: (
        over_units(u.h, np.std) * mean_size(u.w_out) / mean_size(u.w_in, 0)
    ),
}


def scores_of(name: str, criterion: str) -> dict[str, np.ndarray]:
    hidden = case(name).hidden
    return {layer: FORMULAS[criterion](units_of(name, i)) for i, layer in enumerate(hidden)}


def lowest(scores: dict[str, np.ndarray], count: int) -> dict[str, list[int]]:
    """Return the units with the `count` lowest scores; the next one must stand clear of them."""
    ranked = sorted((s, name, u) for name, of in scores.items() for u, s in enumerate(of))
    assert ranked[count][0] > ranked[count - 1][0] * (1 + 1e-4)
    chosen = [(name, unit) for _, name, unit in ranked[:count]]
    units = {name: sorted(u for n, u in chosen if n == name) for name in scores}
    return {name: of for name, of in units.items() if of}


def chosen(made) -> dict[str, list[int]]:
    return {name: units.tolist() for name, units in made.units.items()}


NETS = pytest.mark.parametrize("net", ["mlp", "conv"])


@NETS
def test_the_passes_written_by_hand_give_the_gradients(net):
    gradients = measured(net).gradients
    for i, (name, _) in enumerate(case(net).layers):
        expected = np.mean([one.dw[i] for one in passes(net)], axis=0)
        found = gradients[f"{name}.weight"].numpy()
        assert np.abs(expected).max() > 1e-3
        assert np.allclose(found, expected, rtol=1e-4, atol=1e-6 * np.abs(expected).max())


@NETS
@pytest.mark.parametrize("criterion", FORMULAS)
def test_scores(net, criterion):
    found = measured(net).score(criterion)
    for name, expected in scores_of(net, criterion).items():
        assert len(expected) == len(found[name]) and expected.max() > 0
        assert np.allclose(found[name], expected, rtol=1e-4, atol=1e-6 * expected.max())


@NETS
def test_first_order_from_weights_is_that_from_activations(net):
    """Both readings of Taylor pruning, by hand: sum of w_out * dw_out and sum of h * g."""
    for i, (name, weight) in enumerate(
        zip(case(net).hidden, weights_of(case(net))[1:], strict=True)
    ):
        dw_out = np.mean([one.dw[i + 1] for one in passes(net)], axis=0)
        products = (weight * dw_out).reshape(len(weight), len(units_of(net, i).w_in), -1)
        expected = over_units(products, np.sum)
        assert np.allclose(expected, units_of(net, i).hg, rtol=1e-9, atol=1e-12)
        found = measured(net)[name].stats["sum_w_out_dw_out"]
        assert np.allclose(found, expected, rtol=1e-4, atol=1e-6 * np.abs(expected).max())


@NETS
def test_dormant_units_at_the_thresholds_of_redo(net):
    scores = scores_of(net, "dormant")
    expected_share = {0.0: (DEAD,), 0.025: (DEAD, FAINT), 0.1: (DEAD, FAINT, WEAK)}
    for tau, shares in expected_share.items():
        masks = {name: np.flatnonzero(of <= tau).tolist() for name, of in scores.items()}
        planted = sorted(unit for unit, share in PLANTED.items() if share in shares)
        assert masks == dict.fromkeys(case(net).hidden, planted)
        made = plan(measured(net), criterion="dormant", threshold=tau, max_layer_fraction=1.0)
        assert chosen(made) == masks


@NETS
@pytest.mark.parametrize("criterion", FORMULAS)
def test_the_lowest_units_of_all_layers(net, criterion):
    scores = scores_of(net, criterion)
    for count in (4, 9, 14):
        made = plan(measured(net), criterion=criterion, ratio=count / 20, max_layer_fraction=1.0)
        assert made.eligible == 20 and chosen(made) == lowest(scores, count)


@NETS
@pytest.mark.parametrize("criterion", FORMULAS)
def test_the_lowest_units_of_each_layer(net, criterion):
    scores = scores_of(net, criterion)
    # Layers of 8 and 12 units: both ratios leave no remainder.
    for ratio in (0.25, 0.5):
        expected = {}
        for name, of in scores.items():
            expected |= lowest({name: of}, int(ratio * len(of)))
        made = plan(measured(net), criterion=criterion, ratio=ratio, scope="layer")
        assert chosen(made) == expected


@dataclass(frozen=True)
class Weights:
    """Weights and gradients of a whole network, and the scores of all elements in one row."""

    names: list[str]
    w: list[np.ndarray]
    dw: list[np.ndarray]

    @property
    def scores(self) -> np.ndarray:
        products = [np.abs(w * dw) for w, dw in zip(self.w, self.dw, strict=True)]
        assert all(product.dtype == np.float32 for product in products)
        return np.concatenate([product.ravel() for product in products])

    def selected(self, count: int) -> np.ndarray:
        """Return the library's selection as one row of bools."""
        weights, gradients = map(torch.from_numpy, self.w), map(torch.from_numpy, self.dw)
        tensors = list(weights), list(gradients)
        selection = select(*tensors, self.names, count, criterion="swr")
        masks = selection_masks(selection, *tensors)
        assert [mask.shape for mask in masks] == [w.shape for w in self.w]
        return np.concatenate([mask.numpy().ravel() for mask in masks])


def weights_with_ties(net: str) -> Weights:
    """Return the network's own weights and gradients with elements of equal score planted.

    Dead units have scores of 0; a quarter of the other elements, in all layers, gets 2^-9.
    """
    made = case(net)
    names = [f"{name}.weight" for name, _ in made.layers]
    w = [layer.weight.detach().numpy().copy() for _, layer in made.layers]
    dw = [measured(net).gradients[name].numpy().copy() for name in names]
    random = np.random.default_rng(2)
    for weight, gradient in zip(w, dw, strict=True):
        tied = (random.random(weight.shape) < 0.25) & (gradient != 0)
        weight[tied] = random.choice([0.125, -0.125], tied.sum())
        gradient[tied] = random.choice([2.0**-6, -(2.0**-6)], tied.sum())
    return Weights(names, w, dw)


@NETS
def test_swr_selects_the_smallest_products(net):
    made = weights_with_ties(net)
    scores = made.scores
    zeros, tie = int((scores == 0).sum()), np.float32(2.0**-9)
    below, upto = int((scores < tie).sum()), int((scores <= tie).sum())
    assert 0 < zeros < below < upto - 20 < len(scores) - 30
    # Within the zeros, at their end, between, inside and around the planted ties, and all.
    inside = [(below + upto) // 2, below + 1, upto - 1]
    for count in (1, zeros // 2, zeros, (zeros + below) // 2, below, *inside, upto, len(scores)):
        mask = made.selected(count)
        last = np.partition(scores, count - 1)[count - 1]
        assert mask.sum() == count
        assert mask[scores < last].all() and not mask[scores > last].any()
        # Which of the elements that score the same are taken is a matter of the seed alone.
        assert mask[scores == last].sum() == count - (scores < last).sum()


@NETS
def test_swr_without_ties_is_one_set(net):
    made = weights_with_ties(net)
    scores = made.scores
    order = np.argsort(scores, kind="stable")
    counts = np.flatnonzero(np.diff(scores[order]) > 0) + 1
    for count in counts[:: len(counts) // 9]:
        expected = np.zeros(len(scores), bool)
        expected[order[:count]] = True
        assert (made.selected(int(count)) == expected).all()
