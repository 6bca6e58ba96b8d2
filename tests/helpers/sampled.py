"""Models whose activations are captured beside the sample."""

import torch
from torch import nn

from fastplastic import profile
from fastplastic.diagnostics import ranks_of
from fastplastic.measure import row_samples as _samples


class Capture:
    """What ranks were computed from, in the order of the layers."""

    def __init__(self, monkeypatch):
        self.seen = []
        monkeypatch.setattr(_samples, "ranks_of", self)

    def __call__(self, matrix):
        self.seen.append(matrix)
        return ranks_of(matrix)

    def of(self, model, batches, **options):
        """Profile a model; return {layer name: rows}, in float32."""
        self.seen.clear()
        found = profile(model, batches, ranks=True, **options)
        measured = [layer for layer in found if layer.ranks is not None]
        assert [matrix.dtype for matrix in self.seen] == [torch.float32] * len(measured)
        for layer, matrix in zip(measured, self.seen, strict=True):
            assert (layer.ranks.rows, layer.ranks.units) == tuple(matrix.shape)
            assert layer.ranks == ranks_of(matrix)
        return {layer.name: matrix for layer, matrix in zip(measured, self.seen, strict=True)}


def true_rows(model, batches, where, axis):
    """The true activations [positions, channels]: what goes into (or out of) a module."""
    rows = []

    def note(value):
        rows.append(value.detach().clone().movedim(axis, -1).flatten(0, -2))

    name, side = where
    module = model.get_submodule(name)
    if side == "input":
        handle = module.register_forward_pre_hook(lambda _, args: note(args[0]))
    else:
        handle = module.register_forward_hook(lambda *given: note(given[2]))
    with torch.no_grad(), torch.random.fork_rng():
        for x, _ in batches:
            model(x)
    handle.remove()
    return torch.cat(rows).float()


def batches_of(*shape, batches=2, **options):
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(*shape, generator=generator, **options), torch.arange(shape[0]) % 2)
        for _ in range(batches)
    ]


class Conv(nn.Sequential):
    """Convolution, norm, in-place activation function, dropout."""

    def __init__(self, act=None):
        super().__init__(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), act or nn.ReLU(inplace=True),
            nn.Dropout(0.5), nn.Conv2d(8, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        )  # fmt: skip


class Mlp(nn.Module):
    """An MLP over the last axis of tokens (B, T, C) or of images (B, H, W, C)."""

    def __init__(self, act=None):
        super().__init__()
        self.fc1 = nn.Linear(3, 8)
        self.act = act or nn.GELU()
        self.fc2 = nn.Linear(8, 2)

    def forward(self, x):
        y = self.fc2(self.act(self.fc1(x)))
        return y.flatten(1, -2).mean(1) if y.ndim > 2 else y
