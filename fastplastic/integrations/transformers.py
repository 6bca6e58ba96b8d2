"""A callback for the Trainer of Hugging Face's transformers."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fastplastic.errors import FileError, InputError, warn
from fastplastic.files import atomic_write
from fastplastic.integrations.follower import Follower, FollowSettings, example_of
from fastplastic.measure import Profile
from fastplastic.model import undisturbed
from fastplastic.training import Method, Recycler

_FILE = "plasticity.pt"


class PlasticityCallback(TrainerCallback):
    """Profile a model while a Trainer trains it, and re-initialise what no longer learns.

        trainer = Trainer(model, arguments, train_dataset=data)
        trainer.add_callback(PlasticityCallback(trainer, "redo", every=1000, freq=100))
        trainer.train()

    The figures of `integrations.loggers` go through `trainer.log`: they are in
    `trainer.state.log_history` and in all that the Trainer reports to (`report_to`). The process
    with rank 0 logs, and it alone profiles.

    Each checkpoint gets a file `plasticity.pt`, and `trainer.train(resume_from_checkpoint=...)`
    goes on to the same bits. It is looked for in the folder of the Trainer's own checkpoints; from
    another place, call `load(folder)` first. A search for hyperparameters keeps no such file.

    Layers without `requires_grad` (of LoRA, for instance) are profiled, never re-initialised.

    Args:
        trainer: The Trainer that it is added to.
        method: What to re-initialise, as for `Recycler`; None for nothing.
        freq: Profile each so many steps of the optimizer; None for never.
        example_inputs: What to trace the model with; by default two samples of the training data.
        layers: Also log the share of each layer.
        sync: Copies of the model in which the same elements are given the same values.
        seed: As for `Recycler`.
        options: `start_step` and `end_step`, before and after which nothing is done; with a method
            every field of `fastplastic.training.Method` that differs.

    Raises:
        InputError: An option is unknown or unusable. When the training begins: the parameters are
            sharded.
    """

    def __init__(
        self,
        trainer: Trainer,
        method: str | Method | None = None,
        *,
        freq: int | None = 100,
        example_inputs: Any = None,
        layers: bool = False,
        sync: Sequence[nn.Module] = (),
        seed: int = 0,
        **options: Any,
    ) -> None:
        if not isinstance(trainer, Trainer):
            raise InputError(
                f"the first argument is {trainer!r}, expected the Trainer: "
                "trainer.add_callback(PlasticityCallback(trainer, 'redo'))"
            )
        own = {"layers": layers, "sync": sync, "seed": seed}
        self._settings = FollowSettings.of(method, freq, options | own)
        self._trainer, self._example = trainer, example_inputs
        self._follower: Follower | None = None
        self._loaded: dict[str, Any] | None = None

    @property
    def recycler(self) -> Recycler | None:
        """What re-initialises; None before the training, and without a method."""
        return None if self._follower is None else self._follower.recycler

    @property
    def profile(self) -> Profile | None:
        """The last profile; None before the first."""
        return None if self._follower is None else self._follower.profile

    def load(self, folder: str | Path) -> None:
        """Go on from the state in the folder of a checkpoint, when the training begins.

        Raises:
            FileError: There is none, or it cannot be read.
        """
        self._loaded = _read(Path(folder) / _FILE)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Trace the model, and go on from a checkpoint where the Trainer does."""
        if self._follower is not None:
            self._follower.detach()
        model, trainer = kwargs["model"], self._trainer
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled or args.n_gpu > 1:
            raise InputError(
                "the Trainer splits or copies the model (FSDP, DeepSpeed or DataParallel), "
                "expected one whole model in each process: train with one, or with torchrun (DDP)"
            )
        # As every step of the Trainer does.
        model.train()
        example = self._example
        if example is None:
            example = _example(kwargs["train_dataloader"], model)
        self._follower = Follower(
            model, example, kwargs["optimizer"], self._settings, logs=state.is_world_process_zero
        )
        if state.global_step or self._loaded is not None:
            self._resume(args, state)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Log what the step has brought."""
        self._log(control)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the state beside the checkpoint."""
        folder = _checkpoint(args, state)
        if self._follower is None or not args.should_save or args.save_only_model:
            return
        # A search for hyperparameters saves elsewhere.
        if not state.is_hyper_param_search and folder.is_dir():
            own = {"mark": _mark(state), "state": self._follower.state_dict()}
            with atomic_write(folder / _FILE, force=True) as temporary:
                torch.save(own, temporary)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Log what is left, and take all hooks off the model."""
        self._log(control, rest=True)
        if self._follower is not None:
            self._follower.detach()

    def _log(self, control: TrainerControl, *, rest: bool = False) -> None:
        values = {} if self._follower is None else self._follower.take(rest=rest)
        if values and self._trainer.is_world_process_zero():
            # Whoever logs takes back that the Trainer itself is about to.
            due = control.should_log
            self._trainer.log(values)
            control.should_log = due

    def _resume(self, args: TrainingArguments, state: TrainerState) -> None:
        assert self._follower is not None
        found, self._loaded = self._loaded, None
        if found is None:
            path = _checkpoint(args, state) / _FILE
            found = _read(path) if path.is_file() else None
            # Another training may have left a checkpoint with this number.
            found = found if found is not None and found["mark"] == _mark(state) else None
        if found is not None:
            self._follower.restore(found["state"])
            return
        self._follower.start_at(state.global_step)
        warn(
            f"the checkpoint of step {state.global_step} has no {_FILE} in {args.output_dir}, so "
            "the plasticity callback begins anew with this step: where it lies in another folder, "
            "call load(folder) before trainer.train()"
        )


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"


def _mark(state: TrainerState) -> str:
    """Return what tells the checkpoint of one training from that of another."""
    text = json.dumps([state.global_step, state.log_history], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _read(path: Path) -> dict[str, Any]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load has no common base for what it raises
        raise FileError(
            f"{path}: cannot be read ({error}), expected a file of PlasticityCallback: choose a "
            "checkpoint that has one"
        ) from error
    if not isinstance(found, dict) or found.keys() != {"mark", "state"}:
        raise FileError(f"{path}: is no file of PlasticityCallback: choose another checkpoint")
    return found


def _example(loader: Any, model: nn.Module) -> Any:
    """Return two samples of the training data, drawn as if they had not been."""
    data = loader.dataset
    if not hasattr(data, "__getitem__") or not hasattr(data, "__len__"):
        raise InputError(
            f"the training data is a {type(data).__name__} that can only be run through, expected "
            "one with samples by number: give example_inputs, what the model is called with"
        )
    with undisturbed(model):
        batch = loader.collate_fn([data[index] for index in (0, len(data) - 1)])
    return example_of(batch, model)
