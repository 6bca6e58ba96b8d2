"""Which batches a process reads where several of them work at one model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch.utils.data import BatchSampler, DistributedSampler, SequentialSampler

Item = TypeVar("Item")


@dataclass(frozen=True)
class Share:
    """Every n-th batch, from one on.

    Whole batches, the same as in one process, not a part of each: statistics of gradients are those
    of a mean over a batch, and BatchNorm in train mode measures its batch.

    Attributes:
        rank: Number of the process.
        size: How many there are.
    """

    rank: int = 0
    size: int = 1

    def numbers(self, batches: int) -> list[int]:
        """Return the numbers of this process's batches among so many."""
        return list(_EachOnce(batches, self))

    def has(self, number: int) -> bool:
        """Tell whether a batch is one of this process, where there may be any number of them."""
        return number % self.size == self.rank

    def batches(self, items: Sequence[Item], size: int) -> list[list[Item]]:
        """Return this process's batches of so many items; the last of all may be smaller."""
        all_batches = list(BatchSampler(SequentialSampler(items), size, drop_last=False))
        return [
            [items[i] for i in all_batches[number]] for number in self.numbers(len(all_batches))
        ]


WHOLE = Share()


class _EachOnce(DistributedSampler[int]):
    """PyTorch's own sampler, but each batch is read once.

    That one repeats some, so that all processes have as many: their images would count twice. A
    profile needs no equal numbers.
    """

    def __init__(self, batches: int, share: Share) -> None:
        numbers = range(batches)
        super().__init__(numbers, share.size, share.rank, shuffle=False)  # type: ignore[arg-type]
        self.total_size = batches
        self.num_samples = len(numbers[share.rank :: share.size])
