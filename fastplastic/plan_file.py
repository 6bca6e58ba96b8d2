"""Plans as files, checked in full when they are read.

Units are JSON that can be read line by line: one line per selected layer with its units and scores,
then one line per wired layer. Masks of single weights are safetensors: one bit for each element, in
row-major order from the lowest bit on, with all the rest as JSON metadata. A plan decides where
weights are written, and it may have been edited by hand, so nothing in it is trusted.
"""

import json
import math
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastplastic import __version__
from fastplastic.checkpoint import atomic_write, is_safetensors
from fastplastic.criteria import CRITERIA, WEIGHT_CRITERIA
from fastplastic.errors import FileError, InputError
from fastplastic.planner import SCOPES, Plan
from fastplastic.wiring import UnitLayer
from fastplastic.wiring_json import decode_layers, encode_layer

SCHEMA_VERSION = 1
_KIND = "fastplastic plan"
_KEY, _MASK = "fastplastic", "mask/"


def save_plan(plan: Plan, path: str | Path, *, force: bool = False) -> None:
    """Write a plan: units as JSON, masks as safetensors.

    Raises:
        FileError: The path cannot be written, or exists and `force` is false.
        InputError: Masks are to be written to a file whose name does not end in .safetensors, or
            units to one whose name does.
    """
    masks = plan.granularity == "weight"
    if masks != (Path(path).suffix == ".safetensors"):
        expected = "that ends in" if masks else "that does not end in"
        raise InputError(
            f"{path}: expected a name {expected} .safetensors for a plan of {plan.granularity}s"
        )
    with atomic_write(path, force) as temporary:
        if masks:
            _save_masks(plan, path, temporary)
        else:
            temporary.write_text(_text(_encode(plan)), encoding="utf-8")


def load_plan(path: str | Path) -> Plan:
    """Read a plan and check all of it.

    Raises:
        FileError: The file is missing, not a plan, of another version, or inconsistent.
    """
    try:
        if is_safetensors(Path(path)):
            return _load_masks(path)
        text = Path(path).read_text(encoding="utf-8")
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
    try:
        return _decode(_parse(text))
    except FileError as error:
        raise FileError(f"{path}: {error}") from None


def _unreadable(path: str | Path, reason: object) -> FileError:
    return FileError(f"{path}: cannot be read ({reason}): expected a plan file")


def _save_masks(plan: Plan, path: str | Path, temporary: Path) -> None:
    counts = plan.counts
    entries = [
        {"name": name, "shape": list(mask.shape), "selected": counts[name]}
        for name, mask in plan.masks.items()
    ]
    header = {
        **_head(plan), "masks": entries,
        "wiring": [encode_layer(layer) for layer in plan.wiring.values()],
    }  # fmt: skip
    bits = {_MASK + name: _packed(mask) for name, mask in plan.masks.items()}
    try:
        save_file(bits, temporary, {_KEY: json.dumps(header, allow_nan=False)})
    except SafetensorError as error:
        raise FileError(f"{path}: cannot be written ({error}): free space?") from error


def _packed(mask: Tensor) -> Tensor:
    return torch.from_numpy(np.packbits(mask.contiguous().numpy().reshape(-1), bitorder="little"))


def _load_masks(path: str | Path) -> Plan:
    with safe_open(path, framework="pt") as file:
        text = (file.metadata() or {}).get(_KEY)
        bits = {name: file.get_tensor(name) for name in file.keys()}
    if text is None:
        raise FileError("holds tensors but no plan, expected what Plan.save wrote: check the name")
    values = _parse(text)
    wiring = {layer.name: layer for layer in decode_layers(values.get("wiring"))}
    masks = {}
    for entry in _get(values, "masks", "a list", lambda value: isinstance(value, list)):
        if not isinstance(entry, dict):
            raise _damaged("an element of 'masks'", entry, "an object")
        name = _get(entry, "name", "a string", lambda value: isinstance(value, str))
        if name in masks:
            raise _damaged("mask", name, "named once")
        masks[name] = _unpacked(entry, bits.pop(_MASK + name, None))
    if bits:
        raise _damaged("tensor", next(iter(bits)), "listed in 'masks'")
    count = sum(int(mask.count_nonzero()) for mask in masks.values())
    return Plan(
        units={}, scores={}, wiring=wiring, masks=masks,
        **_decode_head(values, count, "weight", WEIGHT_CRITERIA),
    )  # fmt: skip


