"""A small model with norms, dropout and counters, and batches for it."""

import torch
from torch import nn


class Net(nn.Module):
    """Convolution, norm, in-place activation function, dropout; a buffer that is replaced."""

    def __init__(self, classes=4):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.bn = nn.BatchNorm2d(8)
        self.act = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.3)
        self.fc = nn.Linear(8, 6)
        self.head = nn.Linear(6, classes)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def forward(self, x):
        self.calls = self.calls + 1
        self.scratch += 1
        h = self.drop(self.act(self.bn(self.conv(x))).mean((2, 3)))
        return self.head(torch.nn.functional.gelu(self.fc(h)))


def net(training=False, **options):
    torch.manual_seed(0)
    model = Net(**options).train(training)
    model.bn.running_mean.normal_()
    return model


def data(batches=2, size=5, classes=4):
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(size, 3, 8, 8, generator=generator),
            torch.randint(0, classes, (size,), generator=generator),
        )
        for _ in range(batches)
    ]
