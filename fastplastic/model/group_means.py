"""Sums of gradients over processes of which some share batches."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from fastplastic.model.batch_groups import BatchGroup
from fastplastic.model.spread import is_spread, local_of
from fastplastic.processes import Processes

# What is computed twice from the same is mostly the same bits; a summand is not that close.
_SAME = 1e-5

# {parameter name: (elements of the part of a process, their sum of abs where they are whole)}.
Sizes = Mapping[str, tuple[int, float]]


def sizes_of(totals: Mapping[str, Tensor], group: BatchGroup) -> dict[str, tuple[int, float]]:
    """Return what the processes have to know of each other's sums."""
    return {name: _size(total, group) for name, total in totals.items()}


def _size(total: Tensor, group: BatchGroup) -> tuple[int, float]:
    compared = not group.alone and not is_spread(total)
    return local_of(total).numel(), float(total.double().abs().sum()) if compared else 0.0


def summands(known: Sequence[Sizes], group: BatchGroup) -> frozenset[str]:
    """Return the names of whole parameters whose sums those that share batches do not have alike.

    They have a summand each: the parameter stands among slices, and nobody adds them up.

    Args:
        known: `sizes_of` all processes.
        group: Of this one.
    """
    found = set()
    for ranks in group.every:
        for name in {name for rank in ranks for name in known[rank]}:
            sizes = [known[rank].get(name, (0, 0.0))[1] for rank in ranks]
            if max(sizes) - min(sizes) > _SAME * max(sizes):
                found.add(name)
    return frozenset(found)


def add_whole(total: Tensor, together: Processes, group: BatchGroup) -> None:
    """Add up what each process has whole over all groups, in place."""
    if not group.first:
        total.zero_()
    together.add_(total)


def sum_of_slices(total: Tensor, together: Processes, group: BatchGroup, most: int) -> Tensor:
    """Return the sum of slices over all groups: each place of a group by itself.

    Args:
        total: The slice of this process.
        together: All processes.
        group: Those that share the batches of this one.
        most: Elements of the largest slice.
    """
    found, size = total, total.numel()
    for place in range(len(group.ranks)):
        buffer = total.new_zeros(most)
        if place == group.place:
            buffer[:size] = total.reshape(-1)
        together.add_(buffer)
        if place == group.place:
            found = buffer[:size].view_as(total)
    return found
