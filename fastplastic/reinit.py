"""Apply a plan to a model: the only code that writes to weights and buffers."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from fastplastic.checkpoint import fingerprint
from fastplastic.errors import FingerprintError, InputError
from fastplastic.initializers import Target, make_initializer
from fastplastic.kernels import resample_
from fastplastic.laws import Law
from fastplastic.planner import GRANULARITIES, Plan
from fastplastic.writes import (
    FillWrite,
    Region,
    RowWrite,
    Tensors,
    column_write,
    merged,
    merged_fills,
    norm_writes,
    row_writes,
    selected_rows,
)

OUTGOING = ("zero", "keep")


@dataclass(frozen=True)
class Written:
    """What was written to one tensor.

    Attributes:
        name: Name of the parameter or buffer.
        kind: "parameter" or "buffer".
        elements: Number of elements written.
        total: Number of elements it has.
    """

    name: str
    kind: str
    elements: int
    total: int

    @property
    def share(self) -> float:
        """Share of the elements written, in [0, 1]."""
        return self.elements / self.total


@dataclass(frozen=True)
class ReinitReport:
    """What `reinit_` wrote.

    Attributes:
        count: Number of units re-initialised.
        layers: Layer name -> number of its units selected in the plan.
        init: Name of the initializer.
        outgoing: What was done to the outgoing columns.
        seed: Seed of the fresh values.
        written: Every tensor that was written to, in the order of the first write.
        notes: What a reader should know, one sentence each.
    """

    count: int
    layers: dict[str, int]
    init: str
    outgoing: str
    seed: int
    written: tuple[Written, ...]
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the report as values that `json.dumps` takes, with the share of each tensor."""
        values = asdict(self)
        for entry, written in zip(values["written"], self.written, strict=True):
            entry["share"] = written.share
        return values


def reinit_(
    model: nn.Module, plan: Plan, *, init: str = "default", outgoing: str = "zero", seed: int = 0
) -> ReinitReport:
    """Re-initialise the units of a plan in place: all of them, or none if anything fails.

    For each unit: fresh incoming rows and biases (of coupled rows too), norm channels set to gamma
    1, beta 0, running mean 0 and running variance 1, and the outgoing columns as asked. A unit with
    outgoing weights of zero has no effect on the network until it is trained. After Sokar et al.
    (ReDo), arXiv 2302.12902, and Dohare et al., Nature 2024; "keep" after GraMa, arXiv 2505.24061.

    Args:
        model: The model that was profiled, or one with the same parameters.
        plan: What `fastplastic.plan` chose.
        init: Law of the fresh rows: "default" (the library's own), "kaiming_uniform" or "empirical"
            (see `initializers`).
        outgoing: "zero" or "keep" the outgoing columns.
        seed: Any integer. Fresh values depend on it, the parameter's name and the row alone; the
            global random state is neither read nor changed.

    Raises:
        FingerprintError: The plan was made for a model with other parameters.
        FileError: The plan does not fit the model or itself (edited by hand).
        InputError: An argument is unknown, or a weight cannot be written: shared between layers,
            transformed before use, not floating-point, not loaded.
    """
    _check_choices(plan, outgoing, seed)
    initializer = make_initializer(init, model)
    tensors = Tensors(model)
    _check_fingerprint(model, plan)
    rows = selected_rows(plan)
    fresh = [write for name in rows for write in row_writes(tensors, plan.wiring[name], rows[name])]
    fills = list(_fills(tensors, plan, rows, outgoing))
    laws = [initializer(_target(tensors, write)) for write in fresh]
    regions = [*(write.region for write in fresh), *(fill.region for fill in fills)]
    written = _count(tensors, regions)
    _apply(tensors, list(zip(fresh, laws, strict=True)), fills, seed)
    return ReinitReport(
        count=plan.count,
        layers={name: len(units) for name, units in plan.units.items()},
        init=init,
        outgoing=outgoing,
        seed=int(seed),
        written=written,
        notes=initializer.notes(),
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


def _fills(
    tensors: Tensors, plan: Plan, rows: dict[str, Tensor], outgoing: str
) -> Iterator[FillWrite]:
    """Yield norms first, then columns: a column of zeros stays so even in a row drawn afresh."""
    for name in rows:
        for norm in plan.wiring[name].norms:
            yield from norm_writes(tensors, plan.wiring[name], norm, rows[name])
    if outgoing == "keep":
        return
    inner = _inner_layers(plan)
    for name in rows:
        for consumer in plan.wiring[name].consumers:
            if consumer.name not in inner[name]:
                yield column_write(tensors, plan.wiring[name], consumer, rows[name])


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


def _apply(
    tensors: Tensors, fresh: list[tuple[RowWrite, Law]], fills: list[FillWrite], seed: int
) -> None:
    """Write everything; whatever interrupts it, the tensors are then as before."""
    fills = list(merged_fills(fills))
    places = [_Place(tensors, write.region) for write, _ in fresh]
    filled = [_Place(tensors, fill.region) for fill in fills]
    # Only what is overwritten is kept, all of it before the first write.
    journal = [(place, place.read()) for place in (*places, *filled)]
    with torch.no_grad():
        try:
            _draw(tensors, fresh, seed)
            for place, fill in zip(filled, fills, strict=True):
                _fill(place, fill.value)
        except BaseException:  # also KeyboardInterrupt and MemoryError
            for place, old in journal:
                place.write(old)
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

    def __init__(self, tensors: Tensors, region: Region) -> None:
        tensor = tensors[region.name].detach()
        self._view = region.view(tensor)
        self._index = tuple(
            part if isinstance(part, slice) else part.to(tensor.device) for part in region.index
        )
        lists = [dim for dim, part in enumerate(self._index) if isinstance(part, Tensor)]
        # Along one dimension there are operations that are ten times as fast as indexing.
        self._dim = lists[0] if len(lists) == 1 else None

    def read(self) -> Tensor:
        """Return a copy of the values."""
        if self._dim is None:
            return self._view[self._index]
        return self._view.index_select(self._dim, self._rows)

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
