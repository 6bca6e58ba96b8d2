"""The public function of this room: compare profiles."""

import os
from collections.abc import Sequence
from pathlib import Path
from string import ascii_uppercase
from typing import TYPE_CHECKING

from fastplastic.comparison.metrics import METRICS, difference, of_layer, of_layers
from fastplastic.comparison.notes import notes_on
from fastplastic.comparison.record import (
    ComparedProfile,
    FigureChange,
    LayerChange,
    ProfileComparison,
    TotalChange,
    UnmatchedLayer,
)
from fastplastic.errors import FileError, InputError
from fastplastic.files import ProfileFigures, figures_of, is_safetensors, read_profile_json

if TYPE_CHECKING:
    from fastplastic.measure import Profile


def compare(*profiles: "Profile | str | os.PathLike[str]") -> ProfileComparison:
    """Return what changed between profiles of the same model, or of related ones.

    Layers are matched by their names. All figures are shares and means, so that layers of different
    width can be compared. Files in JSON are read without torch.

    Args:
        profiles: Two or more, in their order: profiles, or files of them, as `Profile.save` or
            `fastplastic profile --json` writes them.

    Raises:
        InputError: There are less than two, or no layer is in all of them.
        FileError: A file is missing, damaged or not a profile.
    """
    names = [str(own) if isinstance(own, (str, os.PathLike)) else None for own in profiles]
    return compare_figures([_figures(own) for own in profiles], names)


def _figures(profile: "Profile | str | os.PathLike[str]") -> ProfileFigures:
    if isinstance(profile, (str, os.PathLike)):
        return read_figures(profile)
    from fastplastic.measure import Profile

    if not isinstance(profile, Profile):
        raise InputError(
            f"{type(profile).__name__} cannot be compared: expected a Profile or the path of a file"
        )
    return figures_of(profile.to_dict())


def read_figures(path: str | os.PathLike[str]) -> ProfileFigures:
    """Read a profile from a file: JSON, or what `Profile.save` wrote.

    Raises:
        FileError: The file is missing, damaged or not a profile.
    """
    # What is not a regular file, such as a pipe, can be read only once.
    if not (Path(path).is_file() and _is_saved(Path(path))):
        return read_profile_json(path)
    from fastplastic.measure import Profile

    values = Profile.load(path).to_dict()
    try:
        return figures_of(values)
    except FileError as error:
        raise FileError(f"{path}: {error}") from None


def _is_saved(path: Path) -> bool:
    try:
        return is_safetensors(path)
    except OSError as error:
        raise FileError(
            f"{path}: cannot be read ({error.strerror or error}): expected a profile"
        ) from None


def compare_figures(
    profiles: Sequence[ProfileFigures], names: Sequence[str | None]
) -> ProfileComparison:
    """Return what changed between the figures of profiles that are called so.

    Raises:
        InputError: There are less than two, or no layer is in all of them.
    """
    if len(profiles) < 2:
        raise InputError(f"{len(profiles)} to compare: expected two profiles or more")
    labels = [_label(number) for number in range(len(profiles))]
    common = [name for name in profiles[0].by_name if all(name in x.by_name for x in profiles)]
    if not common:
        some = ", ".join(f"{own.layers[0].name!r}" for own in profiles)
        raise InputError(
            f"no layer is in all {len(profiles)} profiles (the first of each: {some}): expected "
            "profiles of one model, or of models whose layers have the same names"
        )
    return ProfileComparison(
        profiles=tuple(map(_compared, labels, names, profiles)),
        notes=notes_on(profiles, labels),
        totals=_totals(profiles),
        layers=tuple(_layer(name, profiles) for name in common),
        unmatched=_unmatched(profiles, labels),
    )


def _label(number: int) -> str:
    """Return A to Z, then AA, AB and so on."""
    before, letter = divmod(number, len(ascii_uppercase))
    return (_label(before - 1) if before else "") + ascii_uppercase[letter]


def _compared(label: str, name: str | None, own: ProfileFigures) -> ComparedProfile:
    return ComparedProfile(
        label=label, name=name, model=own.model, weights=own.weights, data=own.data,
        device=own.device, dtype=own.dtype, mode=own.mode, samples=own.samples, seed=own.seed,
        layers=len(own.layers), fastplastic_version=own.fastplastic_version,
    )  # fmt: skip


def _totals(profiles: Sequence[ProfileFigures]) -> TotalChange:
    figures = {
        metric: _change(metric, [of_layers(own.layers, metric) for own in profiles])
        for metric in METRICS
    }
    units = tuple(sum(layer.units for layer in own.layers) for own in profiles)
    return TotalChange(units=units, **figures)


def _layer(name: str, profiles: Sequence[ProfileFigures]) -> LayerChange:
    own = [profile.by_name[name] for profile in profiles]
    figures = {
        metric: _change(metric, [of_layer(layer, metric) for layer in own]) for metric in METRICS
    }
    return LayerChange(name=name, units=tuple(layer.units for layer in own), **figures)


def _change(metric: str, values: Sequence[float | None]) -> FigureChange:
    return FigureChange(tuple(values), difference(metric, values[0], values[-1]))


def _unmatched(
    profiles: Sequence[ProfileFigures], labels: Sequence[str]
) -> tuple[UnmatchedLayer, ...]:
    names = dict.fromkeys(name for own in profiles for name in own.by_name)
    found = {
        name: tuple(
            label for label, own in zip(labels, profiles, strict=True) if name in own.by_name
        )
        for name in names
    }
    return tuple(UnmatchedLayer(*item) for item in found.items() if len(item[1]) < len(profiles))
