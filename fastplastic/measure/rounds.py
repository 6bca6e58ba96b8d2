"""The batches of a profile, in rounds that all processes make together."""

import hashlib
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from fastplastic.errors import InputError, NoBatchesError, ProcessError
from fastplastic.model import Batch, batch_group, is_spread
from fastplastic.processes import Processes

# Rounding may differ between devices of several kinds; losses of other batches, or of slices of
# the outputs, are not that close.
_SAME_LOSS = 1e-3


class Rounds:
    """Batches, for as long as any process has one.

    Args:
        batches: Those of this process.
        model: The model. Where its parameters are spread, all processes have to run it as often:
            who has no batch left runs an old one, which does not count.
        together: The processes; None where this is the only one.

    Attributes:
        group: Those that share the batches of this one.
        spare: A batch of this process, or of another if it has none.

    Raises:
        InputError: There is none, those that share batches have others, or a parameter is placed
            in a way that is not understood.
    """

    def __init__(
        self, batches: Iterator[Batch], model: nn.Module, together: Processes | None
    ) -> None:
        self._batches, self._together = batches, together
        self.group, self._round = batch_group(model, together), 0
        self._all_run = any(map(is_spread, model.parameters()))
        # Whether the model is run, and the others wait for what it sends.
        self._sending = False
        try:
            self._first = next(batches, None)
        except Exception:
            if together is not None:
                together.share(None)
            raise
        having: list[bool | None] = [self._first is not None]
        if together is not None:
            having = together.share(having[0])
            _check_none_failed([has is None for has in having])
        if not any(having):
            raise NoBatchesError("there are no batches, expected at least one: check the data")
        found = self._first
        if together is not None and not all(having):
            other = together.hear(found, having.index(True))
            found = other if found is None else found
        assert found is not None
        self.spare: Batch = found

    def __iter__(self) -> Iterator[tuple[Batch, bool]]:
        """Yield each batch, and whether it counts."""
        batch = self._first
        while self._any_has(batch):
            self._sending = self._all_run
            if batch is not None:
                self.spare = batch
                yield batch, True
                self._sending = False
                batch = next(self._batches, None)
            elif self._all_run:
                yield self.spare, False
            self._sending = False

    def fail(self, error: Exception) -> None:
        """Tell the others, who wait for the next round, that it does not come to that here.

        Where they wait for what the model sends they could not hear it, and this one would wait
        with them.
        """
        if self._together is None or isinstance(error, (ProcessError, _NotAlike)):
            return
        if self._sending:
            self._together.abandon()
        else:
            self._told(self._together, failed=True)

    def check_losses(self, total: float) -> None:
        """Refuse losses that those who share batches do not have alike.

        Args:
            total: Sum of the losses of this process.
        """
        if self._together is None or self.group.alone:
            return
        totals = self._together.share(total)
        for one, other in self._pairs():
            if abs(totals[one] - totals[other]) > _SAME_LOSS * abs(totals[one]):
                raise _NotAlike(
                    f"the losses of processes {one} and {other}, which share batches, add up to "
                    f"{totals[one]:.6g} and {totals[other]:.6g}, expected the same: gather what "
                    "the loss is of (output_layouts=Replicate()), and seed dropout alike in them"
                )

    def _pairs(self) -> Iterator[tuple[int, int]]:
        """Yield each process that shares batches with another, behind that one."""
        return ((ranks[0], rank) for ranks in self.group.every for rank in ranks[1:])

    def _any_has(self, batch: Batch | None) -> bool:
        if self._together is None:
            return batch is not None
        self._round += 1
        having, failed, digests = self._told(self._together, batch=batch)
        _check_none_failed(failed)
        for one, other in self._pairs():
            if digests[one] != digests[other]:
                self._refuse(one, other)
        return any(having)

    def _told(
        self, together: Processes, *, batch: Batch | None = None, failed: bool = False
    ) -> list[list[int]]:
        """Say which batch there is and whether this process failed, and hear the others.

        Returns:
            Of each process whether it has a batch, whether it failed, and the digest of its batch.
        """
        said = torch.zeros(3, together.size, dtype=torch.int64)
        digest = 0 if batch is None or self.group.alone else _digest(batch)
        said[:, together.rank] = torch.tensor([batch is not None, failed, digest])
        together.add_(said)
        found: list[list[int]] = said.tolist()
        return found

    def _refuse(self, one: int, other: int) -> None:
        groups = len(self.group.every)
        raise _NotAlike(
            f"processes {one} and {other} have different batches in round {self._round}, expected "
            "the same in those that share layers by tensor parallelism: shard the data over "
            f"{groups} {'groups' if groups > 1 else 'group'} of processes, not over single ones"
        )


class _NotAlike(InputError):
    """What those that share batches do not have alike, which all processes know."""


def _check_none_failed(failed: Sequence[object]) -> None:
    if any(failed):
        names = ", ".join(str(rank) for rank, one in enumerate(failed) if one)
        raise ProcessError(f"profile: process {names} failed: see the error there")


def _digest(batch: Batch) -> int:
    """Return a number for what is in a batch: 56 bits of a sha256."""
    found = hashlib.sha256()
    for tensor in batch.tensors():
        own = tensor.detach().cpu().contiguous()
        found.update(f"{tuple(own.shape)} {own.dtype}".encode())
        found.update(own.reshape(-1).view(torch.uint8).numpy().data)
    return int.from_bytes(found.digest()[:7])
