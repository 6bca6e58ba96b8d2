"""The training loop: short, by timm's optimizer and schedule, to be taken into a script of yours.

Everything random in it is drawn from the seed and the epoch alone, so that two networks of one
architecture see the same batches in the same order with the same augmentation.
"""

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from hashlib import blake2b
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fastplastic.errors import InputError
from fastplastic.model import Batch, device_of, outputs_of, read_batches
from fastplastic.trials.settings import TrainSettings


@dataclass(frozen=True)
class Training:
    """How a run went.

    Attributes:
        steps: Updates that were made.
        diverged_at: Checkpoint at which the loss was no longer finite, or None.
        seconds: Time in the loop without that of the checkpoints.
    """

    steps: int
    diverged_at: int | None
    seconds: float


def train(
    model: nn.Module,
    loader: Any,
    settings: TrainSettings,
    *,
    seed: int,
    hold: Callable[[], None] | None = None,
    checkpoint: Callable[[int, float], None] = lambda step, loss: None,
) -> Training:
    """Train the model in place.

    Args:
        model: On its device.
        loader: Yields batches, and has a length; its order is drawn from torch's random state.
        settings: The budget.
        seed: Of the order of batches, of augmentation and of dropout.
        hold: Called after each update, to keep what must not learn.
        checkpoint: Called with the number of updates and the mean training loss since the last
            checkpoint, `settings.evals` times.
    """
    device, mixing = device_of(model), _mixing(settings, model)
    optimizer = _optimizer(model, settings)
    scheduler, epochs = _schedule(optimizer, settings, len(loader))
    scaler = torch.GradScaler(device.type, enabled=settings.amp and settings.amp_dtype == "float16")
    marks = checkpoints(epochs * len(loader), settings.evals)
    step = since = 0
    total = torch.zeros((), device=device)
    away, begun = 0.0, perf_counter()
    for epoch in range(epochs):
        seed_all(loader, seed, epoch)
        model.train()
        for batch in read_batches(loader, device):
            with precision(settings, device):
                loss = _loss(model, batch, settings, mixing)
            _update(model, loss, optimizer, scaler, settings.clip_grad)
            if hold is not None:
                hold()
            step, since, total = step + 1, since + 1, total + loss.detach()
            if scheduler is not None:
                scheduler.step_update(step)
            if step in marks:
                paused = perf_counter()
                mean = float(total) / since
                if not np.isfinite(mean):
                    return Training(step, step, paused - begun - away)
                checkpoint(step, mean)
                model.train()
                since, total = 0, torch.zeros((), device=device)
                away += perf_counter() - paused
    return Training(step, None, perf_counter() - begun - away)


def check_budget(settings: TrainSettings) -> None:
    """Try whether timm knows the optimizer and the schedule: InputError before anything slow."""
    settings.check()
    weight = nn.Linear(1, 1, device="meta")
    named: dict[str, tuple[str, Callable[[], object]]] = {
        "opt": ("timm.optim.list_optimizers()", lambda: _optimizer(weight, settings)),
        "sched": (
            "cosine, tanh, step, multistep, poly or none",
            lambda: _schedule(torch.optim.SGD(weight.parameters(), 0.1), settings, 10),
        ),
    }
    for name, (names, make) in named.items():
        try:
            make()
        # Optimizers refuse what they do not know in ways of their own.
        except Exception as error:
            reason = " ".join(str(error).split())[:120]
            raise InputError(
                f"{name} {getattr(settings, name)!r}: timm does not take it ({reason}), expected "
                f"one of {names}: correct it"
            ) from error


def _update(
    model: nn.Module,
    loss: Tensor,
    optimizer: torch.optim.Optimizer,
    scaler: torch.GradScaler,
    clip_grad: float | None,
) -> None:
    optimizer.zero_grad()
    torch.autograd.backward(scaler.scale(loss))
    if clip_grad is not None:
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), clip_grad)
    scaler.step(optimizer)
    scaler.update()


