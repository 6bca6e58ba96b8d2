"""Apply a plan to a model: the only code that writes to weights, buffers and optimizer state."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from numbers import Integral

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastplastic._apply import Memory, Undo, Writes, apply
from fastplastic._columns import column_norms, reader_of
from fastplastic._optimizer_state import OptimizerState
from fastplastic._report import ReinitReport, Written
from fastplastic.checkpoint import fingerprint
from fastplastic.errors import FingerprintError, InputError
from fastplastic.initializers import Initializer, Target, make_initializer
from fastplastic.laws import normal
from fastplastic.planner import GRANULARITIES, Plan
from fastplastic.writes import (
    Draw,
    Elements,
    FillWrite,
    Region,
    RowWrite,
    Tensors,
    Where,
    column_region,
    merged,
    norm_writes,
    row_writes,
    selected_elements,
    selected_rows,
)

OUTGOING = ("zero", "small", "fresh", "keep")
# Norm of a small outgoing column, as a share of the median of the others.
_SMALL = 0.02

__all__ = ["OUTGOING", "ReinitReport", "Written", "reinit_"]


def reinit_(
    model: nn.Module,
    plan: Plan,
    *,
    init: str = "default",
    outgoing: str = "zero",
    optimizer: Optimizer | None = None,
    reset_steps: bool = False,
    seed: int = 0,
) -> ReinitReport:
    """Re-initialise the units of a plan in place: all of them, or none if anything fails.

    For each unit: fresh incoming rows and biases (of coupled rows too), norm channels set to gamma
    1, beta 0, running mean 0 and running variance 1, and the outgoing columns as asked. A unit with
    outgoing weights of zero has no effect on the network until it is trained. After Sokar et al.
    (ReDo), arXiv 2302.12902, and Dohare et al., Nature 2024; "keep" after GraMa, arXiv 2505.24061.

    Args:
        model: The model that was profiled, or one with the same parameters.
        plan: What `fastplastic.plan` chose.
        init: Law of the fresh rows: "default" (the library's own), "kaiming_uniform",
            "kaiming_normal", "xavier_uniform", "trunc_normal" or "empirical" (see `initializers`).
        outgoing: What becomes of the outgoing columns. "zero": the unit has no effect, and the
            first gradient to its incoming weights is 0. "small": a random direction with 0.02 of
            the median norm of the other columns, in use against that. "fresh": drawn anew. "keep".
        optimizer: The optimizer that trains the model, if it has started: what it remembers of each
            weight that is written (momentum, mean squares) begins anew. Else old momentum moves
            fresh weights.
        reset_steps: Also let its counter of steps begin anew, for each tensor that is written, as
            Adam corrects its means by it.
        seed: Any integer. Fresh values depend on it, the parameter's name and the row alone; the
            global random state is neither read nor changed.

    Raises:
        FingerprintError: The plan was made for a model with other parameters.
        FileError: The plan does not fit the model or itself (edited by hand).
        InputError: An argument is unknown, or a weight cannot be written: shared between layers,
            transformed before use, not floating-point, not loaded. The optimizer is none, or not
            that of the model.
    """
    _check_choices(plan, outgoing, seed)
    initializer = make_initializer(init, model)
    tensors = Tensors(model)
    state = None if optimizer is None else OptimizerState(optimizer, model)
    _check_fingerprint(model, plan)
    if plan.granularity == "unit":
        writes = _unit_writes(model, plan, tensors, initializer, outgoing)
    else:
        writes = _weight_writes(plan, tensors, initializer)
    written = _count(tensors, writes.places)
    memory = _Memory.of(state, writes.places, written, reset_steps)
    undo = Undo()
    try:
        apply(tensors, writes, memory.writes, seed, undo)
    except BaseException:  # also KeyboardInterrupt and MemoryError
        undo()
        raise
    return ReinitReport(
        count=plan.count,
        layers=plan.counts,
        init=init,
        outgoing=outgoing,
        seed=int(seed),
        written=(*written, *memory.written),
        notes=(*initializer.notes(), *memory.notes),
    )


def _unit_writes(
    model: nn.Module, plan: Plan, tensors: Tensors, initializer: Initializer, outgoing: str
) -> Writes:
    rows = selected_rows(plan)
    fresh = [write for name in rows for write in row_writes(tensors, plan.wiring[name], rows[name])]
    fills = list(_norms(tensors, plan, rows))
    columns = list(merged(_columns(tensors, plan, rows))) if outgoing != "keep" else []
    if outgoing == "zero":
        # After the norms: a column of zeros stays so even in a row drawn afresh.
        fills += [FillWrite(region, 0.0) for region in columns]
        columns = []
    return Writes(
        fresh=[Draw(write.region, initializer(_target(tensors, write))) for write in fresh],
        fills=fills,
        columns=[_column_draw(tensors, model, place, outgoing, initializer) for place in columns],
    )


def _weight_writes(plan: Plan, tensors: Tensors, initializer: Initializer) -> Writes:
    layers = {layer.weight: layer for layer in plan.wiring.values()}
    chosen = selected_elements(tensors, plan)
    targets = (
        Target(part.name, tensors[part.name], layers.get(part.name), mask=part.mask)
        for part in chosen
    )
    return Writes(
        [Draw(part, initializer(target)) for part, target in zip(chosen, targets, strict=True)]
    )


def _check_choices(plan: Plan, outgoing: str, seed: int) -> None:
    if outgoing not in OUTGOING:
        raise InputError(f"outgoing {outgoing!r} is unknown, expected one of {', '.join(OUTGOING)}")
    if not isinstance(seed, Integral):
        raise InputError(f"seed {seed!r} is not usable, expected an integer")
    if plan.granularity not in GRANULARITIES:
        raise InputError(
            f"granularity {plan.granularity!r} is unknown, expected 'unit' or 'weight'"
        )
    if plan.granularity == "weight" and outgoing != OUTGOING[0]:
        raise InputError(
            f"outgoing {outgoing!r} is for units, expected none for single weights: leave it out"
        )


def _check_fingerprint(model: nn.Module, plan: Plan) -> None:
    found = fingerprint(model)
    if found != plan.fingerprint:
        raise FingerprintError(
            f"the plan is for the model with fingerprint {plan.fingerprint[:12]}, this one has "
            f"{found[:12]}, expected the same parameter names, shapes and dtypes: "
            "profile and plan this model"
        )


def _norms(tensors: Tensors, plan: Plan, rows: dict[str, Tensor]) -> Iterator[FillWrite]:
    for name in rows:
        for norm in plan.wiring[name].norms:
            yield from norm_writes(tensors, plan.wiring[name], norm, rows[name])


def _columns(tensors: Tensors, plan: Plan, rows: dict[str, Tensor]) -> Iterator[Region]:
    """Yield the outgoing columns of the units."""
    inner = _inner_layers(plan)
    for name in rows:
        for consumer in plan.wiring[name].consumers:
            if consumer.name not in inner[name]:
                yield column_region(tensors, plan.wiring[name], consumer, rows[name])


def _column_draw(
    tensors: Tensors, model: nn.Module, region: Region, outgoing: str, initializer: Initializer
) -> Draw:
    if outgoing == "fresh":
        return Draw(region, initializer(reader_of(model, region, tensors[region.name])))
    norms = column_norms(region, tensors[region.name])
    median = float(norms.median()) if len(norms) else 0.0
    if not math.isfinite(median):
        raise InputError(
            f"{region.name!r} has columns that are not finite, expected numbers: choose another "
            "outgoing"
        )
    return Draw(region, normal(0.0, 1.0), _SMALL * median)


def _inner_layers(plan: Plan) -> dict[str, set[str]]:
    """Return layer -> layers whose rows make units together with its own.

    A depthwise filter reads the unit that it belongs to: that column is the unit's own fresh row.
    """
    inner: dict[str, set[str]] = {}
    for name in plan.units:
        group = {name, *(member.name for member in plan.wiring[name].coupled)}
        for member in group:
            inner.setdefault(member, set()).update(group)
    return inner


def _target(tensors: Tensors, write: RowWrite) -> Target:
    name = write.region.name
    return Target(name, tensors[name], write.layer, rows=write.rows)


def _count(tensors: Tensors, places: Sequence[Where]) -> tuple[Written, ...]:
    counted = (_count_one(tensors, name, parts) for name, parts in _by_name(places).items())
    return tuple(written for written in counted if written.elements)


def _regions(places: Sequence[Where]) -> list[Region]:
    return [place for place in places if isinstance(place, Region)]


def _by_name(places: Sequence[Where]) -> dict[str, list[Where]]:
    found: dict[str, list[Where]] = {}
    for place in places:
        found.setdefault(place.name, []).append(place)
    return found


def _count_one(tensors: Tensors, name: str, places: list[Where]) -> Written:
    tensor = tensors[name]
    if len(places) == 1:
        elements = places[0].size(tensor)
    else:
        # Regions overlap where rows meet columns. They take all dimensions after the second.
        mask = torch.zeros([*tensor.shape[:2], *[1] * (tensor.dim() - 2)], dtype=torch.bool)
        for region in merged(_regions(places)):
            region.view(mask)[region.index] = True
        elements = int(mask.count_nonzero()) * math.prod(tensor.shape[2:])
    kind = "parameter" if name in tensors.parameters else "buffer"
    return Written(name, kind, elements, tensor.numel())


@dataclass(frozen=True, eq=False)
class _Memory:
    """What is reset of an optimizer, and what is said of it."""

    writes: Memory = field(default_factory=Memory)
    written: tuple[Written, ...] = ()
    notes: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        state: OptimizerState | None,
        places: Sequence[Where],
        written: tuple[Written, ...],
        reset_steps: bool,
    ) -> "_Memory":
        """Return what the optimizer remembers of the places."""
        if state is None:
            return cls()
        elements = {entry.name: entry.elements for entry in written}
        single = [place for place in places if isinstance(place, Elements)]
        by_name = _by_name([*single, *merged(_regions(places))])
        tensors = list(state.tensors(elements))
        return cls(
            Memory(
                [(tensor, place) for tensor in tensors for place in by_name[tensor.name]],
                list(state.steps(elements)) if reset_steps else (),
            ),
            tuple(
                Written(
                    f"{tensor.name}: {tensor.key}", "optimizer state", elements[tensor.name],
                    tensor.tensor.numel(),
                )
                for tensor in tensors
            ),
            state.notes(elements),
        )  # fmt: skip
