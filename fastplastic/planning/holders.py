"""Who holds the weights that a plan chooses from: this process, or several with parts of each."""

from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from typing import TYPE_CHECKING

from torch import Tensor

from fastplastic.errors import InputError
from fastplastic.model import Part
from fastplastic.planning.request import Request
from fastplastic.processes import Processes, all_or_nothing, all_processes

if TYPE_CHECKING:
    from fastplastic.measure import Profile


@dataclass(frozen=True, eq=False)
class Holders:
    """The processes that hold the weights of a profile together.

    Attributes:
        together: The processes; None where this one has all of every weight.
        parts: Parameter name -> what this process has of it, of those that are cut.
    """

    together: Processes | None = None
    parts: Mapping[str, Part] = field(default_factory=dict)

    @classmethod
    def of(cls, profile: "Profile", granularity: str) -> "Holders":
        """Return who holds the weights that a plan of this granularity chooses from.

        Raises:
            InputError: The others are not there.
        """
        if granularity != "weight" or profile.weights is None or not profile.weights.parts:
            return cls()
        together = all_processes()
        if together is None:
            raise InputError(
                f"the profile holds parts of {len(profile.weights.parts)} weights, those of this "
                "process, expected all processes that hold them: call it in each, without alone()"
            )
        return cls(together, profile.weights.parts)

    def meeting(
        self, step: str, profile: "Profile", request: Request
    ) -> AbstractContextManager[None]:
        """Meet for a step, and let it end well in all processes or in none."""
        facts = {name: str(value) for name, value in asdict(request).items()}
        facts = {"the model": profile.fingerprint[:12], **facts}
        return all_or_nothing(self.together, step, lambda: facts)

    def part(self, name: str, weight: Tensor) -> Part:
        """Return the part of a weight that this process holds, and whether it counts it."""
        if name in self.parts:
            return self.parts[name]
        shape = tuple(weight.shape)
        # Each process has the same: the first one counts it.
        first = self.together is None or self.together.rank == 0
        return Part(shape, (0,) * len(shape), shape, first)

    def add(self, table: Tensor) -> Tensor:
        """Return the sums of an int64 table over all processes, on the CPU."""
        table = table.cpu()
        if self.together is not None:
            self.together.add_(table)
        return table

    def compare(self, what: str, entries: Collection[str]) -> None:
        """Refuse a list that is not the same in all processes."""
        if self.together is not None:
            digest = sha256("\n".join(entries).encode()).hexdigest()[:12]
            self.together.meet(self.together.step, {what: f"{len(entries)} ({digest})"})
