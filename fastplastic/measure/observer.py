"""Hooks on a live model that sum up what passes them; the model is never changed.

A tensor is read once: inside the hook that sees it, because an in-place activation function
overwrites the pre-activation right afterwards, or later where that is safe (`late.py`). Every hook
returns None. Gradients are seen by hooks on tensors, never by full backward hooks of modules, which
raise when an in-place operation follows.

Hooks that torch.compile traces put operators into its graph (`compiled.py`); all others are called
as they are.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from threading import RLock
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fastplastic.kernels import untraced
from fastplastic.measure.attention import projection
from fastplastic.measure.compiled import (
    ATTENTION,
    CALLS,
    break_graph,
    keep_address,
    run_as_is,
    traces_operator,
)
from fastplastic.measure.hooks import SiteCalls, SiteHooks, hook_gradient, in_backward
from fastplastic.measure.observation import CallCount, Observation, first_tensor, samples_of
from fastplastic.measure.operators import MODES, add_call
from fastplastic.measure.pace import Pace
from fastplastic.measure.padding import Tokens, padding_mask, tokens_of
from fastplastic.measure.positions import PositionSample
from fastplastic.measure.reader import Readers
from fastplastic.measure.scale import LossScale
from fastplastic.measure.slices import gradient_here, seen_here
from fastplastic.measure.slots import TensorRead
from fastplastic.measure.sums import DeviceSums, add_weights, reading
from fastplastic.measure.together import put_alone, put_together
from fastplastic.measure.traced import TracedReads
from fastplastic.measure.weight_gradients import gradients_of
from fastplastic.measure.what_is_read import what_is_read
from fastplastic.model import is_spread, mode_of, note_watcher
from fastplastic.processes import Processes
from fastplastic.stats import UnitStats, empty_table
from fastplastic.wiring import Argument, UnitGraph, UnitLayer


class Observer:
    """Sums up activations and gradients of the layers of a graph while the model runs.

    Args:
        model: The model; its forward pass is one step.
        graph: Its wiring.
        parameters: Whether to read weights and the gradients of every single backward pass too.
        gradients: Whether to read the gradients of activations.
        training: Measure only calls of the model that gradients are recorded for: no evaluation
            in between, no acting.
        every: Measure the first of every so many steps.
        scale: Returns the factor on the loss; None when there is none.
        sample: Called with what activations are read of: the layers, z without padding, its axis.
        positions: Picks the positions that are read; by default all are.
        together: The processes that share the model, each of which sees batches of its own.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: UnitGraph,
        *,
        parameters: bool = False,
        gradients: bool = True,
        training: bool = False,
        every: int = 1,
        scale: LossScale | None = None,
        sample: Callable[[Sequence[UnitLayer], Tensor, int], None] | None = None,
        positions: PositionSample | None = None,
        together: Processes | None = None,
    ) -> None:
        self.model, self.together = model, together
        self.paused = False
        self._what = what_is_read(model, graph, together, each=parameters)
        self._reads, self._weights = self._what.tensors, self._what.weights
        calls = SiteCalls(self._see_output, self._see_input, self._see_attention, self._note_run)
        noted, early = dict(graph.skipped), not self._what.group.alone
        self._site_hooks = SiteHooks(model, self._reads.sites, noted, calls, early=early)
        self._parameters, self._gradients, self._training = parameters, gradients, training
        self._every, self._pace = every, Pace(every)
        self._scale, self._sample, self._positions = scale, sample, positions or PositionSample()
        self._spread = any(map(is_spread, model.parameters()))
        # Gradient hooks run on threads of the autograd engine.
        self._lock = RLock()
        self._handles: list[RemovableHandle] = []
        # Whether the current step is measured, and whether its forward pass is on.
        self._measuring = self._running = False
        self._tokens: Tokens | None = None
        self._mask: Tensor | None = None
        self._traced = TracedReads(gradients, self._positions)
        self._readers = Readers(self._reads, self._weights, self._positions, self._lock, scale)
        what = model, self._weights, self._readers, self._see_parameter, self._lock
        self._weight_gradients = gradients_of(*what, reduced=together is not None or self._spread)
        self.reset()

    def __reduce__(self) -> tuple[Callable[[], "Observer"], tuple[()]]:
        # The hooks go along when a model is copied or pickled: the copy is not observed.
        return _idle_observer, ()

    def reset(self) -> None:
        """Forget everything seen, and start counting steps anew."""
        with self._lock, reading():
            self._total, self._copies = (empty_table(self._what.units) for _ in range(2))
            self._what.clear()
            self._weight_gradients.clear()
            self._readers.clear()
            self._pace.restart()
            self._positions.restart()
            self.calls, self._dropped = CallCount(), 0
            self._problems: dict[str, str] = {}
            self._unforeseen, self._summands = set[str](), set[str]()

    def attach(self) -> None:
        """Put the hooks on the model; does nothing when they are."""
        if self._handles:
            return
        run_as_is(*_ON_THE_WAY)
        # Before FSDP2 gathers weights: hooks go on the parts.
        begin = self.model.register_forward_pre_hook(
            self._on_begin, with_kwargs=True, prepend=self._spread
        )
        # Called after an exception too: what runs outside of the model's forward is not read.
        end = self.model.register_forward_hook(self._on_end, always_call=True)
        self._handles.extend((begin, end))
        self._site_hooks.put_on()
        self._prepare_tables()
        if self._parameters:
            self._weight_gradients.put_on()
        self._pace.attach(paused=self.paused)
        note_watcher(self, watches=True)

    def _prepare_tables(self) -> None:
        """Make the tables that compiled code adds to: one set, on the device of the model."""
        devices = {parameter.device for parameter in self.model.parameters()}
        if len(devices) == 1 and not (self._sample or self._positions.obstacle or self._what.alike):
            self._traced.sums = self._readers.on(devices.pop()).sums
            keep_address(self._traced.sums)

    def pause(self, paused: bool) -> None:
        """Measure nothing, or go on."""
        self.paused = paused
        self._pace.pause(paused, hooked=bool(self._handles))

    def detach(self) -> None:
        """Take all hooks off the model; what was seen is kept."""
        note_watcher(self, watches=False)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._site_hooks.take_off()
        self._pace.detach()
        self._weight_gradients.take_off()
        self._measuring = self._running = False
        self._tokens = self._mask = None

    def observation(self, gradients: Mapping[str, Tensor]) -> Observation:
        """Return what all processes have seen so far, and the weights as they are now.

        Args:
            gradients: {weight name: gradient} of the weights of which no gradient was seen, as far
                as they have one.
        """
        own = self.own_observation(gradients)
        return put_alone(own) if self.together is None else put_together(own, self.together)

    def own_observation(self, gradients: Mapping[str, Tensor]) -> Observation:
        """Return what this process has seen, to be put together with that of others."""
        with self._lock:
            with reading():
                self._weight_gradients.close()
            self._fold()
            table, copies = self._total.clone(), self._copies.clone()
            left = self._weights.of(self.model, but=self._weight_gradients.seen)
            add_weights(table, copies, self._weights, left, gradients)
            calls, pace, what = self.calls, self._pace, self._what
            return Observation(
                UnitStats(table, what.columns), frozenset(calls.modes), calls.samples, calls.steps,
                self._dropped, calls.masked, dict(self._problems), frozenset(self._unforeseen),
                pace.unseen, pace.stale, self._readers.lost, self._weight_gradients.copies(copies),
                group=what.group, alike=what.seen_alike, summands=frozenset(self._summands),
            )  # fmt: skip

    def _on_begin(self, _: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if torch.compiler.is_dynamo_compiling():
            if self.paused or self._every > 1:
                return
            if self._traced.sums is not None and self._scale is None:
                return self._trace_begin(self._traced.sums, args, kwargs)
            break_graph(self._positions.obstacle or CALLS)
        self._positions.check_eager(measured=self._every == 1 and not self.paused)
        self._begin(args, kwargs)

    def _trace_begin(self, sums: DeviceSums, args: tuple[Any, ...], kwargs: Any) -> None:
        """Let compiled code start a step."""
        self._measuring = self._running = self._pace.traced = True
        self._mask = padding_mask(self.model, kwargs)
        samples, kind = samples_of([*args, *kwargs.values()]), MODES.index(mode_of(self.model))
        add_call(sums.calls, samples, kind, self._mask)

    def _on_end(self, _: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if torch.compiler.is_dynamo_compiling():
            self._traced.finish()
            self._running, self._mask = False, None
        else:
            self._end(output)

    def _breaks(self, why: str) -> bool:
        """End the graph that is being compiled, unless nothing is measured in it."""
        if self.paused or self._every > 1:
            return False
        break_graph(why)
        return True

    @untraced
    def _begin(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Start a step: runs before the forward pass of the model."""
        # Another monitor, or a profile, traces the model: nothing runs.
        if self.paused or torch.compiler.is_exporting() or self._pace.recomputes():
            return
        if self._training and not torch.is_grad_enabled():
            self._running = False
            return
        with self._lock:
            self._measuring = self._running = self._pace.begin()
            if not self._measuring:
                self._site_hooks.take_off()
                return
            self._site_hooks.put_on()
            self._positions.begin()
            self._mask = padding_mask(self.model, kwargs)
            self._what.note_inputs([*args, *kwargs.values()])
            self._count_call(samples_of([*args, *kwargs.values()]), self._mask)
            with reading():
                self._weight_gradients.close(cleared=True)
            self._readers.begin(self.model.training)
            if self._parameters:
                self._weight_gradients.put_on()

    def _count_call(self, samples: int, mask: Tensor | None) -> None:
        mode = mode_of(self.model)
        if mask is not None and self._sample is None and self._readers.on(mask.device).late:
            # The host counts the call, and does not wait to know whether there is padding.
            self._tokens = tokens_of(mask, wait=False)
            self._readers.on(mask.device).sums.note_padding(mask)
            self.calls.add(samples, mode, masked=False)
            return
        self._tokens = None if mask is None else tokens_of(mask)
        self.calls.add(samples, mode, masked=self._tokens is not None)

    @untraced
    def _end(self, output: Any) -> None:
        # Of a graph that ended within the model.
        self._traced.finish()
        if not in_backward():
            if self._running:
                with self._lock:
                    self._readers.end_forward()
                self._pace.end(whole=output is not None and bool(self._reads.sites))
            elif not self.paused:
                self._pace.end_unmeasured()
            self._running = False

    def _see_output(
        self, reads: Sequence[TensorRead], _: nn.Module, args: tuple[Any, ...], output: Any
    ) -> None:
        if torch.compiler.is_dynamo_compiling() and self._trace(reads, output):
            return
        self._see(reads, output)

    def _see_input(
        self, reads: Sequence[TensorRead], _: nn.Module, args: tuple[Any, ...], kwargs: Any
    ) -> None:
        values = (*args, *kwargs.values())
        if torch.compiler.is_dynamo_compiling() and self._trace(reads, values):
            return
        self._see(reads, values)

    def _trace(self, reads: Sequence[TensorRead], values: Any) -> bool:
        """Put what is read into the graph that is being compiled; tell whether it could be."""
        if self.paused or self._every > 1 or not self._running:
            return True
        inside = traces_operator()
        if not self._traced.add(reads, first_tensor(values), self._mask, inside):
            return False
        if not inside:
            self._pace.passed = True
        return True

    def _see_attention(self, where: Argument, reads: Sequence[TensorRead], *call: Any) -> None:
        if torch.compiler.is_dynamo_compiling() and not self._breaks(ATTENTION):
            return
        self._pace.read_graph()
        self._see_projection(where, reads, *call)

    @untraced
    def _see_projection(
        self, where: Argument, reads: Sequence[TensorRead],
        attention: nn.MultiheadAttention, args: Any, kwargs: Mapping[str, Any], output: Any,
    ) -> None:  # fmt: skip
        again, result = in_backward(), first_tensor(output)
        self._pace.passed = True
        assert result is not None
        for read in reads if self._reads_now(again) else ():
            found = projection(attention, where, args, kwargs)
            if read.activations and not again:
                self._read_activations(read, found.values())
            if self._gradients and read.gradients is not None:
                hook = partial(self._see_gradient, read, self._tokens)
                found.hook_gradient(result, hook)

    def _note_run(self, name: str, *_: Any) -> None:
        if torch.compiler.is_dynamo_compiling():
            if not self._breaks(f"{name} ran, which is in no trace of the model"):
                return
        if self._running and not self.paused:
            self._unforeseen.add(name)

    @untraced
    def _see(self, reads: Sequence[TensorRead], values: Any) -> None:
        again, tensor = in_backward(), first_tensor(values)
        self._pace.passed = True
        for read in reads if self._reads_now(again) else ():
            here = seen_here(read, tensor)
            if tensor is None or isinstance(here, str):
                with self._lock:
                    self._problems.update(dict.fromkeys(read.layers, str(here)))
                continue
            own, values = here
            # What is recomputed was counted in the forward pass, but with reentrant checkpointing
            # only the recomputed tensors get a gradient.
            if own.activations and not again:
                self._read_activations(own, values)
            if self._gradients and own.gradients is not None and tensor.requires_grad:
                hook_gradient(tensor, partial(self._see_gradient, own, self._tokens))

    def _reads_now(self, again: bool) -> bool:
        """Tell whether what a module gets or returns counts, recomputed or for the first time."""
        return not self.paused and (self._measuring if again else self._running)

    def _read_activations(self, read: TensorRead, tensor: Tensor) -> None:
        with self._lock:
            reader = self._readers.on(tensor.device)
            if self._sample is None:
                reader.activations(read, tensor, self._tokens)
                return
            x, axis = self._positions.pick(tensor.detach(), read.axis, self._tokens)
            reader.read_activations(read, x, axis)
            self._sample(read.measured, x, axis)

    @untraced
    def _see_gradient(self, read: TensorRead, tokens: Tokens | None, gradient: Tensor) -> None:
        if self.paused or not self._handles:
            return
        values = gradient_here(read, gradient)
        with self._lock:
            if values is None:
                self._summands.update(read.layers)
            elif read.channels:
                self._readers.on(values.device).gradient(read, values, tokens)

    @untraced
    def _see_parameter(self, name: str, weight: nn.Parameter, gradient: Tensor) -> None:
        if self.paused:
            return
        with self._lock:
            if self._pace.gradient(torch._C._current_graph_task_id()):
                self._measuring = False
            self._weight_gradients.take(name, weight, gradient, measured=self._measuring)

    def _fold(self) -> None:
        """Add the sums since the last time to the total, and clear them."""
        with reading():
            total = self._total, self._copies
            self._dropped += self._readers.fold_into(total, self._reads, self.calls)


def _idle_observer() -> Observer:
    observer = Observer.__new__(Observer)
    observer._pace, observer._positions, observer._every = Pace(1), PositionSample(), 1
    observer._traced = TracedReads(False, observer._positions)
    observer.paused, observer._running = True, False
    return observer


# Hooks that compiled code calls on its way, or traces.
_ON_THE_WAY = (
    Observer._on_begin, Observer._on_end, Observer._see_output, Observer._see_input,
    Observer._see_attention, Observer._note_run,
)  # fmt: skip
