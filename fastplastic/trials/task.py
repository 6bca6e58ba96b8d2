"""What a trial is about: models and data of each seed, and what is told of them."""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True, eq=False)
class TrialData:
    """The images of one seed.

    Attributes:
        train: What is trained on: yields batches and has a length; its order and augmentation are
            drawn from the global random state of torch, numpy and Python.
        test: What the curves are measured on; nothing is chosen by it.
        plain: Training images without augmentation, always the same, in batches: for the probe,
            the profile, the plan and the statistics of norms.
        validation: Images apart from both, which the best arm is chosen by; None for no choice.
    """

    train: Any
    test: Iterable[Any]
    plain: Iterable[Any]
    validation: Iterable[Any] | None = None


@dataclass(frozen=True, eq=False)
class Task:
    """A model to fine-tune, and what it is fine-tuned on.

    Attributes:
        model: Seed -> the pretrained model on its device; a new one each time.
        data: Seed -> its images.
        fresh: Seed -> the same architecture with random weights on the device, or None.
        facts: What settles the results beside the settings, as values that `json.dumps` takes.
    """

    model: Callable[[int], nn.Module]
    data: Callable[[int], TrialData]
    fresh: Callable[[int], nn.Module] | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


def digest_of(model: nn.Module) -> str:
    """Return a digest of all parameters and buffers, so that results of other weights differ."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    return digest.hexdigest()
