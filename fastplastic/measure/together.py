"""What several processes that train one model see of it, put together."""

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from fastplastic.measure.alike import ACTIVATIONS, check_inputs, differing, forget
from fastplastic.measure.observation import Copies, Observation
from fastplastic.model import BatchGroup, Part, gathered_by_fsdp, is_spread, part_of
from fastplastic.processes import Processes
from fastplastic.stats import MAX_ROW, MIN_ROW, STATISTICS, UnitStats, merge_into
from fastplastic.wiring import UnitGraph, UnitLayer

# Gradients that were reduced are the same bits; those of different batches are not that close.
_SAME = 1e-6


def parts_of(
    model: nn.Module, together: Processes | None, group: BatchGroup, *, each: bool = False
) -> tuple[dict[str, Part | None], frozenset[str]]:
    """Return what this process reads of weights, so that each element is read by one process.

    Args:
        model: The model.
        together: The processes that share it; None where this is the only one.
        group: Those that share the batches of this one.
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
            mine = part.first
            # Who trains with tensor parallelism alone has copies of each slice, as of whole ones.
            if each and id(parameter) not in sharded and len(group.every) > 1:
                copies.add(name)
                mine = part.cut or group.first
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
    check_inputs([one.alike for one in seen], observation.group.every)
    speakers, apart = _speakers(seen)
    if copies is not None:
        if apart:
            _forget_gradients(copies.table)
        if together.rank in speakers:
            table = table.clone()
            merge_into(table, copies.table)
    table, columns = _reduced(table, together), observation.stats.columns
    problems, summands = _leave_out_other(table, columns, seen, observation.group)
    # Of those that share batches one counts them.
    counting = [one for one in seen if one.group.first]
    return Observation(
        stats=UnitStats(table, columns),
        modes=frozenset().union(*(one.modes for one in seen)),
        samples=sum(one.samples for one in counting),
        steps=sum(one.steps for one in counting),
        dropped=sum(one.dropped for one in counting),
        masked=any(one.masked for one in seen),
        problems={name: why for one in seen for name, why in one.problems.items()} | problems,
        unforeseen=frozenset().union(*(one.unforeseen for one in seen)),
        unseen=sum(one.unseen for one in counting),
        stale=any(one.stale for one in seen),
        lost=sum(one.lost for one in seen),
        apart=apart,
        summands=summands.union(*(one.summands for one in seen)),
    )


def _speakers(seen: Sequence[Observation]) -> tuple[set[int], bool]:
    """Return whose copies count, one for each slice, and whether any are not the same."""
    speakers, apart = set(), False
    for place in {one.group.place for one in seen}:
        read = {
            rank: one.copies
            for rank, one in enumerate(seen)
            if one.copies is not None and one.group.place == place
        }
        apart = apart or _differ(list(read.values()))
        if read:
            # Who has seen most speaks for all: others may have had no batch.
            speakers.add(max(read, key=lambda rank: read[rank].steps))
    return speakers, apart


def _leave_out_other(
    table: Tensor, columns: Mapping[str, slice], seen: Sequence[Observation], group: BatchGroup
) -> tuple[dict[str, str], frozenset[str]]:
    """Leave out of a table what those that share batches do not have alike.

    Returns:
        {layer name: why it is not measured}, and the names of layers without gradients.
    """
    problems, summands = {}, set()
    shared = next((ranks for ranks in group.every if len(ranks) > 1), ())
    for kind, layers in differing([one.alike for one in seen], group.every).items():
        for name in itertools.compress(columns, layers.tolist()):
            forget(table, kind, columns[name])
            if kind == ACTIVATIONS:
                problems[name] = (
                    f"its values differ between processes that share batches (as {shared[0]} and "
                    f"{shared[1]}), expected the same or a slice of channels in each: with "
                    "sequence parallelism, or random numbers of other seeds, they see others"
                )
            else:
                summands.add(name)
    return problems, frozenset(summands)


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
