"""What tests of trials share: a small task that is learned in a second."""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fastplastic.trials import Task, TrainSettings, TrialData


class Small(nn.Sequential):
    """A network with a head that the probe finds."""

    num_classes = 3

    def get_classifier(self) -> nn.Module:
        return self[-1]


def small(seed: int = 0, norm: bool = False) -> Small:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        norms = [nn.BatchNorm1d(16)] if norm else []
        return Small(
            nn.Linear(6, 16), *norms, nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3)
        )


def images(number: int, seed: int) -> TensorDataset:
    """Return points of three classes that a straight line does not quite tell apart."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(number, 6, generator=generator)
    return TensorDataset(x, (x[:, 0] * x[:, 1] > 0).long() + (x[:, 2] > 0.8).long())


TRAIN, TEST = images(96, 1), images(60, 2)


def data() -> TrialData:
    return TrialData(
        DataLoader(TRAIN, 16, shuffle=True, drop_last=True),
        DataLoader(TEST, 60),
        DataLoader(TRAIN, 48),
    )


def settings(**values: object) -> TrainSettings:
    return TrainSettings(**{"epochs": 2, "evals": 3, "lr": 0.01, "profile_images": 96} | values)


def task(**values: object) -> Task:
    given = {"model": small, "data": lambda seed: data(), "fresh": lambda seed: small(100 + seed)}
    return Task(**given | values)


def with_norm():
    return task(model=lambda seed: small(seed, norm=True))
