"""Gradients of weights, as hooks see them, or as all processes have them.

Hooks of weights see the gradients of one process (DistributedDataParallel), or none at all (FSDP2).
What the optimizer is to see is in `.grad` when the backward pass has ended. Where gradients are
accumulated it is read again behind each pass, and only what was read last before the step of the
optimizer counts: the same whether every pass reduces or the last one alone (`no_sync`).
"""

from collections.abc import Callable, Iterator
from functools import partial
from threading import RLock
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from fastplastic.kernels import untraced
from fastplastic.measure.hooks import hook_gradient
from fastplastic.measure.observation import Copies
from fastplastic.measure.parameters import WeightReader
from fastplastic.measure.reader import Readers
from fastplastic.measure.sums import reading
from fastplastic.model import aligned, is_spread, local_of
from fastplastic.stats import ROW_STATISTICS, STATISTICS

# The end of a backward pass is put off so often: behind what the reduction puts off, which with
# DistributedDataParallel(static_graph=True) puts off its own end once more.
_PUT_OFF = 2
_SUM_ABS_DW = "sum_abs_dw"

# Called in each backward pass with the name of a weight, the weight and its gradient.
SeeGradient = Callable[[str, nn.Parameter, Tensor], None]


class WeightGradients:
    """Reads each gradient of a weight in its hook.

    Args:
        model: The model.
        weights: What is read of weights; those that are not among its parameters have no hook.
        readers: Read them.
        see: What hooks call; it calls `take` when the gradient counts.

    Attributes:
        seen: Names of the weights of which a gradient was read.
    """

    def __init__(
        self, model: nn.Module, weights: WeightReader, readers: Readers, see: SeeGradient
    ) -> None:
        self._model, self._weights, self._readers, self._see = model, weights, readers, see
        named = model.named_parameters(remove_duplicate=False)
        self._spread = {name for name, weight in named if is_spread(weight)}
        self._handles: dict[str, RemovableHandle] = {}
        self.seen: set[str] = set()

    def put_on(self) -> None:
        """Put hooks on the weights that learn now and have none."""
        named = dict(self._model.named_parameters(remove_duplicate=False))
        for name in self._weights.names:
            weight = named.get(name)
            if weight is None or not weight.requires_grad or name in self._handles:
                continue
            # What FSDP2 has gathered is another tensor, which goes away.
            if (name in self._spread) == is_spread(weight):
                self._handles[name] = self._hook(name, weight)

    def take_off(self) -> None:
        """Take all hooks off the weights."""
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()

    def clear(self) -> None:
        """Forget everything seen."""
        self.seen = set()

    def take(self, name: str, weight: nn.Parameter, gradient: Tensor, *, measured: bool) -> None:
        """Take a gradient that a hook was given.

        Args:
            name: Of the weight.
            weight: The weight.
            gradient: Its gradient.
            measured: Whether the backward pass is of a call that is measured.
        """
        if measured:
            self._readers.on(weight.device).weight(name, weight, gradient)
            self.seen.add(name)

    def close(self, *, cleared: bool = False) -> None:
        """Count what was read, and may be accumulated on.

        Args:
            cleared: Only where gradients have been cleared since, as behind a step that an
                optimizer did not make.
        """

    def copies(self, table: Tensor) -> Copies | None:
        """Return what is seen of weights that each process has whole; None for one process.

        Args:
            table: Their statistics.
        """
        return None

    def _hook(self, name: str, weight: nn.Parameter) -> RemovableHandle:
        return hook_gradient(weight, partial(self._see, name, weight))


