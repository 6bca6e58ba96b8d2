"""What a plan is asked for, checked, and which layers the patterns name."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from numbers import Integral, Real
from typing import Any

from torch import Tensor

from fastplastic.criteria import CRITERIA, WEIGHT_CRITERIA
from fastplastic.errors import InputError
from fastplastic.files import SHARE, Check, integer, is_number, is_share, one_of
from fastplastic.model import Part
from fastplastic.wiring import UnitLayer

GRANULARITIES = ("unit", "weight")
SCOPES = ("layer", "global")
# The criterion of each granularity where none is named.
DEFAULT_CRITERIA = {"unit": "dormant", "weight": "swr"}
_NAMES_IN_A_NOTE = 5


@dataclass(frozen=True)
class Request:
    """The arguments of `planning.plan`, under the same names."""

    criterion: str
    ratio: float | None
    threshold: float | None
    granularity: str
    scope: str
    max_layer_fraction: float
    seed: int
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def check(self) -> None:
        """Refuse what no profile can fulfil: InputError."""
        _check_name("granularity", self.granularity, GRANULARITIES)
        _check_name("scope", self.scope, SCOPES)
        if not isinstance(self.seed, Integral):
            raise InputError(f"seed {self.seed!r} is not usable, expected an integer")
        if (self.ratio is None) == (self.threshold is None):
            given = "neither" if self.ratio is None else "both"
            raise InputError(
                f"{given} of ratio and threshold given, expected exactly one: ratio says how many "
                f"{self.granularity}s, threshold from which score on"
            )
        if self.ratio is not None:
            _check_share("ratio", self.ratio)
        if self.threshold is not None and not _is_finite(self.threshold):
            raise InputError(
                f"threshold {self.threshold!r} is not usable, expected a finite number: "
                "`fastplastic list criteria` shows those of the sources"
            )
        _check_share("max_layer_fraction", self.max_layer_fraction)

    def plain(self) -> "Request":
        """Return the same with numbers of Python's own types."""
        return replace(
            self,
            ratio=None if self.ratio is None else float(self.ratio),
            threshold=None if self.threshold is None else float(self.threshold),
            max_layer_fraction=float(self.max_layer_fraction),
            seed=int(self.seed),
        )

    def stored(self) -> dict[str, Any]:
        """Return what a plan file holds of the request, as values that `json.dumps` takes."""
        return {name: getattr(self, name) for name in _STORED}


# What a plan file holds of a request, and what it has to be there.
_STORED: Mapping[str, Check] = {
    "criterion": Check("a criterion", lambda value: isinstance(value, str)),
    "granularity": one_of(GRANULARITIES, "'unit' or 'weight'"),
    "ratio": Check("null or in (0, 1]", lambda v: v is None or is_share(v)),
    "threshold": Check("null or a number", lambda v: v is None or is_number(v)),
    "scope": one_of(SCOPES, "'layer' or 'global'"),
    "max_layer_fraction": SHARE,
    "seed": integer(),
}


def stored_checks(granularity: str) -> dict[str, Check]:
    """Return the checks of what a plan file holds of a request for units or for weights."""
    names = CRITERIA if granularity == "unit" else WEIGHT_CRITERIA
    return {
        **_STORED,
        "criterion": one_of(names),
        "granularity": one_of([granularity], repr(granularity)),
    }


@dataclass(frozen=True, eq=False)
class Choice:
    """What was chosen; the fields are those of `planning.Plan`."""

    eligible: int
    wiring: Mapping[str, UnitLayer]
    units: Mapping[str, Tensor] = field(default_factory=dict)
    scores: Mapping[str, Tensor] = field(default_factory=dict)
    masks: Mapping[str, Tensor] = field(default_factory=dict)
    notes: Sequence[str] = ()
    parts: Mapping[str, Part] = field(default_factory=dict)
    part_counts: Mapping[str, int] = field(default_factory=dict)


def criterion_among(name: str, criteria: Collection[str], granularity: str) -> str:
    """Return the name of a criterion; InputError when there is none for this granularity."""
    if name not in criteria:
        raise InputError(
            f"criterion {name!r} is unknown for granularity {granularity!r}, "
            f"expected one of {', '.join(criteria)}"
        )
    return name


def patterns(given: Sequence[str]) -> tuple[str, ...]:
    """Return patterns as a tuple."""
    # A single string is a sequence of its letters; it is meant as one pattern.
    return (given,) if isinstance(given, str) else tuple(given)


def matching(
    names: Collection[str], wanted: Iterable[str], option: str, others: Collection[str] = ()
) -> set[str]:
    """Return the names of layers, and others, that match any of the patterns.

    Raises:
        InputError: A pattern matches none.
    """
    matched: set[str] = set()
    for pattern in wanted:
        hits = {name for name in (*names, *others) if fnmatchcase(name, pattern)}
        if not hits:
            raise _no_match(pattern, names, option)
        matched |= hits
    return matched


def _no_match(pattern: str, names: Collection[str], option: str) -> InputError:
    """Return the error for a pattern that matches no name."""
    near = get_close_matches(pattern, names, n=3, cutoff=0.3) or list(names)[:3]
    return InputError(
        f"{option} pattern {pattern!r} matches none of the {len(names)} layers, "
        f"expected a name or a pattern such as 'layer1.*'; near names: {', '.join(near)}"
    )


def some_of(names: Iterable[str]) -> str:
    """Return the first names for a note, and how many more there are."""
    names = list(names)
    shown = ", ".join(names[:_NAMES_IN_A_NOTE])
    more = len(names) - _NAMES_IN_A_NOTE
    return f"{shown} and {more} more" if more > 0 else shown


def _check_name(what: str, value: str, expected: Sequence[str]) -> None:
    if value not in expected:
        names = " or ".join(map(repr, expected))
        raise InputError(f"{what} {value!r} is unknown, expected {names}")


def _is_finite(value: object) -> bool:
    try:
        return isinstance(value, Real) and math.isfinite(value)
    except OverflowError:  # an integer beyond the floats
        return False


def _check_share(name: str, value: float) -> None:
    # The comparison also refuses NaN.
    if not (isinstance(value, Real) and 0 < value <= 1):
        raise InputError(
            f"{name} {value!r} is out of range, expected more than 0 and at most 1: "
            "for 5 % give 0.05"
        )
