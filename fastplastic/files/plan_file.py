"""Plans as files, checked in full when they are read.

Units are JSON that can be read line by line: one line per selected layer with its units and scores,
then one line per wired layer. Masks of single weights are safetensors: one bit for each element, in
row-major order from the lowest bit on, with all the rest as JSON metadata. A plan decides where
weights are written, and it may have been edited by hand, so nothing in it is trusted.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastplastic import __version__
from fastplastic.errors import FileError, InputError
from fastplastic.files.atomic import atomic_write
from fastplastic.files.fields import (
    LIST,
    TEXT,
    TEXTS,
    Check,
    Fields,
    integer,
    is_integer,
    is_number,
    one_of,
    parse_object,
    shown,
)
from fastplastic.files.formats import is_safetensors
from fastplastic.files.plan_edits import notes_of_edits
from fastplastic.files.wiring_json import decode_layers, encode_layer
from fastplastic.wiring import UnitLayer

SCHEMA_VERSION = 1
_KIND = "fastplastic plan"
_KEY, _MASK = "fastplastic", "mask/"
_WAY_OUT = ": correct the file or write the plan again"
_SHAPE = Check(
    "a list of integers from 0 on",
    lambda v: isinstance(v, list) and all(is_integer(size) and size >= 0 for size in v),
)
_UNITS = Check("a list of integers", lambda value: isinstance(value, list))
# {name: check} of what was asked for, for a plan of this granularity.
RequestChecks = Callable[[str], Mapping[str, Check]]


@dataclass(frozen=True, eq=False)
class StoredPlan:
    """What a file holds of a plan; the names are those of `planning.Plan`.

    `beyond` is written for whoever reads the file, and made anew from the scores by who loads it.
    """

    request: Mapping[str, Any]
    fingerprint: str
    eligible: int
    wiring: Mapping[str, UnitLayer]
    units: Mapping[str, Tensor] = field(default_factory=dict)
    scores: Mapping[str, Tensor] = field(default_factory=dict)
    masks: Mapping[str, Tensor] = field(default_factory=dict)
    notes: Sequence[str] = ()
    beyond: int | None = None


def write_plan(stored: StoredPlan, path: str | Path, *, force: bool = False) -> None:
    """Write a plan: units as JSON, masks as safetensors.

    Raises:
        FileError: The path cannot be written, or exists and `force` is false.
        InputError: Masks are to be written to a file whose name does not end in .safetensors, or
            units to one whose name does.
    """
    granularity = stored.request["granularity"]
    masks = granularity == "weight"
    if masks != (Path(path).suffix == ".safetensors"):
        expected = "that ends in" if masks else "that does not end in"
        raise InputError(
            f"{path}: expected a name {expected} .safetensors for a plan of {granularity}s"
        )
    with atomic_write(path, force) as temporary:
        if masks:
            _save_masks(stored, path, temporary)
        else:
            temporary.write_text(_text(_encode(stored)), encoding="utf-8")


def read_plan(path: str | Path, checks: RequestChecks) -> StoredPlan:
    """Read a plan and check all of it.

    Args:
        path: The file.
        checks: Gives the checks of what was asked for.

    Raises:
        FileError: The file is missing, not a plan, of another version, or inconsistent.
    """
    try:
        if is_safetensors(Path(path)):
            return _load_masks(path, checks("weight"))
        text = Path(path).read_text(encoding="utf-8")
        return _decode(_parse(text), checks("unit"))
    except OSError as error:
        raise _unreadable(path, error.strerror or error) from None
    except SafetensorError as error:
        raise _unreadable(path, str(error).partition("\n")[0][:200]) from None
    except UnicodeDecodeError:
        raise FileError(
            f"{path}: is not text, expected a plan file: write the plan again"
        ) from None
    except FileError as error:
        raise FileError(f"{path}: {error}") from None


def _unreadable(path: str | Path, reason: object) -> FileError:
    return FileError(f"{path}: cannot be read ({reason}): expected a plan file")


def _save_masks(stored: StoredPlan, path: str | Path, temporary: Path) -> None:
    counts = {name: int(mask.count_nonzero()) for name, mask in stored.masks.items()}
    entries = [
        {"name": name, "shape": list(mask.shape), "selected": counts[name]}
        for name, mask in stored.masks.items()
    ]
    header = {
        **_head(stored, sum(counts.values())), "masks": entries,
        "wiring": [encode_layer(layer) for layer in stored.wiring.values()],
    }  # fmt: skip
    bits = {_MASK + name: _packed(mask) for name, mask in stored.masks.items()}
    try:
        save_file(bits, temporary, {_KEY: json.dumps(header, allow_nan=False)})
    except SafetensorError as error:
        raise FileError(f"{path}: cannot be written ({error}): free space?") from error


def _packed(mask: Tensor) -> Tensor:
    return torch.from_numpy(np.packbits(mask.contiguous().numpy().reshape(-1), bitorder="little"))


def _load_masks(path: str | Path, checks: Mapping[str, Check]) -> StoredPlan:
    with safe_open(path, framework="pt") as file:
        text = (file.metadata() or {}).get(_KEY)
        bits = {name: file.get_tensor(name) for name in file.keys()}
    if text is None:
        raise FileError("holds tensors but no plan, expected what Plan.save wrote: check the name")
    values = _parse(text)
    wiring = {layer.name: layer for layer in decode_layers(values.values.get("wiring"))}
    masks: dict[str, Tensor] = {}
    for item in values.get("masks", LIST):
        entry = values.inside(item, "an element of 'masks'")
        name = entry.get("name", TEXT)
        if name in masks:
            raise values.damaged("mask", name, "named once")
        masks[name] = _unpacked(values.inside(item, ""), name, bits.pop(_MASK + name, None))
    if bits:
        raise values.damaged("tensor", next(iter(bits)), "listed in 'masks'")
    count = sum(int(mask.count_nonzero()) for mask in masks.values())
    return StoredPlan(wiring=wiring, masks=masks, **_decode_head(values, count, checks))


def _unpacked(entry: Fields, name: str, bits: Tensor | None) -> Tensor:
    where = f"mask {name[:80]!r}"
    shape = entry.get("shape", _SHAPE)
    size = math.prod(shape)
    if bits is None or bits.dtype != torch.uint8 or bits.shape != (-(-size // 8),):
        found = "missing" if bits is None else f"{bits.dtype} {tuple(bits.shape)}"
        expected = f"torch.uint8 ({-(-size // 8)},) for {size} elements"
        raise entry.damaged(where, found, expected)
    flat = np.unpackbits(bits.numpy(), bitorder="little")
    mask = torch.from_numpy(flat[:size]).view(torch.bool).reshape(shape)
    selected = int(mask.count_nonzero())
    if flat[size:].any() or selected == 0:
        found = f"{selected} of {size} bits"
        raise entry.damaged(where, found, "at least one, and none after the last")
    entry.get("selected", Check(f"{selected}, the number of its bits", lambda v: v == selected))
    return mask


def _head(stored: StoredPlan, count: int) -> dict[str, Any]:
    return {
        "kind": _KIND,
        "schema_version": SCHEMA_VERSION,
        "fastplastic_version": __version__,
        "fingerprint": stored.fingerprint,
        **stored.request,
        "count": count,
        **({} if stored.beyond is None else {"beyond": stored.beyond}),
        "eligible": stored.eligible,
        "notes": list(stored.notes),
    }


def _encode(stored: StoredPlan) -> dict[str, Any]:
    return {
        **_head(stored, sum(map(len, stored.units.values()))),
        "layers": [
            {"name": name, "units": units.tolist(), "scores": stored.scores[name].tolist()}
            for name, units in stored.units.items()
        ],
        "wiring": [encode_layer(layer) for layer in stored.wiring.values()],
    }


def _text(values: dict[str, Any]) -> str:
    """Return JSON with one line per entry, and one per element of a list."""
    return (
        "{\n" + ",\n".join(f'  "{key}": {_entry(value)}' for key, value in values.items()) + "\n}\n"
    )


def _entry(value: object) -> str:
    if not isinstance(value, list) or not value:
        return json.dumps(value, allow_nan=False)
    lines = ",\n".join(f"    {json.dumps(element, allow_nan=False)}" for element in value)
    return f"[\n{lines}\n  ]"


def _parse(text: str) -> Fields:
    values = parse_object(text, "a plan")
    if values.get("kind") != _KIND:
        raise FileError(f"is JSON but not a plan, expected kind {_KIND!r}: check the file name")
    version = values.get("schema_version")
    if not is_integer(version) or version != SCHEMA_VERSION:
        raise FileError(
            f"schema_version is {shown(version)}, expected {SCHEMA_VERSION}: "
            "write the plan again with this version of fastplastic"
        )
    return Fields(values, _WAY_OUT)


def _decode(values: Fields, checks: Mapping[str, Check]) -> StoredPlan:
    wiring = {layer.name: layer for layer in decode_layers(values.values.get("wiring"))}
    units, scores = _decode_layers(values, wiring)
    for name in units:
        _check_members(values, wiring[name], wiring)
    count = sum(len(selected) for selected in units.values())
    head = _decode_head(values, count, checks)
    return StoredPlan(wiring=wiring, units=units, scores=scores, **head)


def _decode_head(values: Fields, count: int, checks: Mapping[str, Check]) -> dict[str, Any]:
    return {
        "eligible": values.get("eligible", integer(count)),
        "request": {name: values.get(name, check) for name, check in checks.items()},
        "fingerprint": values.get("fingerprint", TEXT),
        "notes": (*values.get("notes", TEXTS), *notes_of_edits(values, checks, count)),
    }


def _decode_layers(
    values: Fields, wiring: Mapping[str, UnitLayer]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    units: dict[str, Tensor] = {}
    scores: dict[str, Tensor] = {}
    for item in values.get("layers", LIST):
        values.inside(item, "an element of 'layers'")
        entry = values.inside(item, "")
        name = entry.get("name", one_of(wiring, "a layer of 'wiring'"))
        if name in units:
            raise values.damaged("layer", name, "named once")
        if entry.values.get("units") == []:
            continue
        units[name], order = _decode_units(entry, wiring[name]).sort()
        scores[name] = _decode_scores(entry, len(order))[order]
    return units, scores


def _decode_units(entry: Fields, layer: UnitLayer) -> Tensor:
    where = f"units of layer {layer.name!r}"
    units = entry.get("units", _UNITS)
    seen: set[int] = set()
    for unit in units:
        if not is_integer(unit) or not 0 <= unit < layer.n_units:
            raise entry.damaged(where, unit, f"an integer in 0..{layer.n_units - 1}")
        if unit in seen:
            raise entry.damaged(where, unit, "each unit once")
        if not layer.hidden[unit]:
            raise entry.damaged(
                where, unit, "units that can be re-initialised (hidden in 'wiring')"
            )
        seen.add(unit)
    return torch.tensor(units, dtype=torch.int64)


def _decode_scores(entry: Fields, count: int) -> Tensor:
    check = Check(
        f"a list of {count} numbers, one per unit",
        lambda v: isinstance(v, list) and len(v) == count and all(map(is_number, v)),
    )
    return torch.tensor(entry.get("scores", check), dtype=torch.float64)


def _check_members(values: Fields, layer: UnitLayer, wiring: Mapping[str, UnitLayer]) -> None:
    for member in layer.coupled:
        where = f"coupled layer of {layer.name!r}"
        if member.name not in wiring:
            raise values.damaged(where, member.name, "a layer of 'wiring'")
        rows = wiring[member.name].n_units
        if (member.row_of_unit >= rows).any():
            largest = int(member.row_of_unit.max())
            what = f"row of {member.name!r}"
            raise values.damaged(what, largest, f"an integer in 0..{rows - 1}")