class ReducedGradients(WeightGradients):
    """Reads weights and their gradients when a backward pass has ended.

    Args:
        model: The model.
        weights: What is read of weights.
        readers: Have the sums that are added to.
        see: What hooks call; it calls `take` for each gradient.
        lock: Held by whoever calls; taken at the end of backward passes.
    """

    def __init__(
        self, model: nn.Module, weights: WeightReader, readers: Readers, see: SeeGradient,
        lock: RLock,
    ) -> None:  # fmt: skip
        super().__init__(model, weights, readers, see)
        self._lock = lock
        self._parameters: dict[str, nn.Parameter] = {}
        self._tables: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self._optimizers: RemovableHandle | None = None
        self.clear()

    def put_on(self) -> None:
        """Put hooks on the weights that learn now and have none, and on all optimizers."""
        super().put_on()
        if self._optimizers is None:
            self._optimizers = register_optimizer_step_pre_hook(self._on_step)

    def take_off(self) -> None:
        """Take all hooks off."""
        super().take_off()
        if self._optimizers is not None:
            self._optimizers.remove()
            self._optimizers = None

    def clear(self) -> None:
        """Forget everything seen."""
        super().clear()
        self._steps = 0
        self._first: float | None = None
        # What was read, but may be accumulated on.
        self._open: dict[str, ReferenceType[Tensor]] = {}
        # What got a gradient in this backward pass, and what there was at its first hook.
        self._backward = -1
        self._new: set[str] = set()
        self._before: dict[str, tuple[int, int]] = {}

    def take(self, name: str, weight: nn.Parameter, gradient: Tensor, *, measured: bool) -> None:
        """Take note of a gradient: it is read when the backward pass has ended."""
        if not measured and not self._open:
            return
        backward = torch._C._current_graph_task_id()
        if backward != self._backward:
            self._backward = backward
            self._before = dict(self._gradients())
            self._put_off(_PUT_OFF)
        if measured or name in self._open:
            self._new.add(name)

    def close(self, *, cleared: bool = False) -> None:
        """Count what was read, and may be accumulated on."""
        if not self._open or (cleared and not self._cleared()):
            return
        for device, tables in self._tables.items():
            for total, step in zip(self._readers.on(device).sums.parameters, tables, strict=True):
                total += step
        if self._first is None:
            self._first = sum(map(self._size_of_copies, self._tables.values()))
        self.seen.update(self._open)
        self._open.clear()
        self._steps += 1

    def copies(self, table: Tensor) -> Copies | None:
        """Return what is seen of weights that each process has whole."""
        total = float(table[STATISTICS.index(_SUM_ABS_DW)].sum())
        return Copies(table, self._steps, self._first, total)

    def _hook(self, name: str, weight: nn.Parameter) -> RemovableHandle:
        self._parameters[name] = weight
        register: Callable[..., RemovableHandle] = weight.register_post_accumulate_grad_hook
        return register(lambda own: self._see(name, own, own.grad))

    def _size_of_copies(self, tables: tuple[Tensor, Tensor]) -> float:
        (rows, _), _ = self._weights.split(tables)
        return float(rows[ROW_STATISTICS.index(_SUM_ABS_DW)].sum())

    def _gradients(self) -> Iterator[tuple[str, tuple[int, int]]]:
        """Yield by name what changes when a gradient is written."""
        for name, weight in self._parameters.items():
            if weight.grad is not None:
                yield name, (id(weight.grad), weight.grad._version)

    def _put_off(self, times: int) -> None:
        engine: Any = torch.autograd.Variable._execution_engine
        engine.queue_callback(lambda: self._end(times))

    @untraced
    def _end(self, times: int) -> None:
        """End a backward pass, behind all else that was put off to its end."""
        if times:
            self._put_off(times - 1)
            return
        with self._lock, reading():
            # A weight that this process did not use has no hook called, but what others found.
            changed = {name for name, now in self._gradients() if self._before.get(name) != now}
            self._backward, self._before = -1, {}
            new, self._new = self._new, set()
            if new:
                self._read(new | changed)

    def _read(self, names: set[str]) -> None:
        """Read weights and gradients, those anew that were read before and may have changed."""
        self.close(cleared=True)
        weights: dict[torch.device, dict[str, Tensor]] = {}
        gradients: dict[torch.device, dict[str, Tensor]] = {}
        # In one order in all processes, where placing a gradient as its weight takes all of them.
        for name in sorted(names.union(self._open)):
            weight, gradient = self._parameters[name], self._parameters[name].grad
            # Gone where a hook made the step of the optimizer.
            if gradient is not None:
                self._open[name] = ref(gradient)
                own = gradient.to_dense() if gradient.is_sparse else gradient
                weights.setdefault(weight.device, {})[name] = local_of(weight)
                gradients.setdefault(weight.device, {})[name] = local_of(aligned(own, weight))
        for device in weights.keys() | self._tables.keys():
            if device not in self._tables:
                self._tables[device] = self._weights.new_tables(device)
            for table in self._tables[device]:
                table.zero_()
            if device in weights:
                self._weights.add(self._tables[device], weights[device], gradients[device])

    def _cleared(self) -> bool:
        """Tell whether any gradient that was read is no longer that of its weight."""
        now = {name: self._parameters[name].grad for name in self._open}
        return any(now[name] is None or now[name] is not own() for name, own in self._open.items())

    def _on_step(self, optimizer: Optimizer, *_: Any) -> None:
        with self._lock, reading():
            known = {id(self._parameters[name]) for name in self._open}
            groups = optimizer.param_groups if known else ()
            if any(id(weight) in known for group in groups for weight in group["params"]):
                self.close()


def gradients_of(
    model: nn.Module, weights: WeightReader, readers: Readers, see: SeeGradient, lock: RLock,
    *, reduced: bool,
) -> WeightGradients:  # fmt: skip
    """Return what reads gradients: behind the reduction, where processes train together.

    Args:
        model: The model.
        weights: What is read of weights.
        readers: Read them.
        see: What hooks call.
        lock: Held by whoever calls.
        reduced: Whether they do.
    """
    if reduced:
        return ReducedGradients(model, weights, readers, see, lock)
    return WeightGradients(model, weights, readers, see)
