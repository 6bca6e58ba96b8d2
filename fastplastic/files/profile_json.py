"""Profiles as `fastplastic profile --json` writes them: read and checked, without torch."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastplastic.errors import FileError
from fastplastic.files.fields import (
    LIST,
    NAME,
    NAME_OR_NULL,
    NAMES,
    OBJECT,
    TEXT,
    Check,
    Fields,
    integer,
    is_integer,
    is_number,
    parse_object,
    shown,
)

SCHEMA_VERSION = 1
_WAY_OUT = "; the file is damaged: profile the model again"
_HINT = "expected what fastplastic profile --json writes: check the file name"
# What no other file of ours has in JSON.
_KEYS = ("schema_version", "coverage", "layers")
# Sums over the units of a model stay exact, and finite.
_MOST_UNITS, _LARGEST = 2**53, 1e200


def _or_null(words: str, fits: Callable[[Any], bool]) -> Check:
    return Check(f"null or {words}", lambda value: value is None or fits(value))


_PART = _or_null("a number in 0..1", lambda v: is_number(v) and 0 <= v <= 1)
_MEAN = _or_null("a number from 0 on", lambda v: is_number(v) and 0 <= v <= _LARGEST)
# What a layer or a profile may have beside the fields that are always there.
_MORE_OF_LAYER = {"unknown": OBJECT, "tied": NAMES, "ranks": OBJECT}
_MORE_OF_PROFILE = {
    "advice": OBJECT, "gates": LIST, "notes": LIST, "data_sha256": NAME_OR_NULL,
    "lent_head": NAME_OR_NULL,
}  # fmt: skip


@dataclass(frozen=True)
class LayerFigures:
    """The figures of one layer: counts of units, shares and means, None where unknown."""

    name: str
    kind: str
    activation: str
    units: int
    hidden: int
    dead: int | None
    frozen: int | None
    dormant: int | None
    saturated_fraction: float | None
    mean_abs_activation: float | None
    mean_abs_gradient: float | None


@dataclass(frozen=True)
class ProfileFigures:
    """The figures of a profile, and where they are from; names are None where they are not known.

    Attributes:
        data_sha256: Digest of the batches as the model got them.
        lent_head: What is to be said of a head that was there for the loss only.
        by_name: The layers by their names.
    """

    model: str | None
    weights: str | None
    data: str | None
    device: str
    dtype: str
    mode: str
    samples: int
    seed: int
    fastplastic_version: str
    layers: tuple[LayerFigures, ...]
    data_sha256: str | None = None
    lent_head: str | None = None
    by_name: Mapping[str, LayerFigures] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "by_name", {layer.name: layer for layer in self.layers})


def read_profile_json(path: str | os.PathLike[str]) -> ProfileFigures:
    """Read a profile in JSON and check all of it.

    Raises:
        FileError: The file is missing, not a profile in JSON, damaged or of another version.
    """
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError:
        raise FileError(f"{path}: no such file, expected a profile: check the path") from None
    # The second one: a null byte in the path.
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise FileError(f"{path}: cannot be read ({reason}): expected a profile") from None
    return parse_profile_json(content, str(path))


def parse_profile_json(content: bytes, name: str) -> ProfileFigures:
    """Return the figures in the content of a file, which errors call `name`.

    Raises:
        FileError: It is no profile in JSON, is damaged or of another version.
    """
    try:
        return figures_of(parse_object(content.decode("utf-8-sig"), "a profile"))
    except UnicodeDecodeError:
        raise FileError(f"{name}: is not text, {_HINT}") from None
    except FileError as error:
        raise FileError(f"{name}: {error}") from None


def figures_of(values: Mapping[str, Any]) -> ProfileFigures:
    """Return the figures in what `Profile.to_dict` returns.

    Raises:
        FileError: A field is missing or not as it should be, or the version is another one.
    """
    if any(key not in values for key in _KEYS):
        raise FileError(f"is JSON but not a profile, {_HINT}")
    version = values["schema_version"]
    if not is_integer(version) or version != SCHEMA_VERSION:
        raise FileError(
            f"is a profile of schema {shown(version)}, expected {SCHEMA_VERSION}: read it with "
            f"fastplastic {values.get('fastplastic_version')!s:.20}, or profile the model again"
        )
    top = Fields(values, _WAY_OUT)
    _check_more(top, _MORE_OF_PROFILE)
    _check_coverage(top.inside(top.get("coverage", OBJECT), "coverage"))
    layers = _layers(top)
    _check_totals(top.inside(top.get("totals", OBJECT), "totals"), layers)
    return ProfileFigures(
        **{key: top.get(key, NAME_OR_NULL) for key in ("model", "weights", "data")},
        **{key: top.get(key, TEXT) for key in ("device", "dtype", "mode", "fastplastic_version")},
        samples=top.get("samples", integer(0)),
        seed=top.get("seed", integer()),
        layers=layers,
        data_sha256=values.get("data_sha256"),
        lent_head=values.get("lent_head"),
    )


def _check_more(values: Fields, checks: Mapping[str, Check]) -> None:
    for key in checks.keys() & values.values.keys():
        values.get(key, checks[key])


def _check_coverage(coverage: Fields) -> None:
    found = coverage.get("found", integer(0))
    coverage.get("measured", integer(0, found))
    for entry in coverage.get("skipped", LIST):
        skipped = coverage.inside(entry, "an element of 'skipped'")
        for key in ("name", "reason"):
            skipped.get(key, TEXT)


def _layers(top: Fields) -> tuple[LayerFigures, ...]:
    entries = top.get(
        "layers", Check("a list of layers", lambda v: isinstance(v, list) and v != [])
    )
    layers = tuple(_layer(top, entry, place) for place, entry in enumerate(entries))
    names = set[str]()
    for layer in layers:
        if layer.name in names:
            raise top.damaged("the name of a layer", layer.name, "a name that stands once")
        names.add(layer.name)
    return layers


def _layer(top: Fields, entry: object, place: int) -> LayerFigures:
    nameless = top.inside(entry, f"layers[{place}]")
    name = nameless.get("name", NAME)
    own = top.inside(entry, f"layer {shown(name)}")
    _check_more(own, _MORE_OF_LAYER)
    units = own.get("units", integer(1, _MOST_UNITS))
    number = integer(0, units)
    some = _or_null(number.expected, number.fits)
    return LayerFigures(
        name=name,
        units=units,
        **{key: own.get(key, TEXT) for key in ("kind", "activation")},
        hidden=own.get("hidden", number),
        **{key: own.get(key, some) for key in ("dead", "frozen", "dormant")},
        saturated_fraction=own.get("saturated_fraction", _PART),
        **{key: own.get(key, _MEAN) for key in ("mean_abs_activation", "mean_abs_gradient")},
    )


def _check_totals(totals: Fields, layers: Sequence[LayerFigures]) -> None:
    """Refuse totals that are not those of the layers."""
    sums = {
        key: sum(getattr(layer, key) or 0 for layer in layers)
        for key in ("units", "hidden", "dead", "frozen", "dormant")
    }
    sums["hidden_units"] = sums.pop("hidden")
    for key, number in {"layers": len(layers), **sums}.items():
        totals.get(key, _sum(number))


def _sum(number: int) -> Check:
    return Check(f"{number}, the sum over the layers", lambda v: is_integer(v) and v == number)
