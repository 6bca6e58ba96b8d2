"""What was re-initialised in which step of a training."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastplastic.planning import Plan
from fastplastic.processes import Processes

# Settings whose resets take more than this share of the same again all failed in the thesis of
# Hernandez-Garcia (2026).
SAME_AGAIN = 0.9
# One unit may be dead for good: only where it happens so many times on end is anything said.
IN_A_ROW = 3
_ENOUGH = 10


@dataclass(frozen=True, eq=False, repr=False)
class Reset:
    """What was re-initialised in one step.

    Attributes:
        step: Number of the step of the optimizer, the first is 1.
        counts: Layer name -> number of units, or parameter name -> number of weights.
        units: Layer name -> the units, int64; none for single weights.
        scores: Layer name -> their scores, float64.
        overlap: Share of them that the last reset had taken, too; None for the first.
    """

    step: int
    counts: Mapping[str, int]
    units: Mapping[str, Tensor] = field(default_factory=dict)
    scores: Mapping[str, Tensor] = field(default_factory=dict)
    overlap: float | None = None

    def __repr__(self) -> str:
        again = "" if self.overlap is None else f", {self.overlap:.0%} of them again"
        what = "units" if self.units else "weights"
        layers = f"{len(self.counts)} layer{'s' * (len(self.counts) != 1)}"
        return f"Reset(step {self.step}: {self.count} {what} in {layers}{again})"

    @property
    def count(self) -> int:
        """Number of units, or of weights."""
        return sum(self.counts.values())

    def to_dict(self) -> dict[str, Any]:
        """Return it as values that `json.dumps` and `torch.save` take."""
        return {
            "step": self.step,
            "counts": dict(self.counts),
            "units": {name: units.tolist() for name, units in self.units.items()},
            "scores": {name: scores.tolist() for name, scores in self.scores.items()},
            "overlap": self.overlap,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Reset":
        """Return what `to_dict` gave."""
        return cls(
            values["step"],
            dict(values["counts"]),
            {n: torch.tensor(units, dtype=torch.int64) for n, units in values["units"].items()},
            {n: torch.tensor(own, dtype=torch.float64) for n, own in values["scores"].items()},
            values["overlap"],
        )


def chosen_of(plan: Plan) -> dict[str, Tensor]:
    """Return layer name -> units, or parameter name -> mask, of a plan."""
    return {**plan.units, **plan.masks}


def overlap(
    before: Mapping[str, Tensor] | None, plan: Plan, together: Processes | None
) -> float | None:
    """Return the share of what a plan chose that had been chosen before; None for nothing.

    Args:
        before: What `chosen_of` gave then.
        plan: What is chosen now.
        together: The processes that share the model, of whose weights each may choose a part.
    """
    counts = torch.zeros(2, dtype=torch.int64)
    for name, chosen in chosen_of(plan).items():
        same = None if before is None else before.get(name)
        part = plan.parts.get(name)
        # What processes have alike is counted by one of them.
        if plan.parts and not (part.first if part else together is None or together.rank == 0):
            continue
        if chosen.dtype == torch.bool:
            counts[0] += int(chosen.count_nonzero())
            if same is not None and same.shape == chosen.shape:
                counts[1] += int((chosen & same).count_nonzero())
        else:
            counts[0] += len(chosen)
            counts[1] += 0 if same is None else int(torch.isin(chosen, same).sum())
    if plan.parts and together is not None:
        together.add_(counts)
    total, again = counts.tolist()
    return again / total if before is not None and total else None


def takes_the_same(log: Sequence[Reset]) -> bool:
    """Tell whether the last resets took nearly the same, each as the one before it."""
    last = log[-IN_A_ROW:]
    same = [reset.overlap is not None and reset.overlap > SAME_AGAIN for reset in last]
    # Of a few units, those that are there to choose from may be the same by chance.
    return len(same) == IN_A_ROW and all(same) and sum(r.count for r in last) >= _ENOUGH
