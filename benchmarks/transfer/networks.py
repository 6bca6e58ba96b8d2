"""Networks whose plasticity is known: healthy ones, and damaged ones, each in a published way."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import timm
import torch
from data import Form, balanced, digits, fashion, permuted, prepared
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fastplastic.files import load_into, save_state_dict

IMAGENET = Form(3, 64, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class Chain(nn.Sequential):
    """Layers in a row, the last one the head."""

    num_classes = 10

    def get_classifier(self) -> nn.Module:
        """Return the head."""
        return self[-1]


def mlp() -> nn.Module:
    """Return an MLP of three hidden layers, as in the studies of permuted pixels."""
    layers: list[nn.Module] = [nn.Flatten()]
    sizes = [784, 200, 200, 200]
    for inside, outside in pairwise(sizes):
        layers += [nn.Linear(inside, outside), nn.ReLU()]
    return Chain(*layers, nn.Linear(200, 10))


def cnn() -> nn.Module:
    """Return a convolutional network with ReLU and no norms."""
    return Chain(
        nn.Conv2d(1, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU(),
        nn.Conv2d(64, 64, 3, 1, 1), nn.ReLU(), nn.Conv2d(64, 128, 3, 2, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(512, 128), nn.ReLU(), nn.Linear(128, 10),
    )  # fmt: skip


def resnet() -> nn.Module:
    """Return timm's ResNet of basic blocks, small, with BatchNorm."""
    return timm.create_model(
        "resnet10t", in_chans=1, num_classes=10, stem_type="", stem_width=16,
        channels=(16, 32, 64, 128), zero_init_last=False,
    )  # fmt: skip


def vit() -> nn.Module:
    """Return a small ViT on patches of 7 x 7 pixels."""
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=28, patch_size=7, embed_dim=64, depth=4, num_heads=4,
        in_chans=1, num_classes=10,
    )  # fmt: skip


def lite0() -> nn.Module:
    """Return EfficientNet-Lite0 with random weights and ten classes."""
    return timm.create_model("tf_efficientnet_lite0", num_classes=10)


@dataclass(frozen=True, eq=False)
class Network:
    """A network before fine-tuning.

    Attributes:
        build: Makes the architecture with random weights.
        train: Trains it, in whatever way; None for weights that are loaded.
        damaged: Whether it has lost plasticity in the way of its paper.
        source: The paper, or what the weights are.
        form: How it takes images.
        arguments: Of `train`.
    """

    build: Callable[[], nn.Module]
    train: Callable[..., None] | None
    damaged: bool
    source: str
    form: Form = field(default_factory=Form)
    arguments: dict[str, Any] = field(default_factory=dict)


