"""Wiring as plain JSON values and back: part of every profile and plan file.

An index map is {"size": n, "runs": [[start_column, start_unit, length, step], ...]}: entry
start_column + i holds unit start_unit + i * step; entries outside the runs are -1. What is read
is checked in full, because these maps decide where weights are written.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastplastic.errors import FileError
from fastplastic.wiring import Consumer, Coupling, Norm, Site, UnitLayer

_KINDS = ("linear", "conv", "depthwise conv", "conv transpose", "conv1d")
# A few hundred bytes of JSON can ask for any amount of memory: all maps of one file share this.
_MAX_ENTRIES = 2**26
_MAX_DIM = 8


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
    }


def decode_layer(value: object) -> UnitLayer:
    """Return the layer that `encode_layer` wrote.

    Raises:
        FileError: A field is missing, has another type, or an index is out of range.
    """
    return decode_layers([value])[0]


def decode_layers(values: object) -> tuple[UnitLayer, ...]:
    """Return the layers that `encode_layer` wrote, names all different.

    Raises:
        FileError: As `decode_layer`; also when two layers have one name, or all maps together
            have more than 2**26 entries.
    """
    decoder = _Decoder()
    if not isinstance(values, list):
        raise _damaged("the list of layers", values, "a list")
    layers = tuple(decoder.layer(value) for value in values)
    names = [layer.name for layer in layers]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise _damaged("a layer name", twice, "different from all others")
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


def _damaged(where: str, value: object, expected: str) -> FileError:
    text = repr(value)
    shown = text if len(text) <= 60 else text[:57] + "..."
    return FileError(
        f"{where} is {shown}, expected {expected}; the file is damaged or from another program: "
        "write it again"
    )


class _Decoder:
    """Reads fields with their checks; counts the entries of all maps against one budget."""

    def __init__(self) -> None:
        self.left = _MAX_ENTRIES

    def layer(self, value: object) -> UnitLayer:
        where = "a layer"
        name = _text(value, "name", where)
        value = _completed(value)
        where = f"layer {name[:80]!r}"
        units = _integer(value, "n_units", where, 1, _MAX_ENTRIES)
        reasons = _field(value, "reasons", where, dict, "an object")
        unknown = _field(value, "unknown", where, dict, "an object")
        return UnitLayer(
            name=name,
            kind=_choice(value, "kind", where, _KINDS),
            weight=_text(value, "weight", where),
            bias=_optional_text(value, "bias", where),
            unit_dim=_integer(value, "unit_dim", where, 0, _MAX_DIM),
            n_units=units,
            norm=_optional_text(value, "norm", where),
            activations=_activations(value, where, units),
            hidden=self.index(value, "hidden", where, units, size=units) >= 0,
            reasons={key: _integer(reasons, key, where, 0, units) for key in reasons},
            norms=tuple(
                Norm(_text(v, "name", where), self.index(v, "unit_of_channel", where, units))
                for v in _list(value, "norms", where)
            ),
            coupled=tuple(
                Coupling(
                    _text(v, "name", where),
                    self.index(v, "row_of_unit", where, _MAX_ENTRIES, size=units),
                )
                for v in _list(value, "coupled", where)
            ),
            consumers=tuple(
                self.consumer(v, where, units) for v in _list(value, "consumers", where)
            ),
            z_sites=self.sites(value, "z_sites", where, units),
            g_sites=self.sites(value, "g_sites", where, units),
            transformed=_field(value, "transformed", where, bool, "true or false"),
            head=_field(value, "head", where, bool, "true or false"),
            unknown={key: _integer(unknown, key, where, 0, units) for key in unknown},
            tied=_names(value, "tied", where),
        )

    def consumer(self, value: object, where: str, units: int) -> Consumer:
        return Consumer(
            name=_text(value, "name", where),
            weight=_text(value, "weight", where),
            column_dim=_integer(value, "column_dim", where, 0, _MAX_DIM),
            groups=_integer(value, "groups", where, 1, _MAX_ENTRIES),
            unit_of_column=self.index(value, "unit_of_column", where, units),
        )

    def sites(self, value: object, key: str, where: str, units: int) -> tuple[Site, ...]:
        where_sites = f"{where} {key}"
        return tuple(self.site(site, where_sites, units) for site in _list(value, key, where))

    def site(self, site: object, where: str, units: int) -> Site:
        side = _choice(site, "where", where, ("input", "output"))
        return Site(
            module=_field(site, "module", where, str, "a string"),
            where="input" if side == "input" else "output",
            unit_axis=_integer(site, "unit_axis", where, -_MAX_DIM, _MAX_DIM),
            unit_of_channel=self.index(site, "unit_of_channel", where, units),
        )

    def index(
        self, value: object, key: str, where: str, bound: int, size: int | None = None
    ) -> Tensor:
        """Return the map under `key`; its entries are below `bound`."""
        where = f"{where} {key}"
        value = _field(value, key, where, dict, "an object")
        entries = _integer(value, "size", where, 0, self.left)
        if size is not None and entries != size:
            raise _damaged(f"{where}: size", entries, f"{size}, one entry per unit")
        self.left -= entries
        index = torch.full((entries,), -1, dtype=torch.int64)
        free = 0
        for run in _list(value, "runs", where):
            free = _write_run(index, run, where, bound, free)
        return index


def _completed(value: object) -> object:
    """Return a layer with the fields that files did not always have."""
    assert isinstance(value, Mapping)
    added: dict[str, object] = {"z_sites": [], "g_sites": [], "unknown": {}, "tied": []}
    return value if "z_site" not in value else added | dict(value)


def _write_run(index: Tensor, run: object, where: str, bound: int, free: int) -> int:
    """Write one run that starts at `free` or later; return where the next one may start."""
    if not isinstance(run, list) or len(run) != 4 or any(type(v) is not int for v in run):
        raise _damaged(f"{where}: a run", run, "four integers")
    start, unit, length, step = run
    last = unit + (length - 1) * step
    inside = free <= start and 1 <= length <= index.numel() - start
    if not (inside and 0 <= unit < bound and 0 <= last < bound):
        raise _damaged(
            f"{where}: a run", run, f"[start, unit, length, step] in {index.numel()} free entries, "
            f"units in 0..{bound - 1}",
        )  # fmt: skip
    index[start : start + length] = unit + step * torch.arange(length)
    stop: int = start + length
    return stop


def _field(value: object, key: str, where: str, kind: type, expected: str) -> Any:
    if not isinstance(value, Mapping):
        raise _damaged(where, value, "an object")
    if key not in value:
        raise _damaged(f"{where}: {key!r}", "missing", expected)
    found = value[key]
    # bool is an int in Python, but not in JSON.
    if not isinstance(found, kind) or (kind is int and isinstance(found, bool)):
        raise _damaged(f"{where}: {key!r}", found, expected)
    return found


def _text(value: object, key: str, where: str) -> str:
    text: str = _field(value, key, where, str, "a string")
    if not text:
        raise _damaged(f"{where}: {key!r}", text, "a string that is not empty")
    return text


def _optional_text(value: object, key: str, where: str) -> str | None:
    missing = _field(value, key, where, object, "present") is None
    return None if missing else _text(value, key, where)


def _names(value: object, key: str, where: str) -> tuple[str, ...]:
    names = _list(value, key, where)
    if not all(isinstance(name, str) and name for name in names):
        raise _damaged(f"{where}: {key!r}", names, "a list of names")
    return tuple(names)


def _choice(value: object, key: str, where: str, choices: Sequence[str]) -> str:
    text = _text(value, key, where)
    if text not in choices:
        raise _damaged(f"{where}: {key!r}", text, f"one of {', '.join(choices)}")
    return text


def _integer(value: object, key: str, where: str, low: int, high: int) -> int:
    expected = f"an integer in {low}..{high}"
    number: int = _field(value, key, where, int, expected)
    if not low <= number <= high:
        raise _damaged(f"{where}: {key!r}", number, expected)
    return number


def _list(value: object, key: str, where: str) -> list[Any]:
    found: list[Any] = _field(value, key, where, list, "a list")
    return found


def _activations(value: object, where: str, units: int) -> tuple[tuple[int, int, str], ...]:
    """Return the runs of activation functions: in order, together all units."""
    runs = []
    free = 0
    for run in _list(value, "activations", where):
        if not isinstance(run, list) or [type(v) for v in run] != [int, int, str]:
            raise _damaged(f"{where}: an activation run", run, "[start, stop, name]")
        start, stop, name = run
        if start != free or not start < stop <= units:
            raise _damaged(f"{where}: an activation run", run, f"a range from {free}, in {units}")
        runs.append((start, stop, name))
        free = stop
    if free != units:
        raise _damaged(f"{where}: the end of its activation runs", free, f"{units}")
    return tuple(runs)
