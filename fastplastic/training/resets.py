"""What was re-initialised in which step of a training."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastplastic.planning import Plan

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


def overlap(before: Mapping[str, Tensor] | None, now: Mapping[str, Tensor]) -> float | None:
    """Return the share of what `chosen_of` gave now that it had given before; None for nothing."""
    again = total = 0
    for name, chosen in now.items():
        same = None if before is None else before.get(name)
        if chosen.dtype == torch.bool:
            total += int(chosen.count_nonzero())
            again += 0 if same is None else int((chosen & same).count_nonzero())
        else:
            total += len(chosen)
            again += 0 if same is None else int(torch.isin(chosen, same).sum())
    return again / total if before is not None and total else None


def takes_the_same(log: Sequence[Reset]) -> bool:
    """Tell whether the last resets took nearly the same, each as the one before it."""
    last = log[-IN_A_ROW:]
    same = [reset.overlap is not None and reset.overlap > SAME_AGAIN for reset in last]
    # Of a few units, those that are there to choose from may be the same by chance.
    return len(same) == IN_A_ROW and all(same) and sum(r.count for r in last) >= _ENOUGH
