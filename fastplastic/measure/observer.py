"""Hooks on a live model that sum up what passes them; the model is never changed.

A tensor is read once, inside the hook that sees it: an in-place activation function overwrites the
pre-activation right afterwards. Every hook returns None. Gradients are seen by hooks on tensors,
never by full backward hooks of modules, which raise when an in-place operation follows.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from threading import RLock
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fastplastic.kernels import activation_stats, gradient_stats, untraced
from fastplastic.measure.attention import projection
from fastplastic.measure.padding import Tokens, unpadded, unpadded_tokens
from fastplastic.measure.parameters import WeightReader
from fastplastic.measure.slots import TensorRead, TensorReads
from fastplastic.measure.sums import DeviceSums, fold_weights
from fastplastic.model import mode_of
from fastplastic.stats import STATISTICS, UnitStats, columns_of, empty_table, merge_into
from fastplastic.wiring import Argument, UnitGraph, UnitLayer

_ROW = {name: row for row, name in enumerate(STATISTICS)}
_NONFINITE_GRADIENTS = [
    _ROW[name] for name in ("n_nonfinite_g", "n_nonfinite_dw", "n_nonfinite_dw_out")
]
_GRADIENT_COUNTS = [_ROW[name] for name in ("n_g", "n_dw", "n_dw_out")]
# How each sum of gradients grows with the scale of the loss.
_POWER_OF_SCALE = {
    "sum_abs_g": 1, "sum_sq_g": 2, "sum_abs_dw": 1, "sum_sq_dw": 2, "sum_abs_w_dw": 1,
    "sum_w_out_dw_out": 1,
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Observation:
    """What an observer has seen so far.

    Attributes:
        stats: The statistics of all layers.
        modes: "train", "eval" or "mixed", of every step.
        samples: Sum of the first dimension of the model's first input.
        steps: Forward passes measured.
        dropped: Steps without gradients, because they were not finite under a loss scale.
        masked: Whether padding was left out by an attention mask.
        problems: {layer name: why its hook could not read the tensor}.
        unforeseen: Names of weight layers that ran and are in no trace of the model.
    """

    stats: UnitStats
    modes: frozenset[str]
    samples: int
    steps: int
    dropped: int
    masked: bool
    problems: Mapping[str, str]
    unforeseen: frozenset[str]


def in_backward() -> bool:
    """Tell whether this thread is inside a backward pass, as in a recomputation of activations."""
    return bool(torch._C._current_graph_task_id() != -1)


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
        scale: Callable[[], float] | None = None,
        sample: Callable[[Sequence[UnitLayer], Tensor, int], None] | None = None,
    ) -> None:
        self.model = model
        self.paused = False
        self._columns = columns_of({layer.name: layer.n_units for layer in graph.layers})
        self._units = sum(layer.n_units for layer in graph.layers)
        self._weights = WeightReader(graph, self._columns, model)
        self._reads = TensorReads(graph, self._columns)
        self._untraced = [name for name, _ in graph.skipped]
        self._parameters, self._gradients, self._training = parameters, gradients, training
        self._every = every
        self._scale = scale
        self._sample = sample
        # Gradient hooks run on threads of the autograd engine.
        self._lock = RLock()
        self._handles: list[RemovableHandle] = []
        self._hooked: set[str] = set()
        # Whether the current step is measured, and whether its forward pass is on.
        self._measuring = self._running = False
        self._tokens: Tokens | None = None
        self._sums: dict[torch.device, DeviceSums] = {}
        self.reset()

    def __reduce__(self) -> tuple[Callable[[], "Observer"], tuple[()]]:
        # The hooks go along when a model is copied or pickled: the copy is not observed.
        return _idle_observer, ()

    def reset(self) -> None:
        """Forget everything seen, and start counting steps anew."""
        with self._lock:
            self._total = empty_table(self._units)
            # Weights whose gradient was seen.
            self._weights_seen: set[str] = set()
            for sums in self._sums.values():
                sums.clear()
            self._factor = 1.0
            self._calls = self._steps = self._samples = self._dropped = 0
            self._modes: set[str] = set()
            self._masked = False
            self._problems: dict[str, str] = {}
            self._unforeseen: set[str] = set()

    def attach(self) -> None:
        """Put the hooks on the model; does nothing when they are."""
        if self._handles:
            return
        begin = self.model.register_forward_pre_hook(self._begin, with_kwargs=True)
        # Called after an exception too: what runs outside of the model's forward is not read.
        end = self.model.register_forward_hook(self._end, always_call=True)
        self._handles.extend((begin, end))
        for (name, where), reads in self._reads.sites.items():
            module = self.model.get_submodule(name)
            if where == "output":
                hook = partial(self._see_output, reads)
                self._handles.append(module.register_forward_hook(hook))
            elif where != "input":
                hook = partial(self._see_attention, where, reads)
                self._handles.append(module.register_forward_hook(hook, with_kwargs=True))
            else:
                pre_hook = partial(self._see_input, reads)
                self._handles.append(module.register_forward_pre_hook(pre_hook, with_kwargs=True))
        for name, module in self.model.named_modules():
            if name in self._untraced:
                note = partial(self._note_run, name)
                self._handles.append(module.register_forward_pre_hook(note))

    def detach(self) -> None:
        """Take all hooks off the model; what was seen is kept."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._hooked.clear()
        self._measuring = self._running = False
        self._tokens = None

    def observation(self, gradients: Mapping[str, Tensor]) -> Observation:
        """Return what was seen so far, and the weights as they are now.

        Args:
            gradients: {weight name: gradient} of the weights of which no gradient was seen, as far
                as they have one.
        """
        with self._lock:
            self._fold()
            table = self._total.clone()
            self._read_weights(table, gradients)
            return Observation(
                UnitStats(table, self._columns), frozenset(self._modes), self._samples,
                self._steps, self._dropped, self._masked, dict(self._problems),
                frozenset(self._unforeseen),
            )  # fmt: skip

    def _read_weights(self, table: Tensor, gradients: Mapping[str, Tensor]) -> None:
        """Add the weights of which no gradient was seen to a statistics table."""
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        left = [name for name in self._weights.names if name not in self._weights_seen]
        with _reading():
            for device in {parameters[name].device for name in left}:
                here = {n: parameters[n] for n in left if parameters[n].device == device}
                sums = self._weights.new_tables(device)
                self._weights.add(sums, here, gradients)
                fold_weights(table, self._weights, sums)

    @untraced
    def _begin(self, _: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Start a step: runs before the forward pass of the model."""
        if self.paused or in_backward():
            return
        if self._training and not torch.is_grad_enabled():
            self._running = False
            return
        with self._lock:
            if self._scale is not None:
                self._fold()
            self._measuring = self._running = self._calls % self._every == 0
            self._calls += 1
            if not self._measuring:
                return
            self._steps += 1
            self._samples += _samples([*args, *kwargs.values()])
            self._modes.add(mode_of(self.model))
            self._tokens = unpadded_tokens(self.model, kwargs)
            self._masked |= self._tokens is not None
            self._factor = 1.0 if self._scale is None else self._scale()
            if self._parameters:
                self._hook_parameters()

    @untraced
    def _end(self, *_: Any) -> None:
        if not in_backward():
            self._running = False

    def _hook_parameters(self) -> None:
        named = dict(self.model.named_parameters(remove_duplicate=False))
        for name in self._weights.names:
            weight = named.get(name)
            # Looked at before every step: a parameter may be unfrozen in between.
            if weight is not None and weight.requires_grad and name not in self._hooked:
                self._hooked.add(name)
                hook = partial(self._see_parameter, name, weight)
                self._handles.append(_hook_gradient(weight, hook))

    @untraced
    def _see_output(
        self, reads: Sequence[TensorRead], _: nn.Module, args: tuple[Any, ...], output: Any
    ) -> None:
        self._see(reads, output)

    @untraced
    def _see_input(
        self, reads: Sequence[TensorRead], _: nn.Module, args: tuple[Any, ...], kwargs: Any
    ) -> None:
        self._see(reads, (*args, *kwargs.values()))

    @untraced
    def _see_attention(
        self, where: Argument, reads: Sequence[TensorRead],
        attention: nn.MultiheadAttention, args: Any, kwargs: Mapping[str, Any], output: Any,
    ) -> None:  # fmt: skip
        again = in_backward()
        result = _first_tensor(output)
        assert result is not None
        for read in reads if self._reads_now(again) else ():
            found = projection(attention, where, args, kwargs)
            if read.activations and not again:
                self._read_activations(read, found.values())
            if self._gradients and read.gradients is not None:
                hook = partial(self._see_gradient, read, self._tokens)
                found.hook_gradient(result, hook)

    @untraced
    def _note_run(self, name: str, *_: Any) -> None:
        if self._running and not self.paused:
            self._unforeseen.add(name)

    def _see(self, reads: Sequence[TensorRead], values: Any) -> None:
        again = in_backward()
        tensor = _first_tensor(values)
        for read in reads if self._reads_now(again) else ():
            if tensor is None or not self._fits(read, tensor):
                self._note_problem(read, tensor)
                continue
            # What is recomputed was counted in the forward pass, but with reentrant checkpointing
            # only the recomputed tensors get a gradient.
            if read.activations and not again:
                self._read_activations(read, tensor)
            if self._gradients and read.gradients is not None and tensor.requires_grad:
                _hook_gradient(tensor, partial(self._see_gradient, read, self._tokens))

    def _fits(self, read: TensorRead, tensor: Tensor) -> bool:
        inside = -tensor.ndim <= read.axis < tensor.ndim and tensor.is_floating_point()
        return inside and tensor.shape[read.axis] == read.channels

    def _reads_now(self, again: bool) -> bool:
        """Tell whether what a module gets or returns counts.

        Args:
            again: Whether it runs in a backward pass, where activations are recomputed.
        """
        return not self.paused and (self._measuring if again else self._running)

    def _note_problem(self, read: TensorRead, tensor: Tensor | None) -> None:
        found = "no tensor" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"
        text = f"its hook saw {found}, expected {read.channels} channels on axis {read.axis}"
        with self._lock:
            self._problems.update(dict.fromkeys(read.layers, text))

    def _read_activations(self, read: TensorRead, tensor: Tensor) -> None:
        with self._lock:
            x, axis = unpadded(tensor.detach(), read.axis, self._tokens)
            sums = self._sums_on(x.device)
            for run in read.activations:
                size = run.stop - run.start
                part = x if size == read.channels else x.narrow(axis, run.start, size)
                activation_stats(
                    part, axis, run.activation, out=sums.of_activations(run.slot, size)
                )
            if self._sample is not None:
                self._sample(read.measured, x, axis)

    @untraced
    def _see_gradient(self, read: TensorRead, tokens: Tokens | None, gradient: Tensor) -> None:
        if self.paused or not self._handles:
            return
        assert read.gradients is not None
        with self._lock:
            g, axis = unpadded(gradient.detach(), read.axis, tokens)
            out = self._sums_on(g.device).of_gradients(read.gradients, read.channels)
            gradient_stats(g, axis, out=out)

    @untraced
    def _see_parameter(self, name: str, weight: Tensor, gradient: Tensor) -> None:
        if self.paused or not self._measuring:
            return
        # Not from `.grad` when the backward pass is over: others may have added to it by then.
        with self._lock:
            self._sums_on(weight.device).add_weight(name, weight.detach(), _dense(gradient))
            self._weights_seen.add(name)

    def _sums_on(self, device: torch.device) -> DeviceSums:
        sums = self._sums.get(device)
        if sums is None:
            with _reading():
                sums = self._sums[device] = DeviceSums.empty(self._reads, self._weights, device)
        return sums

    def _fold(self) -> None:
        """Add the sums since the last time to the total, without the loss scale, and clear them."""
        with _reading():
            tables = []
            for sums in self._sums.values():
                table = empty_table(self._units)
                sums.fold_into(table, self._reads)
                sums.clear()
                tables.append(table)
            bad = sum(float(table[_NONFINITE_GRADIENTS].sum()) for table in tables)
            drop = self._scale is not None and bad > 0
            self._dropped += drop
            for table in tables:
                merge_into(self._total, self._unscaled(table, drop))

    def _unscaled(self, table: Tensor, drop: bool) -> Tensor:
        for name, power in _POWER_OF_SCALE.items():
            table[_ROW[name]] /= self._factor**power
        if drop:
            rows = [*_NONFINITE_GRADIENTS, *_GRADIENT_COUNTS]
            rows += [_ROW[name] for name in _POWER_OF_SCALE]
            table[rows] = 0
        return table


def _idle_observer() -> Observer:
    observer = Observer.__new__(Observer)
    observer.paused = True
    return observer


@contextmanager
def _reading() -> Iterator[None]:
    """Compute without a graph, on tensors that can be written to later."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def _hook_gradient(tensor: Tensor, hook: Callable[[Tensor], None]) -> RemovableHandle:
    register: Callable[[Callable[[Tensor], None]], RemovableHandle] = tensor.register_hook
    return register(hook)


def _first_tensor(values: Any) -> Tensor | None:
    """Return the first tensor in nested tuples and lists."""
    if isinstance(values, Tensor):
        return values
    nested = values if isinstance(values, (tuple, list)) else ()
    return next((tensor for tensor in map(_first_tensor, nested) if tensor is not None), None)


def _samples(values: Sequence[Any]) -> int:
    first = _first_tensor(values)
    return first.shape[0] if first is not None and first.ndim else 0


def _dense(gradient: Tensor) -> Tensor:
    return gradient.detach().to_dense() if gradient.is_sparse else gradient.detach()
