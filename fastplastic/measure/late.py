"""Reads that wait, so that many tensors are read by one launch on a GPU.

A hook only notes what it was given. That is right where z is still there when it is read: nothing
wrote to the tensor, or only the activation function did, in place, and z is saved for its backward
pass, or reading f(z) by f gives what reading z gives. So the first time a tensor is read at once,
and watched to the end of the pass; from then on it waits if z was there. Each time that is looked
at again before it is read: what is gone against all expectation is not read but counted as lost,
and never waits again.

Tensors that wait are kept alive. Where the network keeps them anyway that costs nothing; of others
the bytes are counted, and all is read when there are too many.
"""

from collections import deque
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

# Bytes that may wait in any case.
LEAST = 64 << 20
# Functions with f(f(z)) = f(z), which are flat at f(z) where they are at z, by the name of the node
# that an in-place call leaves in the autograd graph; and functions whose node keeps z.
_IDEMPOTENT = {
    "relu": "ReluBackward0",
    "relu6": "HardtanhBackward0",
    "hardtanh": "HardtanhBackward0",
}
_SAVES = {
    "silu": "SiluBackward0",
    "mish": "MishBackward0",
    "hardswish": "HardswishBackward0",
    "hardsigmoid": "HardsigmoidBackward0",
}


def _saves_plainly() -> bool:
    """Tell whether tensors are saved as they are, not packed by hooks that offload or recompute."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return top is not None and top(True) is None


class Waiting(NamedTuple):
    """A tensor that waits.

    Attributes:
        read: What reads it.
        case: The same, with what decides how the network treats the tensor.
        tensor: As a hook was given it.
        version: How often it had been written to then.
        node: The node of the autograd graph that had made it.
        plain: Whether the graph saved tensors as they are then.
        more: What else is needed to read it.
    """

    read: Any
    case: Hashable
    tensor: Tensor
    version: int
    node: Any
    plain: bool
    more: Any

    def found(self, functions: Sequence[str]) -> Tensor | None:
        """Return what gives, read now, what reading the tensor then gave; None if nothing does.

        Args:
            functions: By which it is read.
        """
        writes = self.tensor._version - self.version
        if writes == 0:
            return self.tensor
        node = self.tensor.grad_fn
        # A write that gradients are not recorded of leaves no node of its own.
        if writes > 1 or node is None or node is self.node or not functions:
            return None
        name = node.name()
        if all(_IDEMPOTENT.get(function) == name for function in functions):
            return self.tensor
        if self.plain and all(_SAVES.get(function) == name for function in functions):
            saved: Tensor = node._saved_self  # type: ignore[attr-defined]
            return saved if saved.shape == self.tensor.shape else None
        return None


def _noted(read: Any, case: Hashable, tensor: Tensor, more: Any) -> Waiting:
    plain = _saves_plainly()
    return Waiting(read, case, tensor, tensor._version, tensor.grad_fn, plain, more)


def at_once(read: Any, tensor: Tensor, more: Any) -> Waiting:
    """Return what is read now."""
    return Waiting(read, None, tensor, 0, None, False, more)


class LateReads:
    """What waits to be read, of one kind, on one device.

    Args:
        read: Reads some that wait by one launch.
        functions: Returns by which activation functions one reads, none for gradients.
        share: Part of the bytes of the last pass that may wait.
        keeps: Whether to find out what the network keeps anyway.

    Attributes:
        lost: How often a tensor was not read because it had changed.
    """

    def __init__(
        self,
        read: Callable[[Sequence[Waiting]], None],
        functions: Callable[[Any], Sequence[str]],
        *,
        share: float,
        keeps: bool,
    ) -> None:
        self._read, self._functions, self._share, self._keeps = read, functions, share, keeps
        # Whether a tensor may wait, and whether the network keeps it; unknown if missing.
        self._waits: dict[Hashable, bool] = {}
        self._kept: dict[Hashable, bool] = {}
        self._waiting: list[Waiting] = []
        self._watched: deque[Waiting] = deque()
        self._bytes = self._passed = self._watched_bytes = 0
        self._limit: float = LEAST
        self.lost = 0

    def take(self, read: Any, mode: Hashable, tensor: Tensor, more: Any = None) -> bool:
        """Let a tensor wait; False where it must be read at once.

        Args:
            read: What reads it, each time anew.
            mode: What decides how the network treats it, beside whether gradients are recorded.
            tensor: As a hook was given it.
            more: What else is needed to read it.
        """
        case = (read, mode, tensor.requires_grad)
        waits = self._waits.get(case)
        if waits:
            self._waiting.append(_noted(read, case, tensor, more))
            if not self._kept.get(case, False):
                self._bytes += tensor.nbytes
                if self._bytes > self._limit:
                    self.flush()
            return True
        if waits is None and not tensor.is_inference():
            self._watch(_noted(read, case, tensor, more))
        return False

    def flush(self) -> None:
        """Read all that waits."""
        waiting, self._waiting, self._bytes = self._waiting, [], 0
        if not waiting:
            return
        there, gone = [], []
        for w in waiting:
            found = w.found(self._functions(w.read))
            if found is None:
                gone.append(w)
            else:
                there.append(w._replace(tensor=found))
        self._passed += sum(w.tensor.nbytes for w in there)
        self.lost += len(gone)
        self._waits.update((w.case, False) for w in gone)
        if there:
            self._read(there)

    def finish(self) -> None:
        """End a pass: read all that waits, and learn from it."""
        self._judge(0)
        weak_reference: Any = StorageWeakRef
        unknown = {}
        if self._keeps and torch.is_grad_enabled():
            unknown = {
                w.case: weak_reference(w.tensor.untyped_storage())
                for w in self._waiting
                if w.case not in self._kept
            }
        self.flush()
        self._kept.update((case, not ref.expired()) for case, ref in unknown.items())
        if self._passed:
            self._limit = max(LEAST, self._share * self._passed)
        self._passed = 0

    def forget(self) -> None:
        """Drop all that waits or is watched, unread."""
        self._waiting.clear()
        self._watched.clear()
        self._bytes = self._passed = self._watched_bytes = 0

    def _watch(self, waiting: Waiting) -> None:
        self._watched.append(waiting)
        self._watched_bytes += waiting.tensor.nbytes
        # What was just made may be written to next: the last two are kept in any case.
        while self._watched_bytes > LEAST and len(self._watched) > 2:
            self._judge(len(self._watched) - 1)

    def _judge(self, left: int) -> None:
        """Say of the oldest that are watched, but so many, whether they may wait from now on."""
        while len(self._watched) > left:
            watched = self._watched.popleft()
            self._watched_bytes -= watched.tensor.nbytes
            there = watched.found(self._functions(watched.read)) is not None
            self._waits[watched.case] = there and self._waits.get(watched.case, True)


class LateWeights:
    """Gradients of weights that wait to the end of their backward pass; nothing is kept alive.

    That is right where a gradient becomes the `.grad` of its weight, as it does where there was
    none before, and nothing writes to it or to the weight until the pass is over.

    Args:
        read: Reads weights and gradients, by name, by one launch.
    """

    def __init__(self, read: Callable[[dict[str, Tensor], dict[str, Tensor]], None]) -> None:
        self._read = read
        self._waits: dict[str, bool] = {}
        self._waiting: list[_Weight] = []
        self._watched: list[_Weight] = []
        self.lost = 0

    def take(self, name: str, weight: Tensor, gradient: Tensor) -> bool:
        """Let a gradient wait; False where it must be read at once."""
        if weight.grad is not None or gradient.is_sparse:
            return False
        waits = self._waits.get(name)
        if waits is not False:
            versions = weight._version, gradient._version
            entry = _Weight(name, weight, gradient.data_ptr(), *versions)
            (self._waiting if waits else self._watched).append(entry)
        return bool(waits)

    def finish(self) -> None:
        """End a backward pass: read all that waits, and learn from it."""
        for watched in self._watched:
            gradient = watched.weight.grad
            self._waits[watched.name] = gradient is not None and watched.same(gradient)
        self._watched.clear()
        waiting, self._waiting = self._waiting, []
        weights, gradients = {}, {}
        for entry in waiting:
            gradient = entry.weight.grad
            if gradient is not None and entry.same(gradient):
                weights[entry.name], gradients[entry.name] = entry.weight, gradient
            else:
                self._waits[entry.name] = False
                self.lost += 1
        if weights:
            self._read(weights, gradients)

    def forget(self) -> None:
        """Drop all that waits or is watched, unread."""
        self._waiting.clear()
        self._watched.clear()


class _Weight(NamedTuple):
    name: str
    weight: Tensor
    address: int
    version: int
    gradient_version: int

    def same(self, gradient: Tensor) -> bool:
        versions = self.weight._version, gradient._version
        address = gradient.data_ptr()
        return (address, *versions) == (self.address, self.version, self.gradient_version)
