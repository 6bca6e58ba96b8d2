"""Drawings as paths of SVG: made here, so that the page needs no library."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

# Of scores: up to the threshold, then half octaves, then all above them.
_STEPS = 20
BINS = _STEPS + 2
BAR, HEIGHT = 9, 30
# Of the diagram: distance of two layers, the widest arc, room for a name and for a bar.
ROW, REACH = 20, 150
BAR_WIDTH = 120
_LETTER, _LONGEST, _GAP = 7, 34, 8


@dataclass(frozen=True)
class HistogramFrame:
    """The size of all histograms, and the numbers at their axis."""

    threshold: float

    @property
    def width(self) -> int:
        """Width in pixels."""
        return BINS * BAR

    @property
    def height(self) -> int:
        """Height in pixels."""
        return HEIGHT

    @property
    def marks(self) -> tuple[tuple[int, str], ...]:
        """(place, number) at each fourth octave, which begin where the first bar ends."""
        return tuple(
            (BAR * (step + 1), f"{self.threshold * 2 ** (step / 2):.3g}")
            for step in range(0, _STEPS, 4)
        )


@dataclass(frozen=True)
class DiagramFrame:
    """Where the parts of the diagram of these layers stand."""

    names: tuple[str, ...]

    @property
    def name(self) -> int:
        """Where names end."""
        return _LETTER * max((len(shortened(name)) for name in self.names), default=0) + _GAP

    @property
    def bar(self) -> int:
        """Where bars begin."""
        return self.name + _GAP

    @property
    def arcs(self) -> int:
        """Where arcs begin."""
        return self.bar + BAR_WIDTH + _GAP

    @property
    def width(self) -> int:
        """Width in pixels."""
        return self.arcs + REACH

    @property
    def height(self) -> int:
        """Height in pixels."""
        return ROW * len(self.names)

    @property
    def row(self) -> int:
        """Distance of two layers."""
        return ROW


def shortened(name: str) -> str:
    """Return the end of a long name, which tells layers apart."""
    return name if len(name) <= _LONGEST else "…" + name[1 - _LONGEST :]


def score_edges(threshold: float) -> tuple[float, ...]:
    """Return the upper ends of all bins but the last, which has none."""
    return tuple(threshold * 2 ** (step / 2) for step in range(_STEPS + 1))


def histogram(scores: Iterable[float], threshold: float) -> tuple[str, str]:
    """Return the paths of the bar up to the threshold, and of all others; the highest is full."""
    edges = score_edges(threshold)
    counts = Counter(bisect_left(edges, score) for score in scores)
    most = max(counts.values(), default=1)
    bars = {bin: _bar(bin, number / most) for bin, number in sorted(counts.items())}
    low = bars.pop(0, "")
    return low, "".join(bars.values())


def _bar(bin: int, share: float) -> str:
    # What is not nothing is seen.
    height = max(share * HEIGHT, 1)
    return f"M{bin * BAR} {HEIGHT}v{-height:.3g}h{BAR - 1}V{HEIGHT}z"


def arcs(pairs: Iterable[tuple[int, int]]) -> str:
    """Return the path of an arc from each row to each row that reads it, the wider the longer."""
    return "".join(map(_arc, sorted(set(pairs))))


def _arc(pair: tuple[int, int]) -> str:
    start, end = (ROW * row + ROW // 2 for row in pair)
    reach = min(16 + abs(end - start) // 4, REACH)
    # The head of the arrow stands at the reader.
    return f"M0 {start}C{reach} {start} {reach} {end} 4 {end}m5 -4l-5 4l5 4"


def bar_widths(numbers: Sequence[int]) -> list[float]:
    """Return the width of a bar for each number, the largest in full and none invisible."""
    most = max(numbers, default=0) or 1
    return [round(max(BAR_WIDTH * number / most, 1), 1) if number else 0 for number in numbers]