def seeded(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    """Return a network with random weights of the seed; the random state is as before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def load(name: str, cache: Path, seed: int = 0) -> nn.Module:
    """Return a network in eval mode; it is made once and kept in the folder `cache`."""
    network = NETWORKS[name]
    if network.train is None:
        return _real_lite0(seed)
    model = seeded(network.build, 1000 + seed)
    file = cache / f"{name}-{seed}.safetensors"
    if file.exists():
        load_into(model, file)
        return model.eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2000 + seed)
        print(f"making {name}, seed {seed}", file=sys.stderr)
        network.train(model, seed=seed, **network.arguments)
    cache.mkdir(parents=True, exist_ok=True)
    save_state_dict(file, model)
    return model.eval()


def _real_lite0(seed: int) -> nn.Module:
    sys.path.insert(0, str(Path(__file__).parent.parent))
    from pretrained import pretrained_model

    model: Any = pretrained_model()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.reset_classifier(10)
    return model.eval()


def fit(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    optimizer: torch.optim.Optimizer,
    epochs: int,
    batch: int = 64,
    enough: float = 2.0,
) -> float:
    """Train on tensors, and return the training accuracy of the last epoch; stop where `enough`."""
    model.train()
    accuracy = 0.0
    for _ in range(epochs):
        order, right = torch.randperm(len(images)), 0
        for part in order.split(batch):
            outputs = model(images[part])
            loss = cross_entropy(outputs, labels[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            right += int((outputs.argmax(1) == labels[part]).sum())
        accuracy = right / len(images)
        if accuracy >= enough:
            break
    return accuracy


def train_well(model: nn.Module, *, seed: int, source: str, size: int, epochs: int) -> None:
    """Train for a good accuracy: AdamW with a falling rate."""
    images, labels = {"fashion": fashion, "digits": digits}[source]("train")
    chosen = balanced(labels, size, seed)
    inputs, targets = prepared(images[chosen], Form()), labels[chosen]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.02)
    for epoch in range(epochs):
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - epoch / epochs)
        accuracy = fit(model, inputs, targets, optimizer=optimizer, epochs=1)
        print(f"  epoch {epoch + 1} of {epochs}: {accuracy:.3f}", file=sys.stderr)


def random_labels(
    model: nn.Module,
    *,
    seed: int,
    tasks: int,
    size: int,
    epochs: int,
    until: float,
    lr: float = 1e-3,
) -> None:
    """Memorise random labels of the same images, anew for each task, by Adam.

    It ends with the task of which less than the share `until` was memorised.

    Sources: Lyle et al., arXiv 2303.01486; Kumar et al., arXiv 2308.11958.
    """
    images, labels = fashion("train")
    inputs = prepared(images[balanced(labels, size, seed)], Form())
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for task in range(tasks):
        targets = torch.randint(10, (len(inputs),))
        accuracy = fit(model, inputs, targets, optimizer=optimizer, epochs=epochs, enough=0.99)
        print(f"  task {task + 1} of {tasks}: {accuracy:.3f}", file=sys.stderr)
        if accuracy < until:
            return


def permuted_pixels(
    model: nn.Module, *, seed: int, tasks: int, size: int, lr: float, until: float
) -> None:
    """See each task once: the images with their pixels in an order of its own, by Adam.

    It ends with the first task of which less than the share `until` was right on the way.

    Source: Dohare et al., "Loss of plasticity in deep continual learning", Nature 2024 (online
    permuted MNIST, here of Fashion-MNIST).
    """
    images, labels = fashion("train")
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for task in range(tasks):
        chosen = balanced(labels, size, 10_000 * seed + task)
        inputs = prepared(permuted(images[chosen], seed=10_000 * seed + task), Form())
        accuracy = fit(model, inputs, labels[chosen], optimizer=optimizer, epochs=1, batch=16)
        if task % 10 == 0 or accuracy < until:
            print(f"  task {task + 1} of {tasks}: {accuracy:.3f}", file=sys.stderr)
        if accuracy < until:
            return


def high_rate(
    model: nn.Module, *, seed: int, size: int, lr: float, epochs: int, dead: float
) -> None:
    """Train at a high rate until a share of the ReLUs is dead.

    Source: the dying ReLU; Lu et al., arXiv 1903.06733.
    """
    images, labels = fashion("train")
    chosen = balanced(labels, size, seed)
    inputs, targets = prepared(images[chosen], Form()), labels[chosen]
    for turn in range(epochs):
        optimizer = torch.optim.Adam(model.parameters(), lr=lr)
        accuracy = fit(model, inputs, targets, optimizer=optimizer, epochs=1)
        share = dead_share(model, inputs[:1000])
        print(f"  epoch {turn + 1}: {accuracy:.3f}, {share:.0%} dead", file=sys.stderr)
        if share >= dead:
            return


def dead_share(model: nn.Module, inputs: Tensor) -> float:
    """Return the share of ReLU units that are 0 for all inputs."""
    seen: list[Tensor] = []

    def hook(module: nn.Module, args: Any, out: Tensor) -> None:
        seen.append(out.transpose(0, 1).flatten(1).amax(1) <= 0)

    handles = [m.register_forward_hook(hook) for m in model.modules() if isinstance(m, nn.ReLU)]
    with torch.no_grad():
        model(inputs)
    for handle in handles:
        handle.remove()
    return float(torch.cat(seen).float().mean())


def warm_start(model: nn.Module, *, seed: int, size: int, epochs: int) -> None:
    """Learn a part of the data by heart.

    Source: Ash and Adams, "On warm-starting neural network training", arXiv 1910.08475.
    """
    images, labels = fashion("train")
    chosen = balanced(labels, size, 500 + seed)
    inputs, targets = prepared(images[chosen], Form()), labels[chosen]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    accuracy = fit(model, inputs, targets, optimizer=optimizer, epochs=epochs)
    print(f"  {accuracy:.3f}", file=sys.stderr)


_LYLE = "Lyle et al., arXiv 2303.01486: random labels"
NETWORKS = {
    "mlp-random-labels": Network(
        mlp, random_labels, True, _LYLE,
        arguments={"tasks": 40, "size": 1200, "epochs": 60, "until": 0.6},
    ),
    "cnn-random-labels": Network(
        cnn, random_labels, True, _LYLE,
        arguments={"tasks": 20, "size": 1000, "epochs": 40, "until": 0.5},
    ),
    "mlp-permuted": Network(
        mlp, permuted_pixels, True, "Dohare et al., Nature 2024: permuted pixels",
        arguments={"tasks": 200, "size": 5000, "lr": 0.003, "until": 0.5},
    ),
    "vit-permuted": Network(
        vit, permuted_pixels, True, "Dohare et al., Nature 2024: permuted pixels",
        arguments={"tasks": 6, "size": 2000, "lr": 0.01, "until": 0.0},
    ),
    "cnn-dead": Network(
        cnn, high_rate, True, "Lu et al., arXiv 1903.06733: high learning rate",
        arguments={"size": 5000, "lr": 0.01, "epochs": 60, "dead": 0.4},
    ),
    "resnet-warm-start": Network(
        resnet, warm_start, True, "Ash and Adams, arXiv 1910.08475: warm start",
        arguments={"size": 2000, "epochs": 60},
    ),
    "cnn-fashion": Network(
        cnn, train_well, False, "trained on Fashion-MNIST",
        arguments={"source": "fashion", "size": 20_000, "epochs": 5},
    ),
    "vit-fashion": Network(
        vit, train_well, False, "trained on Fashion-MNIST",
        arguments={"source": "fashion", "size": 30_000, "epochs": 8},
    ),
    "vit-digits": Network(
        vit, train_well, False, "trained on MNIST digits",
        arguments={"source": "digits", "size": 4000, "epochs": 25},
    ),
    "lite0": Network(lite0, None, False, "ImageNet weights", IMAGENET),
    "lite0-as-is": Network(lite0, None, False, "ImageNet weights", IMAGENET),
}  # fmt: skip
