"""Profiles as files: one safetensors file, the tables as tensors, all the rest as JSON metadata.

Nothing in a file is trusted: a profile becomes a plan, and that decides where weights are written.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastplastic import __version__
from fastplastic._coverage import Coverage
from fastplastic._weights import DTYPES, Weights
from fastplastic.checkpoint import atomic_write
from fastplastic.diagnostics import Ranks
from fastplastic.errors import FileError
from fastplastic.profile import SCHEMA_VERSION, LayerProfile, Profile
from fastplastic.stats import STATISTICS, LayerStats
from fastplastic.wiring import UnitLayer
from fastplastic.wiring_json import decode_layers, encode_layer

_KEY = "fastplastic"
_TABLE = "statistics"
_GRADIENT, _WEIGHT = "gradient/", "weight/"
_TEXTS = ("mode", "backend", "device", "dtype", "fingerprint")
_NUMBERS = ("samples", "batches", "seed")


def save_profile(profile: Profile, path: str | os.PathLike[str], *, force: bool = False) -> None:
    """Write a profile.

    Raises:
        FileError: The path cannot be written, or exists and `force` is not set.
        InputError: The weights have changed since they were profiled.
    """
    fields = (*_TEXTS, *_NUMBERS)
    ranks = {layer.name: asdict(layer.ranks) for layer in profile.layers if layer.ranks is not None}
    header = {
        "schema_version": SCHEMA_VERSION,
        "fastplastic_version": __version__,
        "statistics": list(STATISTICS),
        **{name: getattr(profile, name) for name in fields},
        "coverage": asdict(profile.coverage),
        "notes": list(profile.notes),
        "has_gradients": profile.gradients is not None,
        "layers": [encode_layer(layer.wiring) for layer in profile.layers],
        **({"ranks": ranks} if ranks else {}),
    }
    tensors = {_TABLE: torch.cat([layer.stats.table for layer in profile.layers], dim=1)}
    if profile.gradients is not None:
        tensors |= {_GRADIENT + name: _alone(value) for name, value in profile.gradients.items()}
        if profile.weights is not None:
            profile.weights.check()
            tensors |= {_WEIGHT + name: _alone(value) for name, value in profile.weights.items()}
    with atomic_write(path, force) as temporary:
        save_file(tensors, temporary, {_KEY: json.dumps(header, allow_nan=False)})


def _alone(tensor: Tensor) -> Tensor:
    """Return the tensor with memory of its own, as safetensors wants it."""
    tensor = tensor.cpu().contiguous()
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if whole else tensor.clone()


def load_profile(path: str | os.PathLike[str]) -> Profile:
    """Read a profile and check all of it.

    Raises:
        FileError: The file is missing, damaged, not a profile or of another version.
    """
    if not Path(path).is_file():
        raise FileError(f"{path}: no such file, expected a profile: check the path")
    try:
        with safe_open(path, framework="pt") as file:
            header = _parse((file.metadata() or {}).get(_KEY))
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        return _decode(header, tensors)
    except (SafetensorError, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise FileError(f"{path}: cannot be read ({reason}): expected a profile") from error
    except FileError as error:
        raise FileError(f"{path}: {error}") from None


def _parse(text: str | None) -> dict[str, Any]:
    if text is None:
        raise FileError("is not a profile: expected a file that `Profile.save` wrote")
    try:
        header = json.loads(text)
    # The second one: brackets nested deeper than Python's stack.
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict):
        raise _damaged("its metadata", "not a JSON object")
    version = header.get("schema_version")
    if version != SCHEMA_VERSION or header.get("statistics") != list(STATISTICS):
        found = header.get("fastplastic_version")
        raise FileError(
            f"is a profile of schema {version!r}, expected {SCHEMA_VERSION}: read it with "
            f"fastplastic {found!s:.20}, or profile the model again"
        )
    return header


def _decode(header: dict[str, Any], tensors: dict[str, Tensor]) -> Profile:
    wirings = decode_layers(header.get("layers"))
    table = tensors.pop(_TABLE, torch.empty(0))
    shape = (len(STATISTICS), sum(wiring.n_units for wiring in wirings))
    if not wirings or table.dtype != torch.float64 or table.shape != shape:
        found = f"{table.dtype} {tuple(table.shape)}"
        raise _damaged(f"the table is {found}", f"expected torch.float64 {shape}")
    ranks = _ranks(header, wirings)
    layers = []
    start = 0
    for wiring in wirings:
        stats = LayerStats(table[:, start : start + wiring.n_units])
        layers.append(LayerProfile(wiring, stats, ranks.get(wiring.name)))
        start += wiring.n_units
    fields = {name: _typed(header, name, str) for name in _TEXTS}
    numbers = {name: _typed(header, name, int) for name in _NUMBERS}
    gradients, weights = (_named(tensors, prefix) for prefix in (_GRADIENT, _WEIGHT))
    for name in weights.keys() & gradients.keys():
        if weights[name].shape != gradients[name].shape:
            found = str(tuple(gradients[name].shape))
            raise _damaged(f"the gradient of {name!r} is {found}", "expected the weight's shape")
    has_gradients = _typed(header, "has_gradients", bool)
    notes = _typed(header, "notes", list)
    if not all(isinstance(note, str) for note in notes):
        raise _damaged("'notes'", "expected a list of texts")
    return Profile(
        layers=tuple(layers),
        coverage=_coverage(header),
        gradients=gradients if has_gradients else None,
        weights=Weights(weights) if has_gradients else None,
        notes=tuple(notes),
        **fields,
        **numbers,
    )


def _named(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors with this prefix; FileError for one that is no floating-point tensor."""
    found = {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
    for name, tensor in found.items():
        if tensor.dtype not in DTYPES:
            raise _damaged(f"{prefix}{name} is {tensor.dtype}", "expected a floating-point dtype")
    return found


def _coverage(header: dict[str, Any]) -> Coverage:
    value = _typed(header, "coverage", dict)
    skipped = _typed(value, "skipped", list)
    for entry in skipped:
        if not isinstance(entry, list) or [type(item) for item in entry] != [str, str]:
            raise _damaged("'skipped'", "expected [name, reason] in every entry")
    return Coverage(
        _typed(value, "found", int),
        _typed(value, "measured", int),
        tuple((name, reason) for name, reason in skipped),
    )


def _ranks(header: dict[str, Any], wirings: Sequence[UnitLayer]) -> dict[str, Ranks]:
    """Return {layer name: ranks}; empty where they were not measured."""
    values = _typed({"ranks": {}} | header, "ranks", dict)
    units = {wiring.name: wiring.n_units for wiring in wirings}
    unknown = [name for name in values if name not in units]
    if unknown:
        raise _damaged(f"'ranks' of {unknown[0]!r:.40}", "expected one of the layers")
    return {name: _layer_ranks(_typed(values, name, dict), name, units[name]) for name in values}


def _layer_ranks(value: dict[str, Any], name: str, units: int) -> Ranks:
    kinds = {"effective_rank": float, "srank": int, "stable_rank": float, "rows": int, "units": int}
    ranks = Ranks(**{key: _typed(value, key, kind) for key, kind in kinds.items()})
    # A little more than there can be: exp and sums are rounded.
    most = min(ranks.rows, ranks.units) * 1.001
    numbers = (ranks.effective_rank, ranks.srank, ranks.stable_rank)
    if not (0 < most and ranks.units <= units and all(0 <= number <= most for number in numbers)):
        raise _damaged(f"'ranks' of {name!r}", f"are {ranks!s:.150}, expected 0 to rows or units")
    return ranks


def _typed(values: dict[str, Any], key: str, kind: type) -> Any:
    value = values.get(key)
    if type(value) is not kind:
        raise _damaged(repr(key), f"is {value!r:.40}, expected {kind.__name__}")
    return value


def _damaged(what: str, expected: str) -> FileError:
    return FileError(f"{what}: {expected}; the file is damaged: profile the model again")
