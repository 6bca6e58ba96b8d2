"""What several processes that train one model see of it, put together."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fastplastic.errors import InputError, NoBatchesError, ProcessError
from fastplastic.measure.observation import Copies, Observation
from fastplastic.model import Batch, Part, gathered_by_fsdp, is_spread, part_of
from fastplastic.processes import Processes
from fastplastic.stats import MAX_ROW, MIN_ROW, STATISTICS, UnitStats, merge_into
from fastplastic.wiring import UnitGraph, UnitLayer

# Gradients that were reduced are the same bits; those of different batches are not that close.
_SAME = 1e-6


def parts_of(
    model: nn.Module, together: Processes | None, *, each: bool = False
) -> tuple[dict[str, Part | None], frozenset[str]]:
    """Return what this process reads of weights, so that each element is read by one process.

    Args:
        model: The model.
        together: The processes that share it; None where this is the only one.
        each: Whether each process reads what all have whole, to be counted once in the end.

    Returns:
        {parameter name: the part that it reads}, None for nothing, of those not read whole; and the
        names of those that each process reads.

    Raises:
        InputError: A parameter is placed in a way that is not understood.
    """
    sharded = gathered_by_fsdp(model)
    parts: dict[str, Part | None] = {}
    copies = set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        part = part_of(name, parameter)
        if is_spread(parameter):
            _check_placed(name, parameter, together, fsdp=id(parameter) in sharded)
            mine = part.first
        elif each and together is not None:
            copies.add(name)
            mine = True
        else:
            # Each process has the same: the first one reads it.
            mine = together is None or together.rank == 0
        if not mine:
            parts[name] = None
        elif not part.whole:
            parts[name] = part
    return parts, frozenset(copies)


def _check_placed(name: str, parameter: Any, together: Processes | None, *, fsdp: bool) -> None:
    """Refuse what other processes do not have batches of their own for (tensor parallelism)."""
    size, mesh = together.size if together else 1, parameter.device_mesh
    cuts = sum(placement.is_shard() for placement in parameter.placements)
    if fsdp and cuts <= 1 and mesh.size() == size:
        return
    raise InputError(
        f"{name!r} is placed as {tuple(map(str, parameter.placements))} on a mesh of {mesh.shape}, "
        f"there are {size} processes, expected all of them to share it by fully_shard alone: "
        "profile before tensor parallelism is applied"
    )


def compare_traces(graph: UnitGraph, together: Processes | None) -> None:
    """Wait until all processes have traced the model, to the same.

    Raises:
        ProcessError: They have other layers, of which each would take the columns for its own.
    """
    if together is not None:
        said = hashlib.sha256("\n".join(map(_line, graph.layers)).encode()).hexdigest()
        together.meet(together.step, {"the trace with example_inputs": said[:12]})


def _line(layer: UnitLayer) -> str:
    """Return what has to be the same of a layer for its columns to be those of the same units."""
    readers = [(consumer.weight, consumer.column_dim) for consumer in layer.consumers]
    return str((layer.name, layer.n_units, layer.weight, layer.unit_dim, readers))


def put_together(observation: Observation, together: Processes) -> Observation:
    """Return what all processes have seen, the same in each.

    The table goes over the wire once: its sums are added up, minima and maxima compared.
    """
    table, copies = observation.stats.table, observation.copies
    nothing = torch.empty(0)
    own = replace(
        observation, stats=UnitStats(nothing, {}),
        copies=None if copies is None else replace(copies, table=nothing),
    )  # fmt: skip
    seen: list[Observation] = together.share(own)
    read = [one.copies for one in seen if one.copies is not None]
    apart = _differ(read)
    if copies is not None:
        if apart:
            _forget_gradients(copies.table)
        # Who has seen most speaks for all: others may have had no batch.
        most = max(range(len(read)), key=lambda rank: read[rank].steps)
        if together.rank == most:
            table = table.clone()
            merge_into(table, copies.table)
    return Observation(
        stats=UnitStats(_reduced(table, together), observation.stats.columns),
        modes=frozenset().union(*(one.modes for one in seen)),
        samples=sum(one.samples for one in seen),
        steps=sum(one.steps for one in seen),
        dropped=sum(one.dropped for one in seen),
        masked=any(one.masked for one in seen),
        problems={name: why for one in seen for name, why in one.problems.items()},
        unforeseen=frozenset().union(*(one.unforeseen for one in seen)),
        unseen=sum(one.unseen for one in seen),
        stale=any(one.stale for one in seen),
        lost=sum(one.lost for one in seen),
        apart=apart,
    )


def put_alone(observation: Observation) -> Observation:
    """Return what this process has seen, all in one table."""
    if observation.copies is None:
        return observation
    table = observation.stats.table.clone()
    merge_into(table, observation.copies.table)
    return replace(observation, stats=UnitStats(table, observation.stats.columns), copies=None)


def _reduced(table: Tensor, together: Processes) -> Tensor:
    extremes = torch.stack((table[MIN_ROW], -table[MAX_ROW]))
    together.least_(extremes)
    rows = [row for row in range(len(table)) if row not in (MIN_ROW, MAX_ROW)]
    sums = table[rows]
    together.add_(sums)
    table = torch.empty_like(table)
    table[rows], table[MIN_ROW], table[MAX_ROW] = sums, extremes[0], -extremes[1]
    return table


def _differ(read: Sequence[Copies]) -> bool:
    """Tell whether processes saw other gradients: they were not reduced when they were read."""
    first = [copies.first for copies in read if copies.first is not None]
    most = max((copies.steps for copies in read), default=0)
    total = [copies.total for copies in read if copies.steps == most]
    return any(abs(x - own[0]) > _SAME * abs(own[0]) for own in (first, total) for x in own)


def _forget_gradients(table: Tensor) -> None:
    for row, name in enumerate(STATISTICS):
        if "dw" in name:
            table[row] = 0


class Rounds:
    """Batches, for as long as any process has one.

    Args:
        batches: Those of this process.
        model: The model. Where its parameters are spread, all processes have to run it as often:
            who has no batch left runs an old one, which does not count.
        together: The processes; None where this is the only one.

    Attributes:
        spare: A batch of this process, or of another if it has none.

    Raises:
        InputError: There is none.
    """

    def __init__(
        self, batches: Iterator[Batch], model: nn.Module, together: Processes | None
    ) -> None:
        self._batches, self._together = batches, together
        self._all_run = any(map(is_spread, model.parameters()))
        try:
            self._first = next(batches, None)
        except Exception:
            if together is not None:
                together.share(None)
            raise
        having: list[bool | None] = [self._first is not None]
        if together is not None:
            having = together.share(having[0])
            _check_none_failed([rank for rank, has in enumerate(having) if has is None])
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
            if batch is not None:
                self.spare = batch
                yield batch, True
                batch = next(self._batches, None)
            elif self._all_run:
                yield self.spare, False

    def fail(self, error: Exception) -> None:
        """Tell the others, who wait for the next round, that it does not come to that here."""
        if self._together is not None and not isinstance(error, ProcessError):
            self._told(self._together, having=False, failed=True)

    def _any_has(self, batch: Batch | None) -> bool:
        if self._together is None:
            return batch is not None
        having, failed = self._told(self._together, having=batch is not None, failed=False)
        _check_none_failed(failed)
        return having

    @staticmethod
    def _told(together: Processes, *, having: bool, failed: bool) -> tuple[bool, list[int]]:
        """Tell whether there is a batch, and hear whether any has one and who failed."""
        said = torch.zeros(1 + together.size, dtype=torch.int64)
        said[0], said[1 + together.rank] = having, failed
        together.add_(said)
        return bool(said[0]), said[1:].nonzero().flatten().tolist()


def _check_none_failed(ranks: list[int]) -> None:
    if ranks:
        names = ", ".join(map(str, ranks))
        raise ProcessError(f"profile: process {names} failed: see the error there")
