"""What a plan writes, for units and for single weights."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fastplastic.errors import InputError
from fastplastic.initial import Initializer, Target, normal
from fastplastic.planning import Plan
from fastplastic.reinit.places import Draw, FillWrite, Region, columns_of, merged
from fastplastic.reinit.regions import (
    Tensors,
    column_region,
    norm_writes,
    row_targets,
    selected_elements,
    selected_rows,
)
from fastplastic.reinit.transaction import Writes
from fastplastic.wiring import UnitLayer, is_conv1d

# Norm of a small outgoing column, as a share of the median of the others.
_SMALL = 0.02


@dataclass(frozen=True, eq=False)
class Change:
    """What a plan does to a model.

    Attributes:
        writes: All that is written.
        rows: Layer name -> rows that are drawn afresh.
        columns: The outgoing columns that are written.
        norms: Where running statistics are reset.
    """

    writes: Writes
    rows: dict[str, Tensor] = field(default_factory=dict)
    columns: list[Region] = field(default_factory=list)
    norms: list[Region] = field(default_factory=list)


def unit_change(
    model: nn.Module, plan: Plan, tensors: Tensors, initializer: Initializer, outgoing: str
) -> Change:
    """Return what a plan of units does."""
    rows = selected_rows(plan)
    fresh = (pair for name in rows for pair in row_targets(tensors, plan.wiring[name], rows[name]))
    laws = [Draw(region, initializer(target)) for region, target in fresh]
    fills = list(_norms(tensors, plan, rows))
    # The norm of a DenseNet holds channels of many layers.
    norms = merged(fill.region for fill in fills if fill.region.name.endswith(".running_mean"))
    columns = list(merged(_columns(tensors, plan, rows))) if outgoing != "keep" else []
    drawn = []
    if outgoing == "zero":
        # After the norms: a column of zeros stays so even in a row drawn afresh.
        fills += [FillWrite(region, 0.0) for region in columns]
    else:
        drawn = [_column_draw(tensors, model, place, outgoing, initializer) for place in columns]
    return Change(Writes(laws, fills, drawn), rows, columns, list(norms))


def weight_change(plan: Plan, tensors: Tensors, initializer: Initializer) -> Change:
    """Return what a plan of single weights does."""
    layers = {layer.weight: layer for layer in plan.wiring.values()}
    chosen = selected_elements(tensors, plan)
    targets = (
        Target(part.name, tensors[part.name], layers.get(part.name), mask=part.mask)
        for part in chosen
    )
    laws = [Draw(part, initializer(target)) for part, target in zip(chosen, targets, strict=True)]
    return Change(Writes(laws))


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
        return Draw(region, initializer(_consumer_weight(model, region, tensors[region.name])))
    norms = _column_norms(region, tensors[region.name])
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


def _consumer_weight(model: nn.Module, region: Region, weight: Tensor) -> Target:
    """Return the weight of a consumer as something to draw, by the law of its own rows."""
    name = region.name.rpartition(".")[0]
    unit_dim = 1 - region.column_dim
    kind = "conv1d" if is_conv1d(model.get_submodule(name)) else "consumer"
    units = weight.shape[unit_dim]
    hidden = torch.zeros(units, dtype=torch.bool)
    layer = UnitLayer(name, kind, region.name, None, unit_dim, units, None, (), hidden)
    return Target(region.name, weight, layer, rows=torch.zeros(0, dtype=torch.int64))


def _column_norms(region: Region, weight: Tensor) -> Tensor:
    """Return the norms of the columns that are not in the region, float32."""
    norms = columns_of(region, weight).sums(2).sqrt().float()
    live = torch.ones(norms.shape, dtype=torch.bool)
    live[region.columns] = False
    return norms[live]
