"""A callback for the Trainer of Lightning."""

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import nn
from torch.optim import Optimizer

from fastplastic.errors import InputError
from fastplastic.integrations.follower import Follower, FollowSettings, example_of
from fastplastic.measure import Profile
from fastplastic.training import Method, Recycler


class LightningPlasticity(Callback):
    """Profile a module while Lightning trains it, and re-initialise what no longer learns.

        trainer = Trainer(callbacks=[LightningPlasticity("redo", every=1000, freq=100)])
        trainer.fit(module, loader)

    The figures of `integrations.loggers` go through `log_dict` (`trainer.callback_metrics`, where
    other callbacks look), and to every logger of the Trainer under the number of the step, however
    rarely it logs otherwise (`log_every_n_steps`). The process with rank 0 logs, and it alone
    profiles. The state is in the checkpoints of the Trainer, and `trainer.fit(ckpt_path=...)` goes
    on to the same bits.

    Args:
        method: What to re-initialise, as for `Recycler`; None for nothing.
        freq: Profile each so many steps of the optimizer; None for never.
        part: Name of the module that `training_step` calls, such as "model" for `self.model(x)`;
            "" for the LightningModule itself, `self(x)`.
        example_inputs: What to trace it with; by default two samples of the first batch.
        layers: Also log the share of each layer.
        sync: Copies of the model in which the same elements are given the same values.
        seed: As for `Recycler`.
        options: `start_step` and `end_step`, before and after which nothing is done; with a method
            every field of `fastplastic.training.Method` that differs.

    Raises:
        InputError: An option is unknown or unusable. When the training begins: there is no such
            part, no optimizer or several train it, or its parameters are sharded.
    """

    def __init__(
        self,
        method: str | Method | None = None,
        *,
        freq: int | None = 100,
        part: str = "",
        example_inputs: Any = None,
        layers: bool = False,
        sync: Sequence[nn.Module] = (),
        seed: int = 0,
        **options: Any,
    ) -> None:
        own = {"layers": layers, "sync": sync, "seed": seed}
        self._settings = FollowSettings.of(method, freq, options | own)
        self._part, self._example = part, example_inputs
        self._follower: Follower | None = None
        self._following = False
        self._loaded: Mapping[str, Any] = {}

    @property
    def recycler(self) -> Recycler | None:
        """What re-initialises; None before the training, and without a method."""
        return None if self._follower is None else self._follower.recycler

    @property
    def profile(self) -> Profile | None:
        """The last profile; None before the first."""
        return None if self._follower is None else self._follower.profile

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Trace the module with the first batch, and go on from a checkpoint if there is one."""
        if self._following:
            return
        if isinstance(trainer.strategy, (DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy)):
            raise InputError(
                f"strategy {type(trainer.strategy).__name__} shards the parameters, expected one "
                "whole model in each process: train with one process, or with strategy='ddp'"
            )
        model = _part_of(pl_module, self._part)
        example = example_of(batch, model) if self._example is None else self._example
        optimizer = _optimizer_of(trainer.optimizers, model, self._part)
        self._follower = Follower(
            model, example, optimizer, self._settings, logs=trainer.is_global_zero
        )
        self._following = True
        if self._loaded:
            self._follower.restore(self._loaded)
            self._loaded = {}
        elif trainer.global_step:
            self._follower.start_at(trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log what the step has brought."""
        values = {} if self._follower is None else self._follower.take()
        if values:
            # The loggers get it below: here they would in some steps only.
            pl_module.log_dict(values, logger=False, rank_zero_only=True)
            self._write(trainer, values)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log what is left, and take all hooks off the module."""
        if self._follower is not None:
            self._write(trainer, self._follower.take(rest=True))
        self._detach()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Take all hooks off the module, and say what a user of Lightning can do."""
        self._detach()
        if isinstance(exception, InputError) and "was not called" in str(exception):
            exception.add_note(
                "LightningPlasticity(part='model') measures what training_step calls as "
                "self.model(x)"
            )

    def state_dict(self) -> dict[str, Any]:
        """Return what later steps depend on."""
        return dict(self._loaded) if self._follower is None else self._follower.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave, when the training begins."""
        self._loaded = state_dict

    def _write(self, trainer: Trainer, values: Mapping[str, float]) -> None:
        for logger in trainer.loggers if values and trainer.is_global_zero else ():
            logger.log_metrics(dict(values), step=trainer.global_step)

    def _detach(self) -> None:
        self._following = False
        if self._follower is not None:
            self._follower.detach()


def _part_of(module: LightningModule, name: str) -> nn.Module:
    try:
        found: nn.Module = module.get_submodule(name)
    except AttributeError:
        names = ", ".join(part for part, _ in module.named_children())
        raise InputError(
            f"part {name!r} is no module of {type(module).__name__}, expected one such as {names}"
        ) from None
    return found


def _optimizer_of(optimizers: Sequence[Optimizer], model: nn.Module, part: str) -> Optimizer:
    """Return the optimizer that trains a model; InputError unless it is one."""
    weights = {id(weight) for weight in model.parameters()}
    found = [
        optimizer
        for optimizer in optimizers
        if any(
            id(weight) in weights for group in optimizer.param_groups for weight in group["params"]
        )
    ]
    if len(found) != 1:
        raise InputError(
            f"{len(found)} optimizers train part {part!r}, expected one: give the part that one of "
            "them trains"
        )
    return found[0]
