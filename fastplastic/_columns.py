"""Outgoing columns that are drawn afresh: of which law, with which norm, and where they are."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastplastic.initializers import Target
from fastplastic.laws import Law
from fastplastic.wiring import UnitLayer, is_conv1d
from fastplastic.writes import Region


@dataclass(frozen=True, eq=False)
class ColumnDraw:
    """Columns of a weight that are drawn afresh.

    Attributes:
        region: Where they are.
        law: From which law each element is drawn.
        norm: The norm that each column is given then; None to leave it as drawn.
    """

    region: Region
    law: Law
    norm: float | None


def reader_of(model: nn.Module, region: Region, weight: Tensor) -> Target:
    """Return the weight of a consumer as something to draw, by the law of its own rows."""
    name = region.name.rpartition(".")[0]
    unit_dim = 1 if _column_dim(region) == 0 else 0
    kind = "conv1d" if is_conv1d(model.get_submodule(name)) else "reader"
    units = weight.shape[unit_dim]
    hidden = torch.zeros(units, dtype=torch.bool)
    layer = UnitLayer(name, kind, region.name, None, unit_dim, units, None, (), hidden)
    return Target(region.name, weight, layer, torch.zeros(0, dtype=torch.int64))


def column_norms(region: Region, weight: Tensor) -> Tensor:
    """Return the norms of the columns that are not in the region, float32."""
    view = region.view(weight.detach())
    lists = [dim for dim, part in enumerate(region.index) if isinstance(part, Tensor)]
    others = [dim for dim in range(view.dim()) if dim not in lists]
    norms = view.float().square().sum(others).sqrt()
    live = torch.ones(norms.shape, dtype=torch.bool)
    live[tuple(part for part in region.index if isinstance(part, Tensor))] = False
    return norms[live.to(norms.device)]


def column_mask(region: Region, weight: Tensor) -> Tensor:
    """Return a mask in the shape of the weight, expanded where that can be."""
    sizes = list(region.view(weight).shape)
    for dim in range(len(sizes)):
        listed = dim < len(region.index) and isinstance(region.index[dim], Tensor)
        sizes[dim] = sizes[dim] if listed else 1
    mask = torch.zeros(sizes, dtype=torch.bool)
    mask[region.index] = True
    mask = mask.to(weight.device)
    if region.groups == 1:
        return mask.expand(weight.shape)
    groups, columns = mask.shape[0], mask.shape[2]
    rows = mask.expand(groups, weight.shape[0] // groups, columns, *mask.shape[3:])
    return rows.reshape(weight.shape[0], columns, *mask.shape[3:]).expand(weight.shape)


def _column_dim(region: Region) -> int:
    return 0 if isinstance(region.index[0], Tensor) and region.groups == 1 else 1
