"""How the layers are wired, in words and as numbers for the diagram."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastplastic.cli.page import charts

if TYPE_CHECKING:
    from fastplastic import LayerProfile
    from fastplastic.wiring import Consumer

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
        sources: The layers whose units its columns read.
        readers: The layers whose columns read its units.
        together: Layers whose rows make one unit with its rows.
        elsewhere: Number of units that no known columns read.
        reasons: (why units are not re-initialised by themselves, how many).
        remarks: What else is to be known.
        bar: Width of the bar of its hidden units, and of the others.
    """

    name: str
    kind: str
    units: int
    hidden: int
    sort: str
    sources: tuple[Link, ...]
    readers: tuple[Link, ...]
    together: tuple[Link, ...]
    elsewhere: int
    reasons: tuple[tuple[str, int], ...]
    remarks: tuple[str, ...]
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
    sources: dict[str, list[Link]] = defaultdict(list)
    reading, coupling = set(), set()
    for at, layer in enumerate(layers):
        for consumer in layer.consumers:
            sources[consumer.name].append(Link(layer.name, at, _amount(consumer, layer)))
            if consumer.name in places:
                reading.add((at, places[consumer.name]))
        coupling |= {
            (at, places[other.name]) for other in layer.wiring.coupled if other.name in places
        }
    widths = charts.bar_widths([layer.n_units for layer in layers])
    together = _together(layers, coupling)
    entries = tuple(
        _entry(layer, places, sources, together[at], widths[at]) for at, layer in enumerate(layers)
    )
    # A layer whose rows make units together with rows of its own has no arc to itself.
    return WiringView(
        entries, charts.arcs(reading), charts.arcs(pair for pair in coupling if len({*pair}) > 1)
    )


def _entry(
    layer: "LayerProfile",
    places: dict[str, int],
    sources: dict[str, list[Link]],
    together: tuple[Link, ...],
    width: float,
) -> WiringEntry:
    hidden = int(layer.hidden.sum())
    inside = round(width * hidden / layer.n_units, 1)
    return WiringEntry(
        name=" = ".join((layer.name, *layer.wiring.tied)),
        kind=f"{layer.kind}, {layer.activation}",
        units=layer.n_units,
        hidden=hidden,
        sort=_sort(layer, hidden),
        sources=tuple(link for name in sorted(layer.wiring.names) for link in sources[name]),
        readers=tuple(
            Link(other.name, places.get(other.name), _amount(other, layer))
            for other in layer.consumers
        ),
        together=together,
        elsewhere=_elsewhere(layer),
        reasons=tuple(layer.wiring.reasons.items()),
        remarks=_remarks(layer),
        bar=(inside, round(width - inside, 1)),
    )


def _amount(consumer: "Consumer", layer: "LayerProfile") -> str:
    units = len(set(consumer.unit_of_column.tolist()) - {-1})
    return "all units" if units == layer.n_units else f"{units:,} of {layer.n_units:,} units"


def _elsewhere(layer: "LayerProfile") -> int:
    """Return of how many units no column is known, in any layer nor through rows beside theirs."""
    known: set[int] = set()
    for consumer in layer.consumers:
        known |= set(consumer.unit_of_column.tolist())
    for coupling in layer.wiring.coupled:
        known |= set((coupling.row_of_unit >= 0).nonzero().flatten().tolist())
    return layer.n_units - len(known - {-1})


def _together(
    layers: "Sequence[LayerProfile]", coupling: set[tuple[int, int]]
) -> list[tuple[Link, ...]]:
    """Return for each layer those it makes units with, whichever of them leads."""
    found: list[set[int]] = [set() for _ in layers]
    for lead, member in coupling:
        found[lead].add(member)
        found[member].add(lead)
    return [tuple(Link(layers[at].name, at) for at in sorted(others)) for others in found]


def _sort(layer: "LayerProfile", hidden: int) -> str:
    if hidden:
        return "hidden" if hidden == layer.n_units else "partly hidden"
    reasons = set(layer.wiring.reasons)
    if reasons and reasons <= _STREAM:
        return "stream"
    if reasons and all(reason.startswith("re-initialised together with") for reason in reasons):
        return "with another layer"
    return "not hidden"


def _remarks(layer: "LayerProfile") -> tuple[str, ...]:
    wiring = layer.wiring
    remarks = [f"BatchNorm: {norm.name}" for norm in wiring.norms]
    remarks += [
        f"activation function of {number:,} units unknown: {reason}"
        for reason, number in wiring.unknown.items()
    ]
    remarks += [f"its weight does not learn: {name}" for name in wiring.without_grad]
    remarks += ["it makes the output of the network"] if wiring.head else []
    remarks += ["its weight is changed before it is used"] if wiring.transformed else []
    return tuple(remarks)