def _optimizer(model: nn.Module, settings: TrainSettings) -> torch.optim.Optimizer:
    optimizer: torch.optim.Optimizer = _timm().optim.create_optimizer_v2(
        model, opt=settings.opt, lr=settings.lr, weight_decay=settings.weight_decay,
        momentum=settings.momentum, layer_decay=settings.layer_decay,
    )  # fmt: skip
    return optimizer


def checkpoints(steps: int, evals: int) -> list[int]:
    """Return the updates after which the curve has a point, the last one among them."""
    return sorted({round(steps * (i + 1) / evals) for i in range(evals)} - {0})


def evaluate(model: nn.Module, loader: Iterable[Any], settings: TrainSettings) -> dict[str, float]:
    """Return {"accuracy": share of right answers, "loss": mean cross-entropy} in eval mode.

    An output that is not finite is a wrong answer. The random state is as before.
    """
    right = count = 0
    loss = 0.0
    device = device_of(model)
    model.eval()
    with torch.random.fork_rng(devices=[]), torch.no_grad(), precision(settings, device):
        for batch in read_batches(loader, device):
            outputs = outputs_of(model, batch).float()
            finite = outputs.isfinite().all(dim=1)
            right += int(((outputs.argmax(dim=1) == batch.targets) & finite).sum())
            loss += float(cross_entropy(outputs, batch.targets, reduction="sum"))
            count += len(outputs)
    if not count:
        raise InputError("there are no images to evaluate on, expected at least one")
    return {"accuracy": right / count, "loss": loss / count}


def precision(settings: TrainSettings, device: torch.device) -> AbstractContextManager[object]:
    """Return the context in which the model runs."""
    if not settings.amp:
        return nullcontext()
    return torch.autocast(device.type, getattr(torch, settings.amp_dtype))


def seed_all(loader: Any, seed: int, epoch: int) -> None:
    """Seed all that draws order and augmentation: torch, numpy, Python and the loader's own."""
    text = f"{seed}\0{epoch}".encode()
    number = int.from_bytes(blake2b(text, digest_size=4).digest(), "little")
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)
    for holder in (loader, getattr(loader, "sampler", None)):
        generator = getattr(holder, "generator", None)
        if isinstance(generator, torch.Generator):
            generator.manual_seed(number)


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Put the random states of Python, numpy and torch back at the end of the block."""
    python, array = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(array)


def _schedule(
    optimizer: torch.optim.Optimizer, settings: TrainSettings, updates: int
) -> tuple[Any, int]:
    timm = _timm()
    if not updates:
        raise InputError(
            "the training loader yields no batch: expected at least one: make batches smaller"
        )
    # timm counts its warm-up in whole updates.
    warmup = round(settings.warmup_epochs * updates) / updates
    scheduler, epochs = timm.scheduler.create_scheduler_v2(
        optimizer, sched=settings.sched, num_epochs=settings.epochs, min_lr=settings.min_lr,
        warmup_epochs=warmup, warmup_lr=settings.warmup_lr, step_on_epochs=False,
        updates_per_epoch=updates,
    )  # fmt: skip
    if scheduler is not None:
        scheduler.step_update(0)
    return scheduler, epochs


def _mixing(settings: TrainSettings, model: nn.Module) -> Any:
    if not (settings.mixup or settings.cutmix):
        return None
    timm = _timm()
    return timm.data.Mixup(
        mixup_alpha=settings.mixup, cutmix_alpha=settings.cutmix,
        label_smoothing=settings.smoothing, num_classes=int(getattr(model, "num_classes", 0)),
    )  # fmt: skip


def _loss(model: nn.Module, batch: Batch, settings: TrainSettings, mixing: Any) -> Tensor:
    if mixing is None:
        outputs = outputs_of(model, batch)
        return cross_entropy(outputs, batch.targets, label_smoothing=settings.smoothing)
    images, targets = mixing(batch.args[0], batch.targets)
    return cross_entropy(outputs_of(model, Batch((images,), {}, None, False)), targets)


def _timm() -> Any:
    """Return timm, loaded when first needed; its names are not exported for type checkers."""
    import timm.data
    import timm.optim
    import timm.scheduler

    return timm
