"""A small model, its steps, and the statistics of them by hand."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastplastic.kernels.reference.activation_stats import activation_stats
from fastplastic.kernels.reference.gradient_stats import gradient_stats
from fastplastic.kernels.reference.parameter_stats import parameter_stats
from fastplastic.stats import STATISTICS


class Net(nn.Module):
    """Two hidden layers; the first activation function overwrites its input."""

    def __init__(self, recompute=None):
        super().__init__()
        self.fc1 = nn.Linear(6, 8)
        self.act1 = nn.ReLU(inplace=True)
        self.fc2 = nn.Linear(8, 5)
        self.act2 = nn.GELU()
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(5, 3)
        self.recompute = recompute

    def body(self, x):
        return self.drop(self.act2(self.fc2(self.act1(self.fc1(x)))))

    def forward(self, x):
        if self.recompute is None:
            return self.head(self.body(x))
        return self.head(checkpoint(self.body, x, use_reentrant=self.recompute))


def net(**options):
    torch.manual_seed(0)
    return Net(**options).eval()


def inputs(seed, size=16):
    return torch.randn(size, 6, generator=torch.Generator().manual_seed(seed))


def step(model, seed=0, scale=1.0):
    (model(inputs(seed)).square().mean() * scale).backward()


def by_hand(model, seeds):
    """The tables of `Net`'s two hidden layers: activations, their gradients, weights per step."""
    tables = {"fc1": 0, "fc2": 0}
    for seed in seeds:
        z1 = model.fc1(inputs(seed))
        h1 = z1.relu()
        z2 = model.fc2(h1)
        h2 = nn.functional.gelu(z2)
        loss = model.head(h2).square().mean()
        weights = model.fc1.weight, model.fc2.weight, model.head.weight
        dw = torch.autograd.grad(loss, weights, retain_graph=True)
        g1, g2 = torch.autograd.grad(loss, [h1, h2])
        pairs = [("fc1", z1, g1, "relu", 0), ("fc2", z2, g2, "gelu", 1)]
        for name, z, g, function, i in pairs:
            rows, _ = parameter_stats([weights[i]], [dw[i]])
            _, columns = parameter_stats([weights[i + 1]], [dw[i + 1]])
            parts = [activation_stats(z, 1, function), gradient_stats(g, 1), rows, columns]
            tables[name] = merged(tables[name], torch.cat(parts))
    return tables


def merged(one, two):
    if isinstance(one, int):
        return two
    total = one + two
    low, high = STATISTICS.index("min_h"), STATISTICS.index("max_h")
    total[low] = torch.minimum(one[low], two[low])
    total[high] = torch.maximum(one[high], two[high])
    return total


def close(profile, tables, rtol=1e-5):
    for name, table in tables.items():
        torch.testing.assert_close(profile[name].stats.table, table, rtol=rtol, atol=1e-6)


def like(found, expected):
    """The kernels sum up in float32, the reference in float64."""
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