def _unpacked(entry: dict[str, Any], bits: Tensor | None) -> Tensor:
    where = f"mask {entry['name'][:80]!r}"
    shape = _get(entry, "shape", "a list of integers from 0 on", _is_shape)
    size = math.prod(shape)
    if bits is None or bits.dtype != torch.uint8 or bits.shape != (-(-size // 8),):
        found = "missing" if bits is None else f"{bits.dtype} {tuple(bits.shape)}"
        raise _damaged(where, found, f"torch.uint8 ({-(-size // 8)},) for {size} elements")
    flat = np.unpackbits(bits.numpy(), bitorder="little")
    mask = torch.from_numpy(flat[:size]).view(torch.bool).reshape(shape)
    selected = int(mask.count_nonzero())
    if flat[size:].any() or selected == 0:
        raise _damaged(where, f"{selected} of {size} bits", "at least one, and none after the last")
    _get(entry, "selected", f"{selected}, the number of its bits", lambda v: v == selected)
    return mask


def _head(plan: Plan) -> dict[str, Any]:
    return {
        "kind": _KIND,
        "schema_version": SCHEMA_VERSION,
        "fastplastic_version": __version__,
        "fingerprint": plan.fingerprint,
        "criterion": plan.criterion,
        "granularity": plan.granularity,
        "ratio": plan.ratio,
        "threshold": plan.threshold,
        "scope": plan.scope,
        "max_layer_fraction": plan.max_layer_fraction,
        "seed": plan.seed,
        "count": plan.count,
        "eligible": plan.eligible,
        "notes": list(plan.notes),
    }


def _encode(plan: Plan) -> dict[str, Any]:
    return {
        **_head(plan),
        "layers": [
            {"name": name, "units": units.tolist(), "scores": plan.scores[name].tolist()}
            for name, units in plan.units.items()
        ],
        "wiring": [encode_layer(layer) for layer in plan.wiring.values()],
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


def _parse(text: str) -> dict[str, Any]:
    try:
        values = json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    # Too many digits in a number is a ValueError, too deep nesting a RecursionError.
    except (ValueError, RecursionError) as error:
        reason = str(error).partition("\n")[0]
        raise FileError(f"is not a plan in JSON ({reason}): write the plan again") from None
    if not isinstance(values, dict) or values.get("kind") != _KIND:
        raise FileError(f"is JSON but not a plan, expected kind {_KIND!r}: check the file name")
    version = values.get("schema_version")
    if type(version) is not int or version != SCHEMA_VERSION:
        raise FileError(
            f"schema_version is {_shown(version)}, expected {SCHEMA_VERSION}: "
            "write the plan again with this version of fastplastic"
        )
    return values


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{_shown(twice)} stands twice in one object")
    return values


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is not a number in JSON")


def _decode(values: dict[str, Any]) -> Plan:
    wiring = {layer.name: layer for layer in decode_layers(values.get("wiring"))}
    units, scores = _decode_layers(values, wiring)
    for name in units:
        _check_members(wiring[name], wiring)
    count = sum(len(selected) for selected in units.values())
    head = _decode_head(values, count, "unit", CRITERIA)
    return Plan(units=units, scores=scores, wiring=wiring, **head)


def _decode_head(
    values: dict[str, Any], count: int, granularity: str, criteria: Collection[str]
) -> dict[str, Any]:
    ratio, threshold = _decode_amounts(values)
    return {
        "eligible": _get(values, "eligible", f"an integer from {count} on", _integer_from(count)),
        "criterion": _get(values, "criterion", f"one of {', '.join(criteria)}", _among(criteria)),
        "ratio": ratio,
        "threshold": threshold,
        "scope": _get(values, "scope", "'layer' or 'global'", _among(SCOPES)),
        "granularity": _get(values, "granularity", repr(granularity), _among([granularity])),
        "max_layer_fraction": _get(values, "max_layer_fraction", "in (0, 1]", _is_share),
        "seed": _get(values, "seed", "an integer", lambda value: type(value) is int),
        "fingerprint": _get(values, "fingerprint", "a string", lambda v: isinstance(v, str)),
        "notes": tuple(_get(values, "notes", "a list of strings", _is_texts)),
    }


def _decode_amounts(values: dict[str, Any]) -> tuple[float | None, float | None]:
    ratio = _get(values, "ratio", "null or in (0, 1]", lambda v: v is None or _is_share(v))
    threshold = _get(values, "threshold", "null or a number", lambda v: v is None or _is_number(v))
    if (ratio is None) == (threshold is None):
        raise FileError("ratio and threshold: expected exactly one of them: write the plan again")
    return ratio, None if threshold is None else float(threshold)


def _decode_layers(
    values: dict[str, Any], wiring: dict[str, UnitLayer]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    units: dict[str, Tensor] = {}
    scores: dict[str, Tensor] = {}
    for entry in _get(values, "layers", "a list", lambda value: isinstance(value, list)):
        if not isinstance(entry, dict):
            raise _damaged("an element of 'layers'", entry, "an object")
        name = _get(entry, "name", "a layer of 'wiring'", _among(wiring))
        if name in units:
            raise _damaged("layer", name, "named once")
        if entry.get("units") == []:
            continue
        units[name], order = _decode_units(entry, wiring[name]).sort()
        scores[name] = _decode_scores(entry, len(order))[order]
    return units, scores


def _decode_units(entry: dict[str, Any], layer: UnitLayer) -> Tensor:
    where = f"units of layer {layer.name!r}"
    units = _get(entry, "units", "a list of integers", lambda value: isinstance(value, list))
    seen: set[int] = set()
    for unit in units:
        if type(unit) is not int or not 0 <= unit < layer.n_units:
            raise _damaged(where, unit, f"an integer in 0..{layer.n_units - 1}")
        if unit in seen:
            raise _damaged(where, unit, "each unit once")
        if not layer.hidden[unit]:
            raise _damaged(where, unit, "units that can be re-initialised (hidden in 'wiring')")
        seen.add(unit)
    return torch.tensor(units, dtype=torch.int64)


def _decode_scores(entry: dict[str, Any], count: int) -> Tensor:
    scores = _get(
        entry,
        "scores",
        f"a list of {count} numbers, one per unit",
        lambda v: isinstance(v, list) and len(v) == count and all(map(_is_number, v)),
    )
    return torch.tensor(scores, dtype=torch.float64)


def _check_members(layer: UnitLayer, wiring: dict[str, UnitLayer]) -> None:
    for member in layer.coupled:
        where = f"coupled layer of {layer.name!r}"
        if member.name not in wiring:
            raise _damaged(where, member.name, "a layer of 'wiring'")
        rows = wiring[member.name].n_units
        if (member.row_of_unit >= rows).any():
            largest = int(member.row_of_unit.max())
            raise _damaged(f"row of {member.name!r}", largest, f"an integer in 0..{rows - 1}")


def _get(values: dict[str, Any], key: str, expected: str, fits: Callable[[Any], bool]) -> Any:
    if key not in values:
        raise _damaged(f"{key!r}", "missing", expected)
    if not fits(values[key]):
        raise _damaged(f"{key!r}", values[key], expected)
    return values[key]


def _integer_from(low: int) -> Callable[[Any], bool]:
    # bool is an int in Python, but not in JSON.
    return lambda value: type(value) is int and value >= low


def _among(names: Collection[str]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and value in names


def _is_number(value: Any) -> bool:
    try:
        return type(value) in (int, float) and math.isfinite(value)
    except OverflowError:  # an integer beyond the floats
        return False


def _is_share(value: Any) -> bool:
    return _is_number(value) and 0 < value <= 1


def _is_shape(value: object) -> bool:
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _damaged(where: str, value: object, expected: str) -> FileError:
    return FileError(
        f"{where} is {_shown(value)}, expected {expected}: correct the file or write the plan again"
    )


def _shown(value: object) -> str:
    try:
        text = repr(value)
    except ValueError:  # more digits than Python prints
        text = "a huge number"
    return text if len(text) <= 60 else text[:57] + "..."
