"""Wiring as plain JSON values and back: part of every profile and plan file.

An index map is {"size": n, "runs": [[start_column, start_unit, length, step], ...]}: entry
start_column + i holds unit start_unit + i * step; entries outside the runs are -1. What is read
is checked in full, because these maps decide where weights are written.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

import torch
from torch import Tensor

from fastplastic.files.fields import (
    FLAG,
    LIST,
    NAME,
    NAME_OR_NULL,
    NAMES,
    OBJECT,
    TEXT,
    Check,
    Fields,
    integer,
    one_of,
)
from fastplastic.wiring import Consumer, Coupling, Norm, Site, UnitLayer, Where

_KINDS = ("linear", "conv", "depthwise conv", "conv transpose", "conv1d")
# A few hundred bytes of JSON can ask for any amount of memory: all maps of one file share this.
_MAX_ENTRIES = 2**26
_MAX_DIM = 8
_WAY_OUT = "; the file is damaged or from another program: write it again"
_RUN = Check("four integers", lambda run: _is_list_of(run, int, int, int, int))
_ACTIVATION = Check("[start, stop, name]", lambda run: _is_list_of(run, int, int, str))


def encode_layer(layer: UnitLayer) -> dict[str, Any]:
    """Return the layer as values that `json.dumps` takes."""
    return {
        "name": layer.name,
        "kind": layer.kind,
        "weight": layer.weight,
        "bias": layer.bias,
        "unit_dim": layer.unit_dim,
        "n_units": layer.n_units,
        "norm": layer.norm,
        "activations": [list(run) for run in layer.activations],
        "hidden": _encode_map(torch.where(layer.hidden, torch.arange(layer.n_units), -1)),
        "reasons": dict(layer.reasons),
        "norms": [
            {"name": norm.name, "unit_of_channel": _encode_map(norm.unit_of_channel)}
            for norm in layer.norms
        ],
        "coupled": [
            {"name": member.name, "row_of_unit": _encode_map(member.row_of_unit)}
            for member in layer.coupled
        ],
        "consumers": [_encode_consumer(consumer) for consumer in layer.consumers],
        "z_sites": [_encode_site(site) for site in layer.z_sites],
        "g_sites": [_encode_site(site) for site in layer.g_sites],
        "transformed": layer.transformed,
        "head": layer.head,
        "unknown": dict(layer.unknown),
        "tied": list(layer.tied),
        "without_grad": list(layer.without_grad),
    }


def decode_layers(values: object) -> tuple[UnitLayer, ...]:
    """Return the layers that `encode_layer` wrote, names all different.

    Raises:
        FileError: A field is missing or has another type, an index is out of range, two layers have
            one name, or all maps together have more than 2**26 entries.
    """
    decoder = _Decoder()
    top = Fields({"layers": values}, _WAY_OUT)
    if not isinstance(values, list):
        raise top.damaged("the list of layers", values, "a list")
    layers = tuple(decoder.layer(top.inside(value, "a layer")) for value in values)
    names = [layer.name for layer in layers]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise top.damaged("a layer name", twice, "different from all others")
    return layers


def _encode_consumer(consumer: Consumer) -> dict[str, Any]:
    return {
        "name": consumer.name,
        "weight": consumer.weight,
        "column_dim": consumer.column_dim,
        "groups": consumer.groups,
        "unit_of_column": _encode_map(consumer.unit_of_column),
    }


def _encode_site(site: Site) -> dict[str, Any]:
    return {
        "module": site.module,
        "where": site.where,
        "unit_axis": site.unit_axis,
        "unit_of_channel": _encode_map(site.unit_of_channel),
    }


def _encode_map(index: Tensor) -> dict[str, Any]:
    values = index.tolist()
    runs = []
    start = 0
    while start < len(values):
        length, step = _run_at(values, start)
        if values[start] >= 0:
            runs.append([start, values[start], length, step])
        start += length
    return {"size": len(values), "runs": runs}


def _run_at(values: Sequence[int], start: int) -> tuple[int, int]:
    """Return the longest arithmetic run from `start`, all its entries >= 0 or all -1."""
    first = values[start]
    if start + 1 == len(values) or (first < 0) != (values[start + 1] < 0):
        return 1, 0
    step = values[start + 1] - first
    low = min(first, 0)
    end = start + 2
    while end < len(values) and low <= values[end] == values[end - 1] + step:
        end += 1
    return end - start, step


class _Decoder:
    """Reads fields with their checks; counts the entries of all maps against one budget."""

    def __init__(self) -> None:
        self.left = _MAX_ENTRIES

    def layer(self, value: Fields) -> UnitLayer:
        name = value.get("name", NAME)
        own = value.inside(_completed(value.values), f"layer {name[:80]!r}")
        units = own.get("n_units", integer(1, _MAX_ENTRIES))
        return UnitLayer(
            name=name,
            kind=own.get("kind", one_of(_KINDS)),
            weight=own.get("weight", NAME),
            bias=own.get("bias", NAME_OR_NULL),
            unit_dim=own.get("unit_dim", integer(0, _MAX_DIM)),
            n_units=units,
            norm=own.get("norm", NAME_OR_NULL),
            activations=_activations(own, units),
            hidden=self.index(own, "hidden", units, size=units) >= 0,
            reasons=_numbers(own, "reasons", units),
            norms=tuple(
                Norm(v.get("name", NAME), self.index(v, "unit_of_channel", units))
                for v in _objects(own, "norms")
            ),
            coupled=tuple(
                Coupling(
                    v.get("name", NAME), self.index(v, "row_of_unit", _MAX_ENTRIES, size=units)
                )
                for v in _objects(own, "coupled")
            ),
            consumers=tuple(self.consumer(v, units) for v in _objects(own, "consumers")),
            z_sites=tuple(self.site(v, units) for v in _objects(own, "z_sites")),
            g_sites=tuple(self.site(v, units) for v in _objects(own, "g_sites")),
            transformed=own.get("transformed", FLAG),
            head=own.get("head", FLAG),
            unknown=_numbers(own, "unknown", units),
            tied=tuple(own.get("tied", NAMES)),
            without_grad=tuple(own.get("without_grad", NAMES)),
        )

    def consumer(self, value: Fields, units: int) -> Consumer:
        return Consumer(
            name=value.get("name", NAME),
            weight=value.get("weight", NAME),
            column_dim=value.get("column_dim", integer(0, _MAX_DIM)),
            groups=value.get("groups", integer(1, _MAX_ENTRIES)),
            unit_of_column=self.index(value, "unit_of_column", units),
        )

    def site(self, value: Fields, units: int) -> Site:
        return Site(
            module=value.get("module", TEXT),
            where=value.get("where", one_of(get_args(Where))),
            unit_axis=value.get("unit_axis", integer(-_MAX_DIM, _MAX_DIM)),
            unit_of_channel=self.index(value, "unit_of_channel", units),
        )

    def index(self, value: Fields, key: str, bound: int, size: int | None = None) -> Tensor:
        """Return the map under `key`; its entries are below `bound`."""
        own = value.inside(value.get(key, OBJECT), f"{value.where} {key}")
        entries: int = own.get("size", integer(0, self.left))
        if size is not None and entries != size:
            raise own.damaged(f"{own.where}: size", entries, f"{size}, one entry per unit")
        self.left -= entries
        index = torch.full((entries,), -1, dtype=torch.int64)
        free = 0
        for run in own.get("runs", LIST):
            free = _write_run(index, run, own, bound, free)
        return index


def _completed(value: Mapping[str, object]) -> Mapping[str, object]:
    """Return a layer with the fields that files did not always have."""
    added: dict[str, object] = {"without_grad": []}
    if "z_site" in value:
        added |= {"z_sites": [], "g_sites": [], "unknown": {}, "tied": []}
    return added | dict(value)


def _is_list_of(value: object, *kinds: type) -> bool:
    return isinstance(value, list) and [type(item) for item in value] == list(kinds)


def _objects(value: Fields, key: str) -> Iterator[Fields]:
    """Yield the objects of a list."""
    for item in value.get(key, LIST):
        yield value.inside(item, f"{value.where} {key}")


def _numbers(value: Fields, key: str, most: int) -> dict[str, int]:
    """Return an object of numbers of units."""
    own = value.inside(value.get(key, OBJECT), f"{value.where} {key}")
    return {name: own.get(name, integer(0, most)) for name in own.values}


def _write_run(index: Tensor, run: Any, own: Fields, bound: int, free: int) -> int:
    """Write one run that starts at `free` or later; return where the next one may start."""
    if not _RUN.fits(run):
        raise own.damaged(f"{own.where}: a run", run, _RUN.expected)
    start, unit, length, step = run
    last = unit + (length - 1) * step
    inside = free <= start and 1 <= length <= index.numel() - start
    if not (inside and 0 <= unit < bound and 0 <= last < bound):
        raise own.damaged(
            f"{own.where}: a run", run, f"[start, unit, length, step] in {index.numel()} free "
            f"entries, units in 0..{bound - 1}",
        )  # fmt: skip
    index[start : start + length] = unit + step * torch.arange(length)
    stop: int = start + length
    return stop


def _activations(value: Fields, units: int) -> tuple[tuple[int, int, str], ...]:
    """Return the runs of activation functions: in order, together all units."""
    runs = []
    free = 0
    what = f"{value.where}: an activation run"
    for run in value.get("activations", LIST):
        if not _ACTIVATION.fits(run):
            raise value.damaged(what, run, _ACTIVATION.expected)
        start, stop, name = run
        if start != free or not start < stop <= units:
            raise value.damaged(what, run, f"a range from {free}, in {units}")
        runs.append((start, stop, name))
        free = stop
    if free != units:
        raise value.damaged(f"{value.where}: the end of its activation runs", free, f"{units}")
    return tuple(runs)
