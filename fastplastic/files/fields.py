"""Fields of JSON that nobody vouches for: the checks that every reader of files shares."""

import json
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from fastplastic.errors import FileError

_SHOWN = 60


@dataclass(frozen=True)
class Check:
    """What the value of a field has to be.

    Attributes:
        expected: The same in words, for the error.
        fits: Tells whether a value is so.
    """

    expected: str
    fits: Callable[[Any], bool]


class Fields:
    """The fields of one JSON object, each read with its check.

    Args:
        value: What JSON gave.
        way_out: The end of every error, with the stop before it: what to do about the file.
        where: What the object is called in errors; "" for the whole file.

    Raises:
        FileError: The value is no object.
    """

    def __init__(self, value: object, way_out: str, where: str = "") -> None:
        self.way_out, self.where = way_out, where
        if not isinstance(value, Mapping):
            raise self.damaged(where or "the file", value, "an object")
        self.values = value

    def inside(self, value: object, where: str) -> "Fields":
        """Return the fields of an object inside this one."""
        return Fields(value, self.way_out, where)

    def get(self, key: str, check: Check) -> Any:
        """Return a field; FileError when it is missing or does not fit."""
        name = f"{self.where}: {key!r}" if self.where else repr(key)
        if key not in self.values:
            raise self.damaged(name, "missing", check.expected)
        if not check.fits(self.values[key]):
            raise self.damaged(name, self.values[key], check.expected)
        return self.values[key]

    def damaged(self, what: str, value: object, expected: str) -> FileError:
        """Return the error for a value that is not as expected."""
        return FileError(f"{what} is {shown(value)}, expected {expected}{self.way_out}")


def shown(value: object) -> str:
    """Return a value for an error, cut where it is long."""
    try:
        text = repr(value)
    except ValueError:  # more digits than Python prints
        text = "a huge number"
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def parse_object(text: str, what: str) -> dict[str, Any]:
    """Return the object in a JSON text, in which no key stands twice and all numbers are finite.

    Args:
        text: The text.
        what: What the file should be, for the error.

    Raises:
        FileError: It is no JSON, or no object.
    """
    try:
        values = load_json(text)
    # Too many digits in a number is a ValueError, too deep nesting a RecursionError.
    except (ValueError, RecursionError) as error:
        reason = str(error).partition("\n")[0]
        raise FileError(f"is not {what} in JSON ({reason}): write it again") from None
    if not isinstance(values, dict):
        raise FileError(f"is JSON but not {what}: check the file name")
    return values


def load_json(text: str | bytes) -> Any:
    """Return what JSON holds; ValueError where a key stands twice or a number is not finite."""
    return json.loads(text, object_pairs_hook=_without_duplicates, parse_constant=_refuse)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{shown(twice)} stands twice in one object")
    return values


def _refuse(text: str) -> float:
    raise ValueError(f"{text} is not a number in JSON")


def is_integer(value: object) -> bool:
    """Tell whether a value is an integer: bool is an int in Python, but not in JSON."""
    return type(value) is int


def is_number(value: Any) -> bool:
    """Tell whether a value is a finite number."""
    try:
        return type(value) in (int, float) and math.isfinite(value)
    except OverflowError:  # an integer beyond the floats
        return False


def is_share(value: Any) -> bool:
    """Tell whether a value is in (0, 1]."""
    return is_number(value) and 0 < value <= 1


def integer(low: int | None = None, high: int | None = None) -> Check:
    """Return the check of an integer, perhaps in a range."""
    words = "an integer"
    if low is not None:
        words += f" in {low}..{high}" if high is not None else f" from {low} on"

    def fits(value: Any) -> bool:
        above = low is None or (is_integer(value) and value >= low)
        return is_integer(value) and above and (high is None or value <= high)

    return Check(words, fits)


def one_of(names: Collection[str], words: str = "") -> Check:
    """Return the check of one of some texts."""
    expected = words or f"one of {', '.join(names)}"
    return Check(expected, lambda value: isinstance(value, str) and value in names)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_name(value: object) -> bool:
    return isinstance(value, str) and bool(value)


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


TEXT = Check("a string", _is_text)
NAME = Check("a string that is not empty", _is_name)
NAME_OR_NULL = Check("null or a name", lambda value: value is None or _is_name(value))
NAMES = Check("a list of names", lambda v: isinstance(v, list) and all(map(_is_name, v)))
TEXTS = Check("a list of strings", _are_texts)
FLAG = Check("true or false", lambda value: isinstance(value, bool))
LIST = Check("a list", lambda value: isinstance(value, list))
OBJECT = Check("an object", lambda value: isinstance(value, dict))
SHARE = Check("in (0, 1]", is_share)
