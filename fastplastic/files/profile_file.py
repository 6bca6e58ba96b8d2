"""Profiles as files: one safetensors file, the tables as tensors, all the rest as JSON metadata.

Nothing in a file is trusted: a profile becomes a plan, and that decides where weights are written.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastplastic import __version__
from fastplastic.diagnostics import Ranks
from fastplastic.errors import FileError
from fastplastic.files.atomic import atomic_write
from fastplastic.files.fields import FLAG, OBJECT, TEXT, TEXTS, Check, Fields, integer
from fastplastic.files.profile_json import SCHEMA_VERSION
from fastplastic.files.wiring_json import decode_layers, encode_layer
from fastplastic.kernels import DTYPES
from fastplastic.stats import STATISTICS
from fastplastic.wiring import UnitLayer

_KEY = "fastplastic"
_TABLE = "statistics"
_GRADIENT, _WEIGHT = "gradient/", "weight/"
_TEXTS = ("mode", "backend", "device", "dtype", "fingerprint")
_NUMBERS = ("samples", "batches", "seed")
_WAY_OUT = "; the file is damaged: profile the model again"
_SKIPPED = Check(
    "[name, reason] in every entry",
    lambda v: isinstance(v, list) and all(_is_pair(entry) for entry in v),
)
_FLOAT = Check("a number", lambda value: type(value) is float)


@dataclass(frozen=True, eq=False)
class StoredProfile:
    """What a file holds of a profile.

    Attributes:
        wiring: The layers, in the order of the table.
        table: float64 [statistics, units].
        fields: Values of `measure.Profile` by name that are texts or whole numbers.
        found: Number of weight layers in the model.
        measured: Number of those that were measured.
        skipped: (name, reason) of the others.
        notes: What a reader of the numbers has to know.
        ranks: {layer name: ranks}, where they were measured.
        gradients: {parameter name: mean gradient}, or None.
        weights: {parameter name: parameter}, or None.
    """

    wiring: Sequence[UnitLayer]
    table: Tensor
    fields: Mapping[str, Any]
    found: int
    measured: int
    skipped: Sequence[tuple[str, str]]
    notes: Sequence[str]
    ranks: Mapping[str, Ranks]
    gradients: Mapping[str, Tensor] | None
    weights: Mapping[str, Tensor] | None

    @staticmethod
    def names() -> tuple[str, ...]:
        """Return the names of `fields`."""
        return (*_TEXTS, *_NUMBERS)


def write_profile(
    stored: StoredProfile, path: str | os.PathLike[str], *, force: bool = False
) -> None:
    """Write a profile.

    Raises:
        FileError: The path cannot be written, or exists and `force` is not set.
    """
    ranks = {name: asdict(ranks) for name, ranks in stored.ranks.items()}
    coverage = {"found": stored.found, "measured": stored.measured, "skipped": stored.skipped}
    header = {
        "schema_version": SCHEMA_VERSION,
        "fastplastic_version": __version__,
        "statistics": list(STATISTICS),
        **stored.fields,
        "coverage": coverage,
        "notes": list(stored.notes),
        "has_gradients": stored.gradients is not None,
        "layers": [encode_layer(layer) for layer in stored.wiring],
        **({"ranks": ranks} if ranks else {}),
    }
    tensors = {_TABLE: stored.table}
    for prefix, own in ((_GRADIENT, stored.gradients), (_WEIGHT, stored.weights)):
        tensors |= {prefix + name: _alone(value) for name, value in (own or {}).items()}
    with atomic_write(path, force) as temporary:
        save_file(tensors, temporary, {_KEY: json.dumps(header, allow_nan=False)})


def _alone(tensor: Tensor) -> Tensor:
    """Return the tensor with memory of its own, as safetensors wants it."""
    tensor = tensor.cpu().contiguous()
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if whole else tensor.clone()


def read_profile(path: str | os.PathLike[str]) -> StoredProfile:
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


def _parse(text: str | None) -> Fields:
    if text is None:
        raise FileError("is not a profile: expected a file that `Profile.save` wrote")
    try:
        header = json.loads(text)
    # The second one: brackets nested deeper than Python's stack.
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict):
        raise FileError(f"its metadata are not a JSON object{_WAY_OUT}")
    version = header.get("schema_version")
    if version != SCHEMA_VERSION or header.get("statistics") != list(STATISTICS):
        found = header.get("fastplastic_version")
        raise FileError(
            f"is a profile of schema {version!r}, expected {SCHEMA_VERSION}: read it with "
            f"fastplastic {found!s:.20}, or profile the model again"
        )
    return Fields(header, _WAY_OUT)


def _decode(header: Fields, tensors: dict[str, Tensor]) -> StoredProfile:
    wiring = decode_layers(header.values.get("layers"))
    table = tensors.pop(_TABLE, torch.empty(0))
    shape = (len(STATISTICS), sum(layer.n_units for layer in wiring))
    if not wiring or table.dtype != torch.float64 or table.shape != shape:
        found = f"{table.dtype} {tuple(table.shape)}"
        raise FileError(f"the table is {found}, expected torch.float64 {shape}{_WAY_OUT}")
    gradients, weights = (_named(tensors, prefix) for prefix in (_GRADIENT, _WEIGHT))
    for name in weights.keys() & gradients.keys():
        if weights[name].shape != gradients[name].shape:
            found = str(tuple(gradients[name].shape))
            raise header.damaged(f"the gradient of {name!r}", found, "the weight's shape")
    has_gradients = header.get("has_gradients", FLAG)
    coverage = header.inside(header.get("coverage", OBJECT), "coverage")
    return StoredProfile(
        wiring=wiring,
        table=table,
        fields={
            **{name: header.get(name, TEXT) for name in _TEXTS},
            **{name: header.get(name, integer()) for name in _NUMBERS},
        },
        found=coverage.get("found", integer()),
        measured=coverage.get("measured", integer()),
        skipped=tuple((name, reason) for name, reason in coverage.get("skipped", _SKIPPED)),
        notes=tuple(header.get("notes", TEXTS)),
        ranks=_ranks(header, wiring),
        gradients=gradients if has_gradients else None,
        weights=weights if has_gradients else None,
    )


def _is_pair(entry: object) -> bool:
    return isinstance(entry, list) and [type(item) for item in entry] == [str, str]


def _named(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors with this prefix; FileError for one that is no floating-point tensor."""
    found = {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
    for name, tensor in found.items():
        if tensor.dtype not in DTYPES:
            raise FileError(
                f"{prefix}{name} is {tensor.dtype}, expected a floating-point dtype{_WAY_OUT}"
            )
    return found


def _ranks(header: Fields, wiring: Sequence[UnitLayer]) -> dict[str, Ranks]:
    """Return {layer name: ranks}; empty where they were not measured."""
    if "ranks" not in header.values:
        return {}
    values = header.inside(header.get("ranks", OBJECT), "ranks")
    units = {layer.name: layer.n_units for layer in wiring}
    unknown = [name for name in values.values if name not in units]
    if unknown:
        raise header.damaged("'ranks'", unknown[0], "names of layers")
    return {name: _layer_ranks(values, name, units[name]) for name in values.values}


def _layer_ranks(values: Fields, name: str, units: int) -> Ranks:
    own = values.inside(values.get(name, OBJECT), f"ranks of {name!r}")
    checks = {
        "effective_rank": _FLOAT, "srank": integer(), "stable_rank": _FLOAT, "rows": integer(),
        "units": integer(),
    }  # fmt: skip
    ranks = Ranks(**{key: own.get(key, check) for key, check in checks.items()})
    # A little more than there can be: exp and sums are rounded.
    most = min(ranks.rows, ranks.units) * 1.001
    numbers = (ranks.effective_rank, ranks.srank, ranks.stable_rank)
    if not (0 < most and ranks.units <= units and all(0 <= number <= most for number in numbers)):
        raise own.damaged(own.where, ranks, "0 to rows or units")
    return ranks
