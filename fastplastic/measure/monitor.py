"""Watch a model while it is trained: the statistics of a profile, from the user's own loop."""

from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import nn

from fastplastic.errors import InputError
from fastplastic.graph import build_graph
from fastplastic.measure.meeting import MonitorMeeting, SeenHere
from fastplastic.measure.observer import Observer
from fastplastic.measure.positions import PositionSample
from fastplastic.measure.record import Profile
from fastplastic.measure.run import assemble
from fastplastic.measure.scale import LossScale
from fastplastic.model import check_built, check_unwrapped


class Scaler(Protocol):
    """What torch.amp.GradScaler offers."""

    def get_scale(self) -> float:
        """Return the factor on the loss."""


class Monitor:
    """Measure the units of a model over steps of a training loop, and leave the model as it is.

    A step is one call of the model. While attached (in a `with` block, or between `attach` and
    `detach`), activations are read in forward passes, gradients of activations and of weights in
    the backward passes that follow. Gradients of weights are those of each single backward pass:
    `.grad`, and what clips, scales or accumulates it, is neither read nor changed. Mean abs(dw) is
    therefore a mean over steps, where `profile` has abs of the mean gradient. With gradient
    accumulation each micro-batch is a step, and a loss divided by their number has gradients as
    much smaller.

        with Monitor(model, images[:2], every=10) as monitor:
            train_one_epoch(model)
        monitor.compute().totals

    In a model that is compiled (torch.compile) after the monitor is attached, the statistics are
    operators of the compiled graph, without a graph break (torch 2.14 and newer; an older one
    breaks it, and with fullgraph=True says why). With `every` above 1, the steps that are measured
    run eagerly and all others as they are compiled without a monitor, whenever that was; of calls
    that are made inside of a compiled function, those with a backward pass count. Calls that
    compiled code ran past the hooks are never left out silently: `compute` raises.

    Where processes train one model together (DistributedDataParallel around it, or `fully_shard`),
    each makes a monitor of its own and measures its own batches; `compute` gives in all of them the
    profile of all batches. Gradients of activations are those of the loss of each process, a mean
    over its batch. Gradients of weights are those that the processes have together, as the
    optimizer is to see them but for what clips or unscales them: where they are accumulated, one
    for each step of the optimizer.

    With activation checkpointing, what is recomputed is not counted twice. With an
    `attention_mask` argument, padding is left out.

    Args:
        model: The model that the loop calls; for a wrapped one (DistributedDataParallel), the
            module inside.
        example_inputs: A tensor, a tuple of positional or a mapping of keyword arguments to trace
            the model with.
        every: Measure the first of every so many steps.
        sample_positions: Read activations and gradients of large tensors at so many positions,
            drawn at random in each step, instead of all; weights are read whole. A position is a
            pixel, a token, a sample of a linear layer. Tensors of up to 3 times as many positions
            are read whole, as picking would take longer: up to 64 times where units do not lie
            side by side (NCHW). What is drawn depends on `torch.initial_seed()` and the step.
            Means are unbiased, with a standard error of sqrt((1 - k / N) / k) of the spread for k
            of N positions in a step; each step counts by the positions that were read of it.
            Minimum, maximum and range are bounds, and a unit that is active at a share p of the
            positions seems dead or frozen with probability (1 - p)^n where n of them were read:
            the notes of the profile say so. Compiled models need `every` above 1.
        grad_scale: The factor on the loss: a number, a function that returns it, or a GradScaler.
            Gradients are divided by it, and those of a step that are not finite (which a
            GradScaler skips) are dropped and counted in the notes.

    Raises:
        InputError: `every` or `sample_positions` is not a positive integer, or `grad_scale` not a
            positive number, or a parameter or buffer has no values yet (lazy, or on the meta
            device), or the model is a wrapper, or placed in a way that is not understood.
        ProcessError: The processes have different models or options, or one is gone.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        *,
        every: int = 1,
        sample_positions: int | None = None,
        grad_scale: float | Callable[[], float] | Scaler | None = None,
    ) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise InputError(
                f"every is {every!r}, expected a positive integer: use 1 for each step"
            )
        self._seed = torch.initial_seed()
        self._positions = PositionSample(sample_positions, self._seed)
        check_unwrapped(model, "Monitor")
        check_built(model, spread=True)
        self._model = model
        scale = _scale_function(grad_scale)
        options = {
            "every": every,
            "sample_positions": sample_positions,
            "scaled": scale is not None,
        }
        self._meeting = MonitorMeeting(model, options)
        self._graph = self._meeting.traced(partial(build_graph, model, example_inputs))
        self._observer = Observer(
            model, self._graph, parameters=True, every=every, scale=scale,
            positions=self._positions, together=self._meeting.processes,
        )  # fmt: skip

    def __enter__(self) -> "Monitor":
        self.attach()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.detach()

    def attach(self) -> None:
        """Put the hooks on the model; what was seen before is kept."""
        self._observer.attach()

    def detach(self) -> None:
        """Take all hooks off the model; `compute` still works."""
        self._observer.detach()

    def pause(self) -> "Pause":
        """Stop measuring until `resume`, or to the end of `with monitor.pause():`."""
        self._observer.pause(True)
        return Pause(self)

    def resume(self) -> None:
        """Measure again after `pause`."""
        self._observer.pause(False)

    def reset(self) -> None:
        """Forget what was seen and start anew."""
        self._observer.reset()

    def compute(self) -> Profile:
        """Return the profile of what was seen since the start or the last `reset`.

        Where processes train together all of them call it, and each gets the same; within
        `fastplastic.alone()` it is of what this process has seen.

        Raises:
            InputError: No layer was measured, or compiled code ran some calls past the hooks, or
                one process alone asks for the weights that others have parts of.
            ProcessError: Another process is elsewhere, failed or is gone.
        """
        seen = self._meeting.gather(self._seen)
        notes = self._positions.notes(seen.largest)
        return assemble(self._model, self._graph, seen.observation, seed=seen.seed, notes=notes)

    def _seen(self) -> SeenHere:
        # Weights without any gradient so far are read as they are now.
        own = self._observer.own_observation({})
        return SeenHere(own, self._seed, self._positions.largest)


class Pause:
    """Ends a pause of a monitor when its `with` block ends."""

    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor

    def __enter__(self) -> Monitor:
        return self._monitor

    def __exit__(self, *_: object) -> None:
        self._monitor.resume()


def _scale_function(scale: object) -> LossScale | None:
    if scale is None:
        return None
    if isinstance(scale, torch.amp.GradScaler):
        # Its factor stays on the device: the host would wait for `get_scale`.
        return lambda device: scale.scale(torch.ones((), device=device))
    read = getattr(scale, "get_scale", scale)
    if isinstance(read, (int, float)) and not isinstance(read, bool):
        number = _check_scale(float(read))
        return lambda _: number
    if not callable(read):
        raise InputError(f"grad_scale is {scale!r}, expected a number, a function or a GradScaler")
    return lambda _: _check_scale(float(read()))


def _check_scale(value: float) -> float:
    if not 0 < value < float("inf"):
        raise InputError(f"grad_scale is {value}, expected a positive number: check the scaler")
    return value
