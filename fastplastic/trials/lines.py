"""The lines of a file of results, which nobody vouches for: one JSON object each."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastplastic.errors import FileError
from fastplastic.files import Check, Fields, integer, is_number, load_json


def entry_of(path: Path, number: int, line: bytes) -> dict[str, Any]:
    """Return the object in a line; FileError where it is none."""
    try:
        entry = load_json(line)
    # Too deep nesting is a RecursionError; all else, bytes that are no text too, a ValueError.
    except (ValueError, RecursionError):
        entry = None
    if not isinstance(entry, dict):
        raise FileError(
            f"{path}: line {number} is no JSON object, expected results of a trial: repair that "
            "line or give another file"
        )
    return entry


def check_run(path: Path, number: int, entry: dict[str, Any]) -> None:
    """Refuse an object that is not a finished run: FileError."""
    fields = Fields(entry, "")
    try:
        for key, check in _CHECKS.items():
            if key in entry or key in _ALWAYS:
                fields.get(key, check)
        unknown = sorted(entry.keys() - _CHECKS.keys())
        if unknown:
            raise fields.damaged("a key", unknown[0], f"one of {', '.join(_CHECKS)}")
        lengths = {key: len(entry[key]) for key in ("steps", "accuracy", "loss")}
        if len(set(lengths.values())) > 1:
            raise fields.damaged("the length of curves", lengths, "the same for all")
    except FileError as error:
        raise FileError(
            f"{path}: line {number} is no run of a trial ({error}): repair or remove that line"
        ) from None


def _is_known(value: Any) -> bool:
    """Tell whether a value is a number, or null for one that JSON does not have."""
    return value is None or is_number(value)


def _list(words: str, fits: Callable[[Any], bool], least: int = 0) -> Check:
    def are(value: Any) -> bool:
        return isinstance(value, list) and len(value) >= least and all(map(fits, value))

    return Check(f"a list of {words}", are)


def _table(fits: Callable[[Any], bool]) -> Check:
    return Check(
        "an object of numbers", lambda v: isinstance(v, dict) and all(map(fits, v.values()))
    )


_COUNT = integer(0)
_ALWAYS = ("arm", "seed", "total", "steps", "accuracy", "loss", "train_loss")
_CHECKS = {
    "arm": Check("a name", lambda value: isinstance(value, str) and bool(value)),
    "seed": integer(),
    "total": _COUNT,
    "steps": _list("integers from 0 on, at least one", _COUNT.fits, least=1),
    "accuracy": _list("shares, at least one", lambda v: is_number(v) and 0 <= v <= 1, least=1),
    "loss": _list("numbers", _is_known),
    "train_loss": _list("numbers", _is_known),
    "validation": Check("a number or null", _is_known),
    "diverged_at": Check("an integer or null", lambda v: v is None or _COUNT.fits(v)),
    "seconds": _table(_is_known),
    "count": _COUNT,
    "layers": _table(_COUNT.fits),
    "reset_loss": _list("numbers", _is_known),
    "notes": _list("texts", lambda value: isinstance(value, str)),
    "figures": _table(_is_known),
}
