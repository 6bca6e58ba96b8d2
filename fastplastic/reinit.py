"""Apply a plan to a model: the only code that writes to weights, buffers and optimizer state."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastplastic._columns import ColumnDraw, column_mask, column_norms, reader_of
from fastplastic._optimizer_state import OptimizerState, StateTensor, set_step, step_of
from fastplastic._report import ReinitReport, Written
from fastplastic.checkpoint import fingerprint
from fastplastic.errors import FingerprintError, InputError
from fastplastic.initializers import Initializer, Target, make_initializer
from fastplastic.kernels import resample_
from fastplastic.laws import Law, normal
from fastplastic.planner import GRANULARITIES, Plan
from fastplastic.writes import (
    FillWrite,
    Region,
    RowWrite,
    Tensors,
    column_region,
    merged,
    merged_fills,
    norm_writes,
    row_writes,
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
    rows = selected_rows(plan)
    fresh = [write for name in rows for write in row_writes(tensors, plan.wiring[name], rows[name])]
    fills = list(_norms(tensors, plan, rows))
    columns = list(merged(_columns(tensors, plan, rows))) if outgoing != "keep" else []
    laws = [initializer(_target(tensors, write)) for write in fresh]
    draws: list[ColumnDraw] = []
    if outgoing == "zero":
        # After the norms: a column of zeros stays so even in a row drawn afresh.
        fills += [FillWrite(region, 0.0) for region in columns]
    else:
        draws = [_column_draw(tensors, model, region, outgoing, initializer) for region in columns]
    regions = [write.region for write in fresh] + [fill.region for fill in fills]
    regions += [draw.region for draw in draws]
    written = _count(tensors, regions)
    memory = _memory(state, regions, written, reset_steps)
    _apply(tensors, _Writes(list(zip(fresh, laws, strict=True)), fills, draws, memory), seed)
    return ReinitReport(
        count=plan.count,
        layers={name: len(units) for name, units in plan.units.items()},
        init=init,
        outgoing=outgoing,
        seed=int(seed),
        written=(*written, *memory.written),
        notes=(*initializer.notes(), *memory.notes),
    )


def _check_choices(plan: Plan, outgoing: str, seed: int) -> None:
    if outgoing not in OUTGOING:
        raise InputError(f"outgoing {outgoing!r} is unknown, expected one of {', '.join(OUTGOING)}")
    if not isinstance(seed, Integral):
        raise InputError(f"seed {seed!r} is not usable, expected an integer")
    if plan.granularity not in GRANULARITIES:
        raise InputError(
            f"granularity {plan.granularity!r} is not supported in this version, expected 'unit'"
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
) -> ColumnDraw:
    if outgoing == "fresh":
        law = initializer(reader_of(model, region, tensors[region.name]))
        return ColumnDraw(region, law, None)
    norms = column_norms(region, tensors[region.name])
    median = float(norms.median()) if len(norms) else 0.0
    if not math.isfinite(median):
        raise InputError(
            f"{region.name!r} has columns that are not finite, expected numbers: choose another "
            "outgoing"
        )
    return ColumnDraw(region, normal(0.0, 1.0), _SMALL * median)


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
    return Target(name, tensors[name], write.layer, write.rows)


def _count(tensors: Tensors, regions: list[Region]) -> tuple[Written, ...]:
    by_name: dict[str, list[Region]] = {}
    for region in regions:
        by_name.setdefault(region.name, []).append(region)
    counted = (_count_one(tensors, name, parts) for name, parts in by_name.items())
    return tuple(written for written in counted if written.elements)


def _count_one(tensors: Tensors, name: str, regions: list[Region]) -> Written:
    tensor = tensors[name]
    if len(regions) == 1:
        elements = regions[0].size(tensor)
    else:
        # Regions overlap where rows meet columns. They take all dimensions after the second.
        mask = torch.zeros([*tensor.shape[:2], *[1] * (tensor.dim() - 2)], dtype=torch.bool)
        for region in merged(regions):
            region.view(mask)[region.index] = True
        elements = int(mask.count_nonzero()) * math.prod(tensor.shape[2:])
    kind = "parameter" if name in tensors.parameters else "buffer"
    return Written(name, kind, elements, tensor.numel())


@dataclass(frozen=True, eq=False)
class _Memory:
    """What is reset of an optimizer: state by region, counters of steps."""

    states: Sequence[tuple[StateTensor, Region]] = ()
    steps: Sequence[tuple[dict[str, Any], str]] = ()
    written: tuple[Written, ...] = ()
    notes: tuple[str, ...] = ()


def _memory(
    state: OptimizerState | None,
    regions: list[Region],
    written: tuple[Written, ...],
    reset_steps: bool,
) -> _Memory:
    if state is None:
        return _Memory()
    elements = {entry.name: entry.elements for entry in written}
    by_name: dict[str, list[Region]] = {}
    for region in merged(regions):
        by_name.setdefault(region.name, []).append(region)
    tensors = list(state.tensors(elements))
    return _Memory(
        states=[(tensor, region) for tensor in tensors for region in by_name[tensor.name]],
        steps=list(state.steps(elements)) if reset_steps else (),
        written=tuple(
            Written(
                f"{tensor.name}: {tensor.key}", "optimizer state", elements[tensor.name],
                tensor.tensor.numel(),
            )
            for tensor in tensors
        ),
        notes=state.notes(elements),
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Writes:
    """All that is written, in this order."""

    fresh: list[tuple[RowWrite, Law]]
    fills: list[FillWrite]
    draws: list[ColumnDraw]
    memory: _Memory


def _apply(tensors: Tensors, writes: _Writes, seed: int) -> None:
    """Write everything; whatever interrupts it, the tensors are then as before."""
    fills, memory = list(merged_fills(writes.fills)), writes.memory
    places = [_Place(tensors[write.region.name], write.region) for write, _ in writes.fresh]
    filled = [_Place(tensors[fill.region.name], fill.region) for fill in fills]
    drawn = [_Place(tensors[draw.region.name], draw.region) for draw in writes.draws]
    states = [_Place(state.tensor, region) for state, region in memory.states]
    # Only what is overwritten is kept, all of it before the first write.
    undo: list[Callable[[], object]] = [
        place.undo() for place in (*places, *filled, *drawn, *states)
    ]
    undo += [partial(set_step, *step, step_of(*step)) for step in memory.steps]
    with torch.no_grad():
        try:
            _draw(tensors, writes.fresh, seed)
            for place, fill in zip(filled, fills, strict=True):
                _fill(place, fill.value)
            for place, draw in zip(drawn, writes.draws, strict=True):
                _draw_columns(tensors[draw.region.name], place, draw, seed)
            for place, (state, region) in zip(states, memory.states, strict=True):
                if state.start is None:
                    values = _Place(tensors[state.name], region).read()
                    place.write(values.to(state.tensor.dtype))
                else:
                    _fill(place, state.start)
            for step in memory.steps:
                set_step(*step, 0)
        except BaseException:  # also KeyboardInterrupt and MemoryError
            for restore in undo:
                restore()
            raise


def _draw(tensors: Tensors, fresh: list[tuple[RowWrite, Law]], seed: int) -> None:
    """Draw the fresh rows of all parameters; those of one device at once."""
    by_device: dict[torch.device, list[tuple[RowWrite, Law]]] = {}
    for write, law in fresh:
        by_device.setdefault(tensors[write.region.name].device, []).append((write, law))
    for writes in by_device.values():
        names = [write.region.name for write, _ in writes]
        weights = [tensors[name] for name in names]
        masks = [
            _row_mask(tensor, write) for tensor, (write, _) in zip(weights, writes, strict=True)
        ]
        resample_(weights, names, [law for _, law in writes], seed=seed, masks=masks)


def _draw_columns(tensor: Tensor, place: "_Place", draw: ColumnDraw, seed: int) -> None:
    """Draw outgoing columns, and give them a norm if they are to have one."""
    mask = column_mask(draw.region, tensor)
    resample_([tensor], [draw.region.name], [draw.law], seed=seed, masks=[mask])
    if draw.norm is not None:
        values = place.read()
        others = [dim for dim in range(values.dim()) if dim != place.list_dim]
        # In float32: half precision may round a small square to 0.
        norms = values.float().square().sum(others, keepdim=True).sqrt()
        place.write((values.float() * (draw.norm / norms)).to(values.dtype))


def _row_mask(tensor: Tensor, write: RowWrite) -> Tensor:
    """Return a mask in the shape of the tensor that takes memory for its rows only."""
    mask = torch.zeros(tensor.shape[write.unit_dim], dtype=torch.bool)
    mask[write.rows] = True
    shape = [1] * tensor.dim()
    shape[write.unit_dim] = -1
    return mask.to(tensor.device).view(shape).expand(tensor.shape)


def _fill(place: "_Place", value: float) -> None:
    place.fill(value)


class _Place:
    """A region of a tensor: what can be read from it and written to it."""

    def __init__(self, tensor: Tensor, region: Region) -> None:
        tensor = tensor.detach()
        self._view = region.view(tensor)
        self._index = tuple(
            part if isinstance(part, slice) else part.to(tensor.device) for part in region.index
        )
        lists = [dim for dim, part in enumerate(self._index) if isinstance(part, Tensor)]
        # Along one dimension there are operations that are ten times as fast as indexing.
        self._dim = lists[0] if len(lists) == 1 else None
        # The dimension of what is read that runs over the list.
        self.list_dim = 0 if self._dim is None else self._dim

    def read(self) -> Tensor:
        """Return a copy of the values."""
        if self._dim is None:
            return self._view[self._index]
        return self._view.index_select(self._dim, self._rows)

    def undo(self) -> Callable[[], None]:
        """Return what writes the values back that are there now."""
        return partial(self.write, self.read())

    def write(self, values: Tensor) -> None:
        """Write what `read` returned."""
        if self._dim is None:
            self._view[self._index] = values
        else:
            self._view.index_copy_(self._dim, self._rows, values)

    def fill(self, value: float) -> None:
        """Write one value."""
        if self._dim is None:
            self._view[self._index] = value
        else:
            self._view.index_fill_(self._dim, self._rows, value)

    @property
    def _rows(self) -> Tensor:
        assert self._dim is not None
        rows = self._index[self._dim]
        assert isinstance(rows, Tensor)
        return rows
