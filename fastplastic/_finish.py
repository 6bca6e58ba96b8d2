"""The last step of `graph`: from the book-keeping to unit layers."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ._flow import Layer, distinct
from ._sites import Sites
from ._walk import Walk
from .wiring import Consumer, Coupling, Norm, Site, UnitLayer


def finish(walk: Walk, sites: Sites) -> tuple[UnitLayer, ...]:
    """Turn the book-keeping into unit layers."""
    _mark_shared_norms(walk)
    finisher = _Finish(walk, sites)
    done: dict[str, UnitLayer] = {}
    for layer in walk.layers:
        if layer.name not in done:
            done[layer.name] = finisher.unit_layer(layer)
    return tuple(done.values())


def _mark_shared_norms(walk: Walk) -> None:
    """A norm that is called twice cannot be reset for one of its uses."""
    times = Counter(name for name, _ in walk.norms)
    shared = [units for name, units in walk.norms if times[name] > 1]
    for units in shared:
        walk.leak(units, "its norm is used more than once")
    if shared:
        walk.settle()


class _Finish:
    """What is needed of the whole walk to describe one layer."""

    def __init__(self, walk: Walk, sites: Sites) -> None:
        self.walk = walk
        self.sites = sites
        self.code = walk.code.tolist()
        self.read = {walk.find(unit) for reader in walk.readers for unit in distinct(reader.ids)}
        self.members: dict[int, list[int]] = defaultdict(list)
        for unit, code in enumerate(self.code):
            if not code and walk.find(unit) != unit:
                self.members[walk.find(unit)].append(unit)
        self.readers = self._by_layer([(reader.ids, reader) for reader in walk.readers])
        self.norms = self._by_layer([(ids, (name, ids)) for name, ids in walk.norms])
        self.inner = _inner(walk.layers)

    def _by_layer(self, items: list[tuple[Tensor, Any]]) -> dict[int, list[Any]]:
        """Sort items by the layers whose units stand in their ids."""
        sorted_items: dict[int, list[Any]] = defaultdict(list)
        for ids, item in items:
            for start in {self.walk.layer_at(unit).start: None for unit in distinct(ids)}:
                sorted_items[start].append(item)
        return sorted_items

    def unit_layer(self, layer: Layer) -> UnitLayer:
        """Return the finished description of a layer."""
        units = range(layer.start, layer.stop)
        reasons = [self._reason(unit) for unit in units]
        known = torch.tensor(
            [not self.code[unit] and self.walk.find(unit) in self.read for unit in units]
        )
        activations = _activation_runs(layer)
        z_site, g_site = _sites_of(self.sites, layer, activations, bool(known.any()))
        norms = [(name, _own(layer, ids, known)) for name, ids in self.norms[layer.start]]
        readers = [(reader, _own(layer, reader.ids, known)) for reader in self.readers[layer.start]]
        return UnitLayer(
            name=layer.name, kind=layer.kind, weight=layer.weight, bias=layer.bias,
            unit_dim=layer.unit_dim, n_units=layer.n_units, norm=layer.norm,
            activations=activations,
            hidden=torch.tensor([not reason for reason in reasons]),
            reasons=dict(Counter(reason for reason in reasons if reason)),
            norms=tuple(Norm(name, own) for name, own in norms if own is not None),
            coupled=self._couplings(layer),
            consumers=tuple(
                Consumer(reader.name, reader.weight, reader.column_dim, reader.groups, own)
                for reader, own in readers
                if own is not None
            ),
            z_site=z_site, g_site=g_site, transformed=layer.transformed,
            head=layer.name not in self.inner,
        )  # fmt: skip

    def _reason(self, unit: int) -> str:
        """Return why a unit cannot be re-initialised under its own name; "" when it can."""
        if self.code[unit]:
            text: str = self.walk.texts[self.code[unit]]
            return text
        lead = self.walk.find(unit)
        if lead not in self.read:
            return "nothing reads it"
        name: str = self.walk.layer_at(lead).name
        return "" if lead == unit else f"re-initialised together with {name}"

    def _couplings(self, layer: Layer) -> tuple[Coupling, ...]:
        rows: dict[tuple[str, int], Tensor] = {}
        for unit in range(layer.start, layer.stop):
            slots: Counter[str] = Counter()
            for other in self.members.get(unit, ()):
                member = self.walk.layer_at(other)
                key = member.name, slots[member.name]
                slots[member.name] += 1
                row_of_unit = rows.setdefault(key, torch.full((layer.n_units,), -1))
                row_of_unit[unit - layer.start] = other - member.start
        return tuple(Coupling(name, row_of_unit) for (name, _), row_of_unit in rows.items())


def _inner(layers: Sequence[Layer]) -> set[str]:
    """Return the names of the layers that another weight layer depends on."""
    nodes = {layer.own_node for layer in layers}
    if not nodes:
        return set()
    leading: set[Node] = set()
    for node in reversed(next(iter(nodes)).graph.nodes):
        if any(user in nodes or user in leading for user in node.users):
            leading.add(node)
    return {layer.name for layer in layers if layer.own_node in leading}


def _own(layer: Layer, ids: Tensor, known: Tensor) -> Tensor | None:
    """Return the layer's unit at each index of `ids` (-1 elsewhere), or None when there is none."""
    inside = (ids >= layer.start) & (ids < layer.stop)
    local = torch.where(inside, ids - layer.start, 0).long()
    mapped = torch.where(inside & known[local], local, -1)
    return mapped if bool((mapped >= 0).any()) else None


def _activation_runs(layer: Layer) -> tuple[tuple[int, int, str], ...]:
    source = layer.branch_of or layer
    names = [source.activations.get(row, "identity") for row in range(layer.n_units)]
    starts = [row for row in range(len(names)) if row == 0 or names[row] != names[row - 1]]
    return tuple(
        (start, stop, names[start])
        for start, stop in zip(starts, [*starts[1:], len(names)], strict=True)
    )


def _sites_of(
    sites: Sites, layer: Layer, activations: tuple[tuple[int, int, str], ...], hidden: bool
) -> tuple[Site | None, Site | None]:
    """Return where the pre-activation and where the gradient to the activation are seen."""
    source = layer.branch_of or layer
    kinds = {name for _, _, name in activations}
    z_found = sites.find(layer.z_node, [source]) if "unknown" not in kinds else {}
    z_site = z_found.get(source.name)
    if z_site is None and not hidden:
        z_site = (
            sites.find(layer.own_node, [layer]).get(layer.name) if kinds == {"identity"} else None
        )
    if kinds == {"identity"}:
        return z_site, z_site
    g_found = sites.find(source.h_node, [source]) if source.h_node is not None else {}
    return z_site, g_found.get(source.name) or _linear_part(z_site, activations)


def _linear_part(site: Site | None, activations: tuple[tuple[int, int, str], ...]) -> Site | None:
    """Return the site for the units without an activation function alone (packed gated MLPs)."""
    linear = [(start, stop) for start, stop, name in activations if name == "identity"]
    if site is None or not linear:
        return None
    units = site.unit_of_channel
    keep = torch.stack([(units >= start) & (units < stop) for start, stop in linear]).any(0)
    return Site(site.module, site.where, site.unit_axis, torch.where(keep, units, -1))
