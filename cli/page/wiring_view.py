"""How the layers are wired: their words with links, and numbers for the diagram."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastplastic.cli.page import charts
from fastplastic.cli.wiring_words import Neighbour, WiringWords, wiring_words

if TYPE_CHECKING:
    from fastplastic import LayerProfile

# Where the value of a unit goes that has no columns of its own.
_STREAM = {"summed into a residual stream", "leaves the network"}


@dataclass(frozen=True)
class Link:
    """Another layer, with what is to be said of it.

    Attributes:
        name: Its name.
        place: Where it stands among the layers; None where it has no figures.
        text: How many units are meant.
    """

    name: str
    place: int | None
    text: str = ""


@dataclass(frozen=True)
class WiringEntry:
    """One layer: what it reads, what reads it, and which of its units cannot be re-initialised.

    Attributes:
        name: Its name, with those of the modules that share its weight.
        kind: What it is, and its activation function.
        units: Number of units.
        hidden: Number of those that reach the network through known columns only.
        sort: One of "hidden", "partly hidden", "stream", "with another layer" and "not hidden".
        words: The same in words, with why units are not re-initialised.
        sources: The layers whose units its columns read.
        readers: The layers whose columns read its units.
        together: Layers whose rows make one unit with its rows.
        bar: Width of the bar of its hidden units, and of the others.
    """

    name: str
    kind: str
    units: int
    hidden: int
    sort: str
    words: WiringWords
    sources: tuple[Link, ...]
    readers: tuple[Link, ...]
    together: tuple[Link, ...]
    bar: tuple[float, float]


@dataclass(frozen=True)
class WiringView:
    """All layers, and the arcs between them: of what reads units, and of what makes them together.

    A tied weight is one layer with several names.
    """

    entries: tuple[WiringEntry, ...]
    reading: str
    coupling: str


def wiring_view(layers: "Sequence[LayerProfile]") -> WiringView:
    """Return how these layers are wired."""
    places = {name: at for at, layer in enumerate(layers) for name in layer.wiring.names}
    reading: set[tuple[int, int]] = set()
    coupling: set[tuple[int, int]] = set()
    for at, layer in enumerate(layers):
        for consumers, pairs in ((layer.consumers, reading), (layer.wiring.coupled, coupling)):
            pairs |= {(at, places[other.name]) for other in consumers if other.name in places}
    widths = charts.bar_widths([layer.n_units for layer in layers])
    wirings = [layer.wiring for layer in layers]
    entries = tuple(
        _entry(layer, wiring_words(layer.wiring, wirings), places, width)
        for layer, width in zip(layers, widths, strict=True)
    )
    # A layer whose rows make units together with rows of its own has no arc to itself.
    return WiringView(
        entries, charts.arcs(reading), charts.arcs(pair for pair in coupling if len({*pair}) > 1)
    )


def _entry(
    layer: "LayerProfile", words: WiringWords, places: dict[str, int], width: float
) -> WiringEntry:
    def links(neighbours: Sequence[Neighbour]) -> tuple[Link, ...]:
        return tuple(Link(own.name, places.get(own.name), own.amount) for own in neighbours)

    hidden = int(layer.hidden.sum())
    inside = round(width * hidden / layer.n_units, 1)
    return WiringEntry(
        name=" = ".join((layer.name, *layer.wiring.tied)),
        kind=f"{layer.kind}, {layer.activation}",
        units=layer.n_units,
        hidden=hidden,
        sort=_sort(layer, hidden),
        words=words,
        sources=links(words.sources),
        readers=links(words.readers),
        together=links(words.together),
        bar=(inside, round(width - inside, 1)),
    )


def _sort(layer: "LayerProfile", hidden: int) -> str:
    if hidden:
        return "hidden" if hidden == layer.n_units else "partly hidden"
    reasons = set(layer.wiring.reasons)
    if reasons and reasons <= _STREAM:
        return "stream"
    if reasons and all(reason.startswith("re-initialised together with") for reason in reasons):
        return "with another layer"
    return "not hidden"
