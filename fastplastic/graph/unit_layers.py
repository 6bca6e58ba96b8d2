"""The last step of the unit graph: from the book-keeping to unit layers."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from fastplastic.graph.ledger import ConsumerCall, Layer, Ledger
from fastplastic.graph.nodes import without_own_module
from fastplastic.graph.points import Meeting, Point, Points, downstream, upstream
from fastplastic.graph.sites import Sites, projection_sites
from fastplastic.graph.values import distinct
from fastplastic.wiring import Consumer, Coupling, Norm, Site, UnitLayer

# f(f(z)) = f(z), and f is flat at f(z) where it is at z: h tells as much as z.
_SEEN_FROM_BEHIND = ("relu", "relu6", "hardtanh")


def layers_of(ledger: Ledger) -> tuple[UnitLayer, ...]:
    """Turn the book-keeping into unit layers."""
    _mark_shared_norms(ledger)
    _mark_other_consumers(ledger)
    ledger.settle()
    calls: dict[str, list[Layer]] = defaultdict(list)
    for layer in ledger.calls:
        # What the main mode runs is seen there alone.
        if not calls[layer.name] or calls[layer.name][0].mode == layer.mode:
            calls[layer.name].append(layer)
    describer = _Describer(ledger)
    return tuple(describer.unit_layer(same) for same in calls.values())


def _mark_shared_norms(ledger: Ledger) -> None:
    """A norm that is called twice cannot be reset for one of its uses."""
    times = Counter((norm.mode, norm.name) for norm in ledger.norms)
    for norm in ledger.norms:
        if times[norm.mode, norm.name] > 1:
            ledger.leak(norm.ids, "its norm is used more than once")


def _mark_other_consumers(ledger: Ledger) -> None:
    """A weight that reads other units in train mode than in eval mode has no one wiring."""
    by_weight: dict[str, dict[str, list[ConsumerCall]]] = defaultdict(lambda: defaultdict(list))
    for call in ledger.consumers:
        by_weight[call.weight][call.mode].append(call)
    for modes in by_weight.values():
        if len({tuple(_key(call) for call in calls) for calls in modes.values()}) > 1:
            for call in (call for calls in modes.values() for call in calls):
                ledger.leak(call.ids, f"read otherwise by {call.name} in train mode")


def _key(item: Any) -> tuple[Any, ...]:
    """Return what tells consumers, or norms, of different units apart."""
    form = (item.column_dim, item.groups) if isinstance(item, ConsumerCall) else ()
    return item.name, *form, tuple(item.ids.tolist())


class _Describer:
    """What is needed of the whole ledger to describe one layer."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        graphs = dict.fromkeys(layer.node.graph for layer in ledger.calls)
        self.sites: dict[Graph, Sites] = {graph: Sites(graph, ledger) for graph in graphs}
        self.points = Points(ledger)
        self.code = ledger.code.tolist()
        self.read = {ledger.find(unit) for call in ledger.consumers for unit in distinct(call.ids)}
        self.members: dict[int, list[int]] = defaultdict(list)
        for unit, code in enumerate(self.code):
            if not code and ledger.find(unit) != unit:
                self.members[ledger.find(unit)].append(unit)
        self.consumers = self._by_layer(ledger.consumers)
        self.norms = self._by_layer(ledger.norms)
        self.inner = _inner(ledger.calls)

    def _by_layer(self, items: Iterable[Any]) -> dict[int, list[Any]]:
        """Sort calls by the layers whose units they have; what two modes have, once."""
        sorted_items: dict[int, list[Any]] = defaultdict(list)
        for item in {_key(item): item for item in items}.values():
            for layer, _ in self.ledger.counts(distinct(item.ids)):
                sorted_items[layer.start].append(item)
        return sorted_items

    def unit_layer(self, calls: Sequence[Layer]) -> UnitLayer:
        """Return the finished description of a layer from its calls."""
        layer = calls[0]
        units = range(layer.start, layer.stop)
        reasons = [self._reason(unit) for unit in units]
        known = torch.tensor(
            [not self.code[unit] and self.ledger.find(unit) in self.read for unit in units]
        )
        measured = _Measured([self._measured(call) for call in calls])
        norms = [(norm.name, _own(layer, norm.ids, known)) for norm in self.norms[layer.start]]
        consumers = [(call, _own(layer, call.ids, known)) for call in self.consumers[layer.start]]
        return UnitLayer(
            name=layer.name, kind=layer.kind, weight=layer.weight, bias=layer.bias,
            unit_dim=layer.unit_dim, n_units=layer.n_units, norm=measured.norm,
            activations=_runs(measured.functions),
            hidden=torch.tensor([not reason for reason in reasons]),
            reasons=dict(Counter(reason for reason in reasons if reason)),
            norms=tuple(Norm(name, own) for name, own in norms if own is not None),
            coupled=self._couplings(layer),
            consumers=tuple(
                Consumer(call.name, call.weight, call.column_dim, call.groups, own)
                for call, own in consumers
                if own is not None
            ),
            z_sites=measured.z_sites, g_sites=measured.g_sites, transformed=layer.transformed,
            head=layer.name not in self.inner, unknown=measured.unknown, tied=layer.tied,
        )  # fmt: skip

    def _measured(self, layer: Layer) -> list["_Group"]:
        """Return how the units of one call of a layer are measured."""
        projected = projection_sites(layer)
        if projected:
            every = torch.ones(layer.n_units, dtype=torch.bool)
            return [_Group(every, "identity", "", None, projected, projected)]
        sites = self.sites[layer.node.graph]
        whole = torch.arange(layer.start, layer.stop, dtype=torch.int32)
        maker = without_own_module(layer.node, layer.name)
        why = "" if maker is None else f": {maker} computes it without calling a module of its own"
        if layer.part:
            # Its rows are in several tensors, and none has them all.
            every = torch.ones(layer.n_units, dtype=torch.bool)
            reason = f"no hook sees all of its rows together{why}"
            return [_Group(every, "unknown", reason, None, [], [])]
        return [self._group(sites, meeting, whole, why) for meeting in self.points.meetings(layer)]

    def _group(self, sites: Sites, meeting: Meeting, whole: Tensor, why: str) -> "_Group":
        """Return where hooks see units that have the same activation function."""
        norms = {point.norm for point, _ in meeting.points}
        norm = norms.pop() if len(norms) == 1 else None
        if meeting.function == "unknown":
            return _Group(meeting.units, "unknown", meeting.reason, norm, [], [])
        z_sites = [self._z_site(sites, point, ids, whole) for point, ids in meeting.points]
        found = [site for site in z_sites if site is not None]
        if len(found) < len(z_sites):
            what = "its value"
            if meeting.function != "identity":
                what = f"what goes into its activation function ({meeting.function})"
            return _Group(meeting.units, "unknown", f"no hook can see {what}{why}", norm, [], [])
        gradients = [self._g_site(sites, point, ids) for point, ids in meeting.points]
        g_sites = [site for site in gradients if site is not None]
        if meeting.function == "identity":
            g_sites = found
        return _Group(meeting.units, meeting.function, "", norm, found, g_sites)

    def _z_site(self, sites: Sites, point: Point, ids: Tensor, whole: Tensor) -> Site | None:
        """Return where the pre-activation is seen, or as good, the activation.

        Rather where all units of the layer are seen than where these are alone: one read for all.
        """
        before = list(upstream(self.ledger, point.z, ids))
        # Not under the numbers of other units, as behind the product of a gated MLP.
        own = bool(((ids == whole) | (ids < 0)).all())
        everywhere = [n for n in before if own and torch.isin(whole, self.ledger.present(n)).all()]
        site = _only(sites.first(everywhere, whole), ids >= 0) or sites.first(before, ids)
        if site is None and point.h is not None and point.function in _SEEN_FROM_BEHIND:
            site = sites.first(downstream(self.ledger, point.h, ids, sole=False), ids)
            # max_pool(f(z)) is f(max_pool(z)): these never fall.
            pooled = upstream(self.ledger, point.z, ids, also="max_pool")
            site = site or sites.first(pooled, ids)
        if site is None and point.h is None:
            site = sites.first(downstream(self.ledger, point.z, ids, sole=False), ids)
            # Of a sum that no hook sees, each row is known by what it adds.
            site = site or sites.find(point.own, torch.where(ids >= 0, whole, -1))
        return site

    def _g_site(self, sites: Sites, point: Point, ids: Tensor) -> Site | None:
        """Return where the whole gradient to the activation is seen."""
        if point.h is None:
            return None
        return sites.first(downstream(self.ledger, point.h, ids, sole=True), ids)

    def _reason(self, unit: int) -> str:
        """Return why a unit cannot be re-initialised under its own name; "" when it can."""
        if self.code[unit]:
            text: str = self.ledger.texts[self.code[unit]]
            return text
        lead = self.ledger.find(unit)
        if lead not in self.read:
            return "nothing reads it"
        name: str = self.ledger.layer_at(lead).name
        return "" if lead == unit else f"re-initialised together with {name}"

    def _couplings(self, layer: Layer) -> tuple[Coupling, ...]:
        rows: dict[tuple[str, int], Tensor] = {}
        for unit in self.members.keys() & range(layer.start, layer.stop):
            slots: Counter[str] = Counter()
            for other in self.members[unit]:
                member = self.ledger.layer_at(other)
                key = member.name, slots[member.name]
                slots[member.name] += 1
                row_of_unit = rows.setdefault(key, torch.full((layer.n_units,), -1))
                row_of_unit[unit - layer.start] = other - member.start
        return tuple(Coupling(name, row_of_unit) for (name, _), row_of_unit in rows.items())


