"""What an observer hands on, and how it reads what hooks are given."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fastplastic.measure.alike import SeenAlike
from fastplastic.measure.operators import MODES
from fastplastic.model import BatchGroup
from fastplastic.stats import UnitStats


@dataclass(frozen=True, eq=False)
class Copies:
    """What is seen of the weights that all processes have whole, and each reads.

    Attributes:
        table: float64 [statistics, units] on the CPU, rows as in `STATISTICS`.
        steps: How often their gradients were read.
        first: Sum of abs(dw) the first time; None before it.
        total: The same of all times.
    """

    table: Tensor
    steps: int
    first: float | None
    total: float


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
        unseen: Calls that ran in compiled code that hooks did not see, or not all of.
        stale: Whether code had been compiled before there were hooks.
        lost: Tensors that had been overwritten before they were read.
        copies: What `stats` leaves out, because all processes have seen the same; None for nothing.
        apart: Whether they have not: gradients differed, and are left out.
        group: The processes that share the batches of this one.
        alike: What all of them have alike, to be compared; None where this one is alone.
        summands: Names of layers of whose gradients each process of a group had but a summand.
    """

    stats: UnitStats
    modes: frozenset[str]
    samples: int
    steps: int
    dropped: int
    masked: bool
    problems: Mapping[str, str]
    unforeseen: frozenset[str]
    unseen: int
    stale: bool
    lost: int = 0
    copies: Copies | None = None
    apart: bool = False
    group: BatchGroup = field(default_factory=BatchGroup)
    alike: SeenAlike | None = None
    summands: frozenset[str] = frozenset()


@dataclass
class CallCount:
    """What is known of the calls that were measured; fields as in `Observation`."""

    steps: int = 0
    samples: int = 0
    modes: set[str] = field(default_factory=set)
    masked: bool = False

    def add(self, samples: int, mode: str, masked: bool) -> None:
        """Count a call."""
        self.steps += 1
        self.samples += samples
        self.modes.add(mode)
        self.masked |= masked

    def add_counted(self, counts: Tensor) -> None:
        """Add the calls that `add_call` counted."""
        steps, samples, masked, *modes = counts.tolist()
        self.steps += steps
        self.samples += samples
        self.masked |= masked > 0
        self.modes |= {mode for mode, number in zip(MODES, modes, strict=True) if number}


def first_tensor(values: Any) -> Tensor | None:
    """Return the first tensor in nested tuples and lists."""
    if isinstance(values, Tensor):
        return values
    nested = values if isinstance(values, (tuple, list)) else ()
    return next((tensor for tensor in map(first_tensor, nested) if tensor is not None), None)


def samples_of(values: Sequence[Any]) -> int:
    """Return the first dimension of the first tensor, 0 without one."""
    first = first_tensor(values)
    return first.shape[0] if first is not None and first.ndim else 0
