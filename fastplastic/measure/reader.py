"""Reads what hooks are given into the sums on one device: at once, or, on a GPU, many together."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from threading import RLock
from typing import Any

import torch
from torch import Tensor

from fastplastic.kernels import (
    activation_stats,
    backend,
    foreach_activation_stats,
    foreach_gradient_stats,
    gradient_stats,
    untraced,
)
from fastplastic.measure.late import LateReads, LateWeights, Waiting, at_once
from fastplastic.measure.observation import CallCount
from fastplastic.measure.padding import Tokens
from fastplastic.measure.parameters import WeightReader
from fastplastic.measure.positions import PositionSample
from fastplastic.measure.scale import LossScale
from fastplastic.measure.slots import TensorRead, TensorReads
from fastplastic.measure.sums import DeviceSums, reading
from fastplastic.stats import empty_table, merge_into


class Reader:
    """Adds to the sums of one device.

    Where kernels are launched, which costs more than most of them take, what hooks are given waits
    for the end of the forward or backward pass.

    Args:
        sums: The sums.
        positions: Picks the positions that are read.
        lock: Held by whoever calls; taken at the end of backward passes.

    Attributes:
        sums: The sums.
        late: Whether kernels are launched here, and what is read may wait.
        factor: The factor on the loss of the step.
    """

    def __init__(self, sums: DeviceSums, positions: PositionSample, lock: RLock) -> None:
        self.sums = sums
        self._positions, self._lock = positions, lock
        self._device = sums.activations.device
        self.late = backend(self._device) == "triton" and positions.limit is None
        self._on_gpu = self._device.type == "cuda"
        # Where the network frees what waits, that is at most this part of all that passes: of
        # activations at the peak of memory, of gradients when many activations are free again.
        self._activations = LateReads(self._read_late, _functions, share=1 / 8, keeps=True)
        self._gradients = LateReads(self._read_late_gradients, _none, share=1 / 2, keeps=False)
        self._weights = LateWeights(partial(sums.weights.add, sums.parameters))
        self._training: bool | None = None
        self.factor: float | Tensor = 1.0
        self._backward = -1
        # The stream of the step, and others that read in it.
        self._stream: Any = None
        self._others: set[Any] = set()

    @property
    def lost(self) -> int:
        """How many tensors had changed before they were read, and were not read."""
        return self._activations.lost + self._gradients.lost + self._weights.lost

    def begin(self, training: bool, scale: LossScale | None) -> None:
        """Begin a step."""
        # What a backward pass left that did not come to its end.
        self._end_backward()
        self._training = training
        self.factor = 1.0 if scale is None else scale(self._device)
        if self._on_gpu:
            self._stream = torch.cuda.current_stream(self._device)
            self._join()

    def activations(self, read: TensorRead, tensor: Tensor, tokens: Tokens | None) -> None:
        """Read pre-activations that a hook was given."""
        if not self.late:
            x, axis = self._positions.pick(tensor.detach(), read.axis, tokens)
            self.read_activations(read, x, axis)
        elif not self._waits() or not self._activations.take(read, self._training, tensor, tokens):
            self._read_late([at_once(read, tensor, tokens)])

    def read_activations(self, read: TensorRead, x: Tensor, axis: int) -> None:
        """Read pre-activations without padding at once."""
        for run in read.activations:
            size = run.stop - run.start
            part = x if size == read.channels else x.narrow(axis, run.start, size)
            out = self.sums.of_activations(run.slot, size)
            activation_stats(part, axis, run.activation, out=out)

    def gradient(self, read: TensorRead, gradient: Tensor, tokens: Tokens | None) -> None:
        """Read gradients of activations that a hook was given."""
        if self.late:
            if self._waits() and self._gradients.take(read, None, gradient, tokens):
                self._call_back()
            else:
                self._read_late_gradients([at_once(read, gradient, tokens)])
            return
        g, axis = self._positions.pick(gradient.detach(), read.axis, tokens)
        assert read.gradients is not None
        gradient_stats(g, axis, out=self.sums.of_gradients(read.gradients, read.channels))

    def weight(self, name: str, weight: Tensor, gradient: Tensor) -> None:
        """Read a weight and its gradient that a hook was given."""
        # Many weights are read faster by one call, on the CPU too.
        may = self._waits() or not self._on_gpu
        waits = may and self._weights.take(name, weight, gradient)
        self._call_back()
        if not waits:
            own = gradient.to_dense() if gradient.is_sparse else gradient
            self.sums.add_weight(name, weight.detach(), own.detach())

    def end_forward(self) -> None:
        """End a forward pass."""
        self._activations.finish()

    def settle(self) -> None:
        """Read all that waits."""
        with self._on_stream():
            self._activations.flush()
        self._end_backward()
        if self._on_gpu:
            self._join()
            torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def forget(self) -> None:
        """Drop all that waits."""
        for late in (self._activations, self._gradients, self._weights):
            late.forget()
            late.lost = 0

    def _waits(self) -> bool:
        """Tell whether anything may wait: not on another stream, not where a graph is captured."""
        if not self._on_gpu:
            return self.late
        stream = torch.cuda.current_stream(self._device)
        if stream != self._stream:
            # The tables are written to by both.
            stream.wait_stream(self._stream)
            self._others.add(stream)
            return False
        return self.late and not torch.cuda.is_current_stream_capturing()

    def _join(self) -> None:
        """Let the stream of the step wait for others that read in it."""
        for stream in self._others:
            self._stream.wait_stream(stream)
        self._others.clear()

    def _on_stream(self) -> AbstractContextManager[object]:
        """Launch on the stream on which what waits was made."""
        return torch.cuda.stream(self._stream) if self._on_gpu else nullcontext()

    def _call_back(self) -> None:
        """Have the end of this backward pass told."""
        backward = torch._C._current_graph_task_id()
        if backward != self._backward and backward != -1:
            self._backward = backward
            torch.autograd.Variable._execution_engine.queue_callback(self._end_backward)

    @untraced
    def _end_backward(self) -> None:
        with self._lock, reading(), self._on_stream():
            self._gradients.finish()
            self._weights.finish()

    def _read_late(self, waiting: Sequence[Waiting]) -> None:
        parts, axes, names, slots, masks = [], [], [], [], []
        for late in waiting:
            read: TensorRead = late.read
            x = late.tensor.detach()
            for run in read.activations:
                size = run.stop - run.start
                parts.append(x if size == read.channels else x.narrow(read.axis, run.start, size))
                axes.append(read.axis)
                names.append(run.activation)
                slots.append(run.slot)
                masks.append(_mask(late))
        out = self.sums.activations
        foreach_activation_stats(parts, axes, names, slots, out=out, masks=masks)

    def _read_late_gradients(self, waiting: Sequence[Waiting]) -> None:
        tensors = [late.tensor.detach() for late in waiting]
        axes = [late.read.axis for late in waiting]
        slots = [late.read.gradients for late in waiting]
        masks = [_mask(late) for late in waiting]
        foreach_gradient_stats(tensors, axes, slots, out=self.sums.gradients, masks=masks)


def _mask(late: Waiting) -> Tensor | None:
    """Return which positions of what is read count, None for all."""
    tokens: Tokens | None = late.more
    fits = tokens is not None and tokens.fit(late.tensor, late.read.axis)
    return tokens.counted if tokens is not None and fits else None


class Readers:
    """Readers of all devices, made when first needed.

    Args:
        reads: What is read of tensors.
        weights: What is read of weights.
        positions: Picks the positions that are read.
        lock: Held by whoever calls; taken at the end of backward passes.
        scale: Returns the factor on the loss; None when there is none.
    """

    def __init__(
        self,
        reads: TensorReads,
        weights: WeightReader,
        positions: PositionSample,
        lock: RLock,
        scale: LossScale | None,
    ) -> None:
        self._reads, self._weights, self._positions, self._lock = reads, weights, positions, lock
        self._scale = scale
        self._own: dict[torch.device, Reader] = {}
        self._training = True

    def __iter__(self) -> Iterator[Reader]:
        return iter(self._own.values())

    @property
    def lost(self) -> int:
        """How many tensors had changed before they were read, and were not read."""
        return sum(reader.lost for reader in self)

    def on(self, device: torch.device) -> Reader:
        """Return the reader of a device."""
        reader = self._own.get(device)
        if reader is None:
            with reading():
                scaled = self._scale is not None
                sums = DeviceSums.empty(self._reads, self._weights, device, scaled=scaled)
            reader = self._own[device] = Reader(sums, self._positions, self._lock)
            reader.begin(self._training, self._scale)
        return reader

    def begin(self, training: bool) -> None:
        """Begin a step."""
        self._training = training
        if self._scale is not None:
            with reading():
                self.settle()
        for reader in self:
            reader.begin(training, self._scale)

    def end_forward(self) -> None:
        """End a forward pass."""
        for reader in self:
            reader.end_forward()

    def settle(self) -> None:
        """Read all that waits, and end a step under a factor on the loss."""
        for reader in self:
            reader.settle()
        scaled = [(r.sums.scaled, r.factor) for r in self if r.sums.scaled is not None]
        counts = [sums.bad(factor) for sums, factor in scaled]
        for sums, factor in scaled:
            device = sums.dropped.device
            # A step is dropped on all devices, or on none.
            bad = torch.stack([count.to(device, non_blocking=True) for count in counts]).sum()
            sums.end_step(factor, bad)

    def fold_into(self, tables: tuple[Tensor, Tensor], reads: TensorReads, calls: CallCount) -> int:
        """Add the sums since the last time to statistics tables, and clear them.

        Args:
            tables: The two that `DeviceSums.fold_into` adds to.
            reads: What is read of tensors.
            calls: The calls that compiled code counted are added to these.

        Returns:
            How many steps were dropped since, under a factor on the loss.
        """
        self.settle()
        dropped = 0
        for sums in (reader.sums for reader in self):
            own = empty_table(tables[0].shape[1]), empty_table(tables[1].shape[1])
            sums.fold_into(*own, reads)
            for table, new in zip(tables, own, strict=True):
                merge_into(table, new)
            calls.add_counted(sums.calls)
            if sums.scaled is not None:
                dropped = max(dropped, int(sums.scaled.dropped))
            sums.clear()
        return dropped

    def clear(self) -> None:
        """Forget everything seen."""
        for reader in self:
            reader.forget()
            reader.sums.clear()


def _functions(read: TensorRead) -> Sequence[str]:
    return [run.activation for run in read.activations]


def _none(_: Any) -> Sequence[str]:
    return ()
