"""Which layers were measured, and what a reader of the numbers has to know."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastplastic._observer import Observation
from fastplastic.errors import InputError
from fastplastic.wiring import UnitGraph

if TYPE_CHECKING:
    from fastplastic.profile import LayerProfile

_SHOWN = 3


@dataclass(frozen=True)
class Coverage:
    """Which weight layers were measured.

    Attributes:
        found: Weight layers in the model.
        measured: Those of which activations were seen.
        skipped: (name, reason) of the others.
    """

    found: int
    measured: int
    skipped: tuple[tuple[str, str], ...]


def coverage_of(
    graph: UnitGraph, layers: Iterable["LayerProfile"], observation: Observation
) -> Coverage:
    """Return the coverage; InputError when nothing at all was measured."""
    skipped = list(graph.skipped)
    for layer in layers:
        if not _seen(layer):
            skipped.append((layer.name, _reason(layer, observation)))
    found = len(graph.layers) + len(graph.skipped)
    if len(skipped) == found:
        raise InputError(
            f"none of {found} weight layers was measured{_example(skipped)}: call the model itself "
            "on data, and see that it has linear or convolution layers"
        )
    return Coverage(found, found - len(skipped), tuple(skipped))


def notes_of(
    graph: UnitGraph, layers: Iterable["LayerProfile"], observation: Observation
) -> tuple[str, ...]:
    """Return remarks for the report, one line each."""
    layers = list(layers)
    notes = []
    if graph.note is not None:
        notes.append(graph.note)
    if observation.modes == {"mixed"} or len(observation.modes) > 1:
        notes.append("some modules were in train mode and some in eval mode")
    if observation.masked:
        notes.append("padding was left out by the attention mask")
    if observation.dropped:
        steps = f"{observation.dropped} of {observation.steps} steps"
        notes.append(f"{steps} had gradients that are not finite under the loss scale: left out")
    for what, row in (
        ("activations", "n_nonfinite_h"),
        ("gradients of activations", "n_nonfinite_g"),
        ("gradients of weights", "n_nonfinite_dw"),
    ):
        bad = [x.name for x in layers if bool((x.stats[row] > 0).any())]
        if bad:
            count = int(sum(float(x.stats[row].sum()) for x in layers))
            notes.append(f"{count} {what} are NaN or infinite and left out, in {_names(bad)}")
    cut = [x for x in layers if x.no_gradient]
    # Computed weights, as of weight_norm, are no parameters: they are not read at all.
    computed = [x.name for x in cut if not x.stats["n_in"].any()]
    if computed:
        notes.append(
            f"the weights of {_names(computed)} are computed from others: gradient scores are "
            "unknown there"
        )
    unreached = [x.name for x in cut if x.name not in computed]
    if unreached:
        notes.append(f"no gradient reached {_names(unreached)}: gradient scores are unknown there")
    return tuple(notes)


def _seen(layer: "LayerProfile") -> bool:
    return bool((layer.stats["n"] + layer.stats["n_nonfinite_h"] > 0).any())


def _reason(layer: "LayerProfile", observation: Observation) -> str:
    if layer.wiring.z_site is None and "unknown" in layer.activation:
        return "its activation function is not known"
    if layer.wiring.z_site is None:
        return "no hook can see its pre-activation"
    return observation.problems.get(layer.name, "it was not run on this data")


def _example(skipped: list[tuple[str, str]]) -> str:
    return f" ({skipped[0][0]}: {skipped[0][1]})" if skipped else ""


def _names(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{len(names)} layer{'s' * (len(names) > 1)} ({', '.join(names[:_SHOWN])}{more})"