class _Group:
    """How units with the same activation function are measured.

    Args:
        units: bool [units of the layer].
        function: Name of the activation function.
        reason: Why it is unknown.
        norm: The BatchNorm before it.
        z_sites: Where the pre-activation is seen.
        g_sites: Where the gradient is seen.
    """

    def __init__(
        self, units: Tensor, function: str, reason: str, norm: str | None,
        z_sites: list[Site], g_sites: list[Site],
    ) -> None:  # fmt: skip
        self.units, self.function, self.reason, self.norm = units, function, reason, norm
        self.z_sites, self.g_sites = z_sites, g_sites


class _Measured:
    """How the units of a layer are measured over all of its calls.

    Args:
        calls: The groups of each call.

    Attributes:
        functions: The activation function of each unit.
        unknown: Why functions are unknown, with the numbers of units.
        norm: The BatchNorm before the activation function, if it is one for all units.
        z_sites, g_sites: Where pre-activations and gradients are seen.
    """

    def __init__(self, calls: Sequence[Sequence[_Group]]) -> None:
        self.functions = _of_units(calls[0], "function")
        why = _of_units(calls[0], "reason")
        for groups in calls[1:]:
            reasons = _of_units(groups, "reason")
            for unit, function in enumerate(_of_units(groups, "function")):
                if function != self.functions[unit]:
                    other = "its calls have different activation functions"
                    why[unit] = why[unit] or reasons[unit] or other
                    self.functions[unit] = "unknown"
        groups = [group for groups in calls for group in groups]
        self.unknown = dict(Counter(reason for reason in why if reason))
        norms = {group.norm for group in groups}
        self.norm = norms.pop() if len(norms) == 1 else None
        lost = torch.tensor([function == "unknown" for function in self.functions])
        self.z_sites = _joined((site for group in groups for site in group.z_sites), lost)
        self.g_sites = _joined((site for group in groups for site in group.g_sites), lost)


