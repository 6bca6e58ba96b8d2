"""Which layers were measured, and what a reader of the numbers has to know."""

from collections.abc import Iterable

from fastplastic.errors import InputError
from fastplastic.measure.observation import Observation
from fastplastic.measure.record import Coverage, LayerProfile
from fastplastic.wiring import UnitGraph

_SHOWN = 3


def coverage_of(
    graph: UnitGraph, layers: Iterable[LayerProfile], observation: Observation
) -> Coverage:
    """Return the coverage; InputError when nothing at all was measured."""
    skipped = list(graph.skipped)
    layers = list(layers)
    for layer in layers:
        if not _seen(layer):
            skipped.append((layer.name, _reason(layer, observation)))
    found = len(graph.layers) + len(graph.skipped)
    # Of a model that cannot be traced, gradients may be all that is known.
    untraced = graph.note is not None
    gradients = untraced and any(not layer.no_gradient for layer in layers)
    if not found:
        raise InputError(
            "the model has no linear or convolution layer, expected at least one: pass the module "
            "that holds them"
        )
    if len(skipped) == found and not gradients:
        raise InputError(
            f"none of {found} weight layers was measured{_example(skipped)}: call the model itself "
            "on data, a monitor's after attach() or inside its with block"
        )
    return Coverage(found, found - len(skipped), tuple(skipped))


def notes_of(
    graph: UnitGraph,
    layers: Iterable[LayerProfile],
    observation: Observation,
    *,
    backward: bool = True,
) -> tuple[str, ...]:
    """Return remarks for the report, one line each."""
    layers = list(layers)
    notes = []
    if graph.note is not None:
        notes.append(graph.note)
    notes += _unknown(layers)
    if observation.modes == {"mixed"} or len(observation.modes) > 1:
        notes.append("some modules were in train mode and some in eval mode")
    if observation.masked:
        notes.append("padding was left out by the attention mask")
    if observation.dropped:
        steps = f"{observation.dropped} of {observation.steps} steps"
        notes.append(f"{steps} had gradients that are not finite under the loss scale: left out")
    if observation.apart:
        notes.append(
            "gradients of weights are not measured: they differed between the processes behind "
            "their backward passes, where DistributedDataParallel or fully_shard make them the same"
        )
    if observation.summands:
        names = _names(sorted(observation.summands))
        notes.append(
            f"gradients of {names} are not measured: each process of those that share batches has "
            "a summand of them, or sees other positions (tensor parallelism)"
        )
    if observation.lost:
        tensors = "1 tensor was" if observation.lost == 1 else f"{observation.lost} tensors were"
        notes.append(f"{tensors} overwritten before the end of a pass, and not read then")
    notes += _nonfinite(layers)
    if not backward:
        return (*notes, "measured forward only: gradient scores are unknown")
    return (*notes, *_without_gradients(layers))


def _nonfinite(layers: list[LayerProfile]) -> list[str]:
    """Return remarks on what was left out because it is NaN or infinite."""
    notes = []
    for what, row in (
        ("activations", "n_nonfinite_h"),
        ("gradients of activations", "n_nonfinite_g"),
        ("gradients of weights", "n_nonfinite_dw"),
    ):
        bad = [x.name for x in layers if bool((x.stats[row] > 0).any())]
        if bad:
            count = int(sum(float(x.stats[row].sum()) for x in layers))
            notes.append(f"{count} {what} are NaN or infinite and left out, in {_names(bad)}")
    return notes


def _without_gradients(layers: list[LayerProfile]) -> list[str]:
    """Return remarks on layers of which gradients are not known."""
    notes = []
    cut = [x for x in layers if x.no_gradient]
    # Computed weights, as of weight_norm, are no parameters: they are not read at all.
    computed = [x.name for x in cut if not x.stats["n_in"].any()]
    if computed:
        notes.append(
            f"the weights of {_names(computed)} are computed from others: gradient scores are "
            "unknown there"
        )
    unseen = [x for x in layers if x.measured.any() and not x.wiring.g_sites and not x.no_gradient]
    if unseen:
        names = _names([x.name for x in unseen])
        notes.append(f"no hook can see the gradients of activations of {names}: mean|g| is unknown")
    unreached = [x.name for x in cut if x.name not in computed]
    if unreached:
        notes.append(f"no gradient reached {_names(unreached)}: gradient scores are unknown there")
    return notes


def _unknown(layers: Iterable[LayerProfile]) -> list[str]:
    """Return a remark on units whose activations are not measured, if there are any."""
    lost = [layer for layer in layers if layer.wiring.unknown]
    if not lost:
        return []
    units = sum(sum(layer.wiring.unknown.values()) for layer in lost)
    reasons = "; ".join(dict.fromkeys(text for layer in lost for text in layer.wiring.unknown))
    return [
        f"activations of {units} units are not measured, in "
        f"{_names([layer.name for layer in lost])}: they are not counted as dead, frozen or "
        f"dormant ({reasons})"
    ]


def _seen(layer: LayerProfile) -> bool:
    return bool((layer.stats["n"] + layer.stats["n_nonfinite_h"] > 0).any())


def _reason(layer: LayerProfile, observation: Observation) -> str:
    if not layer.wiring.z_sites:
        why = "; ".join(layer.wiring.unknown) or "no hook can see its pre-activation"
        return f"{why}{_other_figures(layer)}"
    if not observation.modes:
        return "no forward pass of the model was seen"
    modes = " and ".join(sorted(observation.modes))
    return observation.problems.get(layer.name, f"it was not run on this data in {modes} mode")


def _other_figures(layer: LayerProfile) -> str:
    """Say what is measured of a layer without activations."""
    if not layer.stats["n_in"].any():
        return ""
    what = "weights are" if layer.no_gradient else "weights and their gradients are"
    return f"; its {what} measured"


def _example(skipped: list[tuple[str, str]]) -> str:
    return f" ({skipped[0][0]}: {skipped[0][1]})" if skipped else ""


def _names(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{len(names)} layer{'s' * (len(names) > 1)} ({', '.join(names[:_SHOWN])}{more})"
