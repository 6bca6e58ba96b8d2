"""Outgoing columns that are drawn afresh: of which law, and with which norm."""

import torch
from torch import Tensor, nn

from fastplastic.initializers import Target
from fastplastic.wiring import UnitLayer, is_conv1d
from fastplastic.writes import Region


def reader_of(model: nn.Module, region: Region, weight: Tensor) -> Target:
    """Return the weight of a consumer as something to draw, by the law of its own rows."""
    name = region.name.rpartition(".")[0]
    unit_dim = 1 if _column_dim(region) == 0 else 0
    kind = "conv1d" if is_conv1d(model.get_submodule(name)) else "reader"
    units = weight.shape[unit_dim]
    hidden = torch.zeros(units, dtype=torch.bool)
    layer = UnitLayer(name, kind, region.name, None, unit_dim, units, None, (), hidden)
    return Target(region.name, weight, layer, rows=torch.zeros(0, dtype=torch.int64))


def column_norms(region: Region, weight: Tensor) -> Tensor:
    """Return the norms of the columns that are not in the region, float32."""
    view = region.view(weight.detach())
    lists = [dim for dim, part in enumerate(region.index) if isinstance(part, Tensor)]
    others = [dim for dim in range(view.dim()) if dim not in lists]
    norms = view.float().square().sum(others).sqrt()
    live = torch.ones(norms.shape, dtype=torch.bool)
    live[tuple(part for part in region.index if isinstance(part, Tensor))] = False
    return norms[live.to(norms.device)]


def _column_dim(region: Region) -> int:
    return 0 if isinstance(region.index[0], Tensor) and region.groups == 1 else 1
