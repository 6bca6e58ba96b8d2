"""How long and by which rule the arms of a trial are trained: timm's names and defaults for timm's.

The numbers are those of a short fine-tuning run, the same for every arm.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any

from fastplastic.errors import InputError

# Field -> whether 0 is a value of it.
_NUMBERS = {
    "epochs": False, "evals": False, "profile_images": False, "lr": False, "weight_decay": True,
    "momentum": True, "warmup_epochs": True, "warmup_lr": True, "min_lr": True, "smoothing": True,
    "mixup": True, "cutmix": True,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """The budget of one fine-tuning run.

    Attributes:
        opt: Optimizer, as in `timm.optim.create_optimizer_v2`.
        lr: Learning rate at its highest.
        weight_decay: Weight decay; not for norms and biases, as in timm.
        momentum: Momentum of optimizers that have one.
        layer_decay: Factor of the learning rate from layer to layer, from the head down.
        sched: Schedule, as in `timm.scheduler.create_scheduler_v2`; it moves at every update.
        epochs: Passes over the training images.
        warmup_epochs: Epochs of linear warm-up, within `epochs`.
        warmup_lr: Learning rate at its start.
        min_lr: Learning rate at the end of the schedule.
        smoothing: Label smoothing.
        clip_grad: Largest norm of the gradient.
        mixup: Alpha of mixup; 0 is off.
        cutmix: Alpha of cutmix; 0 is off.
        amp: Train and evaluate in mixed precision.
        amp_dtype: "bfloat16" or "float16".
        evals: Checkpoints of the curve, spread evenly over the updates, beside the start.
        profile_images: Training images that are profiled.
        norms_first: Before all else, measure the statistics of BatchNorm anew on the training
            images (where there are any such layers): in training they are those of the batches,
            and a head that is fitted on others begins with a jump.
        probe_first: Fit the head before anything is measured, as behind a random head gradients
            are noise. False for a head that was trained on these classes.
    """

    opt: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.01
    momentum: float = 0.9
    layer_decay: float | None = None
    sched: str = "cosine"
    epochs: int = 5
    warmup_epochs: float = 0
    warmup_lr: float = 1e-5
    min_lr: float = 0.0
    smoothing: float = 0.0
    clip_grad: float | None = None
    mixup: float = 0.0
    cutmix: float = 0.0
    amp: bool = False
    amp_dtype: str = "bfloat16"
    evals: int = 10
    profile_images: int = 256
    norms_first: bool = True
    probe_first: bool = True

    def check(self) -> None:
        """Refuse numbers that nothing can be trained with: InputError."""
        for name, may_be_zero in _NUMBERS.items():
            value = getattr(self, name)
            if not isfinite(value) or value < 0 or (value == 0 and not may_be_zero):
                least = "0 or more" if may_be_zero else "more than 0"
                raise InputError(f"{name} {value!r}: expected {least}: correct it")
        for name in ("layer_decay", "clip_grad"):
            value = getattr(self, name)
            if value is not None and not (isfinite(value) and value > 0):
                raise InputError(f"{name} {value!r}: expected more than 0: correct it")
        if self.warmup_epochs >= self.epochs:
            raise InputError(
                f"warmup_epochs {self.warmup_epochs} of {self.epochs} epochs: expected fewer: "
                "train longer, or warm up shorter"
            )
        if self.smoothing >= 1:
            raise InputError(f"smoothing {self.smoothing}: expected less than 1: correct it")
        if self.amp_dtype not in ("bfloat16", "float16"):
            raise InputError(f"amp_dtype {self.amp_dtype!r}: expected bfloat16 or float16")

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as values that `json.dumps` takes."""
        return asdict(self)


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> Iterable[str]:
    """Yield "name is A, not B" for each entry that differs; nested ones by their path."""
    for name in {**found, **wanted}:
        one, other = found.get(name), wanted.get(name)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            yield from (f"{name}.{text}" for text in differences(one, other))
        elif one != other:
            yield f"{name} is {one!r} there, {other!r} here"