def _only(site: Site | None, units: Tensor) -> Site | None:
    """Return a site of a whole layer for some of its units alone, bool [units]."""
    if site is None:
        return None
    known = (site.unit_of_channel >= 0) & units[site.unit_of_channel]
    return replace(site, unit_of_channel=torch.where(known, site.unit_of_channel, -1))


def _of_units(groups: Sequence[_Group], key: str) -> list[str]:
    """Return an attribute of the group of each unit."""
    values = [""] * len(groups[0].units)
    for group in groups:
        for unit in group.units.nonzero().flatten().tolist():
            values[unit] = getattr(group, key)
    return values


def _joined(sites: Iterable[Site], lost: Tensor) -> tuple[Site, ...]:
    """Return every place once, with all units that are seen there, without those that are lost."""
    joined: dict[tuple[Any, ...], Tensor] = {}
    for site in sites:
        key = (site.module, site.where, site.unit_axis, len(site.unit_of_channel))
        here = torch.where((site.unit_of_channel >= 0) & lost[site.unit_of_channel], -1,
                           site.unit_of_channel)  # fmt: skip
        joined[key] = torch.maximum(joined[key], here) if key in joined else here
    return tuple(
        Site(module, where, axis, units)
        for (module, where, axis, _), units in joined.items()
        if bool((units >= 0).any())
    )


def _runs(functions: Sequence[str]) -> tuple[tuple[int, int, str], ...]:
    """Return the runs (start, stop, name) of units with one activation function each."""
    starts = [at for at in range(len(functions)) if at == 0 or functions[at] != functions[at - 1]]
    return tuple(
        (start, stop, functions[start])
        for start, stop in zip(starts, [*starts[1:], len(functions)], strict=True)
    )


def _inner(calls: Sequence[Layer]) -> set[str]:
    """Return the names of the layers that another weight layer depends on, in any mode."""
    nodes = {layer.node for layer in calls}
    leading: set[Node] = set()
    for graph in dict.fromkeys(node.graph for node in nodes):
        for node in reversed(graph.nodes):
            if any(user in nodes or user in leading for user in node.users):
                leading.add(node)
    return {layer.name for layer in calls if layer.node in leading}


def _own(layer: Layer, ids: Tensor, known: Tensor) -> Tensor | None:
    """Return the layer's unit at each index of `ids` (-1 elsewhere), or None when there is none."""
    inside = (ids >= layer.start) & (ids < layer.stop)
    local = torch.where(inside, ids - layer.start, 0).long()
    mapped = torch.where(inside & known[local], local, -1)
    return mapped if bool((mapped >= 0).any()) else None
