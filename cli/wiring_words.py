"""The wiring of layers in words: what `explain` prints, and what the page of a profile shows."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastplastic.wiring import Consumer, UnitLayer

NO_SOURCE = "no unit of its own: the input, a stream, or units that are mixed"
TOGETHER = "their rows make one unit"


@dataclass(frozen=True)
class Neighbour:
    """Another layer that is wired to a layer.

    Attributes:
        name: Its name.
        amount: How many units join the two; empty where it is not said.
    """

    name: str
    amount: str = ""


@dataclass(frozen=True)
class WiringWords:
    """How one layer is wired.

    Attributes:
        sources: The layers whose units its columns read.
        readers: The layers whose columns read its units.
        otherwise: What reads units beside them; empty where nothing does.
        together: Layers whose rows make one unit with its rows, whichever of them leads.
        reasons: Why units are not re-initialised by themselves.
        remarks: (label, text) of what else is to be known.
    """

    sources: tuple[Neighbour, ...]
    readers: tuple[Neighbour, ...]
    otherwise: str
    together: tuple[Neighbour, ...]
    reasons: tuple[str, ...]
    remarks: tuple[tuple[str, str], ...]


def wiring_words(layer: "UnitLayer", layers: "Sequence[UnitLayer]") -> WiringWords:
    """Return how a layer is wired.

    Args:
        layer: The layer.
        layers: All layers of the network, in their order.
    """
    readers = tuple(Neighbour(own.name, _amount(own, layer)) for own in layer.consumers)
    return WiringWords(
        sources=tuple(
            Neighbour(other.name, _amount(own, other))
            for other in layers
            for own in other.consumers
            if own.name in layer.names
        ),
        readers=readers,
        otherwise=_otherwise(layer),
        together=tuple(Neighbour(o.name) for o in layers if _joined(layer, o) or _joined(o, layer)),
        reasons=tuple(f"{number:,} units: {why}" for why, number in layer.reasons.items()),
        remarks=_remarks(layer),
    )


def _amount(consumer: "Consumer", layer: "UnitLayer") -> str:
    units = len(set(consumer.unit_of_column.tolist()) - {-1})
    return "all units" if units == layer.n_units else f"{units:,} of {layer.n_units:,} units"


def _joined(lead: "UnitLayer", member: "UnitLayer") -> bool:
    """Tell whether rows of a member make units with the rows of a lead."""
    return any(own.name in member.names for own in lead.coupled)


def _otherwise(layer: "UnitLayer") -> str:
    """Return what reads units that no columns of their own read, not even through other rows."""
    known: set[int] = set()
    for consumer in layer.consumers:
        known |= set(consumer.unit_of_column.tolist())
    for coupling in layer.coupled:
        known |= set((coupling.row_of_unit >= 0).nonzero().flatten().tolist())
    left = layer.n_units - len(known - {-1})
    if left:
        return f"{left:,} units by no columns of their own"
    return "" if layer.consumers else "what reads the rows that they are made with"


def _remarks(layer: "UnitLayer") -> tuple[tuple[str, str], ...]:
    remarks = [("norm", norm.name) for norm in layer.norms]
    remarks += [
        ("unknown", f"activation function of {number:,} units: {reason}")
        for reason, number in layer.unknown.items()
    ]
    remarks += [("note", f"its weight does not learn: {name}") for name in layer.without_grad]
    remarks += [("head", "it makes the output of the network")] if layer.head else []
    remarks += [("note", "its weight is changed before it is used")] if layer.transformed else []
    return tuple(remarks)
