"""Where a figure stood in each profile, as paths of SVG on a track: 0 to 1, or over decades."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import log10

_WIDTH, _HEIGHT, _EDGE = 100, 18, 6
# Radius of the ring of the first profile, and half the diagonal of the square of the last.
_RING, _SQUARE = 4, 4.5


@dataclass(frozen=True)
class TrackFrame:
    """The size of all tracks."""

    @property
    def width(self) -> int:
        """Width in pixels."""
        return _WIDTH + 2 * _EDGE

    @property
    def height(self) -> int:
        """Height in pixels."""
        return _HEIGHT

    @property
    def base(self) -> str:
        """Path of the line from one end to the other."""
        return f"M{_EDGE} {_HEIGHT // 2}h{_WIDTH}"


@dataclass(frozen=True)
class Track:
    """The marks on one track; each is "" where there is nothing to draw.

    Attributes:
        span: Path from the first profile to the last.
        between: Path of the points of the profiles between them.
        first: Path of the ring of the first profile.
        last: Path of the square of the last profile.
        words: The same in words.
    """

    span: str
    between: str
    first: str
    last: str
    words: str


@dataclass(frozen=True)
class Decades:
    """A scale of powers of ten that holds all of some positive numbers.

    Attributes:
        low: Exponent of its left end.
        high: Exponent of its right end.
    """

    low: int
    high: int

    @classmethod
    def of(cls, values: Iterable[float | None]) -> "Decades":
        """Return the scale of these numbers; 0 and what is unknown do not count."""
        exponents = [log10(value) for value in values if value]
        low = int(min(exponents, default=0) // 1)
        high = int(-(-max(exponents, default=1) // 1))
        return cls(low, max(high, low + 1))

    def place(self, value: float) -> float:
        """Return where a number stands, from 0 to 1; 0 itself stands at the left end."""
        return (log10(value) - self.low) / (self.high - self.low) if value else 0.0


def track(places: Sequence[float | None], words: str) -> Track:
    """Return the marks of these places, from 0 to 1; None where the figure is unknown."""
    first, *between, last = (None if place is None else _x(place) for place in places)
    span = "" if None in (first, last) or first == last else f"M{first} {_MIDDLE}H{last}"
    points = "".join(f"M{x} {_MIDDLE - 3}v6" for x in between if x is not None)
    return Track(span, points, _ring(first), _square(last), words)


_MIDDLE = _HEIGHT // 2


def _x(place: float) -> float:
    return round(_EDGE + _WIDTH * place, 1)


def _ring(x: float | None) -> str:
    if x is None:
        return ""
    arc = f"a{_RING} {_RING} 0 0 1"
    return f"M{x - _RING:g} {_MIDDLE}{arc} {2 * _RING} 0{arc} {-2 * _RING} 0z"


def _square(x: float | None) -> str:
    if x is None:
        return ""
    side = _SQUARE
    return f"M{x:g} {_MIDDLE - side:g}l{side} {side}l{-side} {side}l{-side} {-side}z"
