"""Run batches through a model and return its plasticity profile."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fastplastic.errors import InputError
from fastplastic.graph import build_graph
from fastplastic.kernels import backend
from fastplastic.measure.compiled import EagerStance
from fastplastic.measure.coverage import coverage_of, notes_of
from fastplastic.measure.observation import Observation
from fastplastic.measure.observer import Observer
from fastplastic.measure.positions import PositionSample
from fastplastic.measure.record import LayerProfile, Profile
from fastplastic.measure.rounds import Rounds
from fastplastic.measure.together import compare_traces
from fastplastic.model import (
    Batch,
    LentHead,
    MeanGradient,
    check_built,
    check_unwrapped,
    device_of,
    digest_of_copies,
    dtype_of,
    fingerprint,
    is_spread,
    loss_of,
    read_batches,
    reshard,
    undisturbed,
    weights_of,
)
from fastplastic.processes import Processes, all_processes
from fastplastic.wiring import UnitGraph, UnitLayer

if TYPE_CHECKING:
    from fastplastic.measure.row_samples import RowSamples


def profile(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    loss_fn: Callable[[Any, Any], Tensor] = cross_entropy,
    gradients: bool = False,
    ranks: bool = False,
    backward: bool = True,
    sample_positions: int | None = None,
    example_inputs: Any = None,
    progress: Callable[[int], None] | None = None,
    lent_head: LentHead | None = None,
) -> Profile:
    """Run batches forward and backward and return the plasticity profile; the model is unchanged.

    The model is measured in the mode it is in (train or eval). Gradients of weights are means over
    the batches, each of the same weight. A batch whose loss is not finite gives no gradient.

    Args:
        model: Any module with floating-point parameters.
        batches: Yields (inputs, targets), where inputs is a tensor, a tuple of positional or a
            mapping of keyword arguments; or yields mappings with "labels", as for Hugging Face
            models. Tensors are moved to the model's device.
        loss_fn: (output, targets) -> loss, one element. It gets the model's output as it is, and as
            targets None where a mapping has no labels. The default takes the output's `logits`, or
            the first of a tuple; a model's own loss takes precedence over it where a mapping is
            passed.
        gradients: Keep the mean gradient of every parameter (as much memory as the parameters), and
            refer to the parameters: a plan of single weights needs both.
        ranks: Also measure the ranks of `diagnostics` on a sample of 1,024 positions of each layer
            (4 KiB of memory per unit).
        backward: Also measure gradients. Without, the model is run forward only, which is faster,
            and criteria that read gradients have no scores.
        sample_positions: Read activations and gradients of large tensors at so many positions, as
            for `Monitor`; ranks then take their rows from these.
        example_inputs: What to trace the model with: a tensor, a tuple of positional or a mapping
            of keyword arguments. By default up to two samples of the first batch. Or the wiring
            itself, where it is known.
        progress: Called with the number of batches done after each.
        lent_head: What `fastplastic.model.loss_head` gives, where a head stands in for the model's
            own: its weights are not kept, and the profile is of the model with its own head.

    Raises:
        InputError: A parameter or buffer has no values yet (lazy, or on the meta device),
            `sample_positions` is not a positive integer, there are no batches, a batch has another
            form, there is nothing to compute a loss from, or no layer could be measured.
    """
    if gradients and not backward:
        raise InputError("gradients=True without backward: there are none to keep: drop one")
    check_unwrapped(model, "profile")
    check_built(model, spread=True)
    device = device_of(model)
    seed = torch.initial_seed()
    positions = PositionSample(sample_positions, seed)
    options = {"backward": backward, "sample_positions": sample_positions, "gradients": gradients}
    together = _meet(model, options, ranks=ranks)
    if together is not None:
        positions.among(together)
    mean = MeanGradient(model)
    with undisturbed(model), torch.inference_mode(False), torch.enable_grad(), EagerStance():
        stream = read_batches(batches, device)
        rounds = Rounds(stream, model, together)
        graph = _graph_of_all(model, rounds, example_inputs, together)
        samples = _row_samples() if ranks else None
        read = None if samples is None else samples.read
        observer = Observer(model, graph, sample=read, positions=positions, together=together)
        try:
            observer.attach()
            every = _watched(rounds, observer)
            if backward:
                losses = _run(model, every, loss_fn, mean, progress)
                rounds.check_losses(losses.total)
            else:
                losses = _run_forward(model, every, progress)
        except Exception as error:
            rounds.fail(error)
            raise
        finally:
            observer.detach()
        means = mean.take(together, rounds.group)
        observation = observer.observation(means)
    losses, largest = _of_all(losses, positions.largest, rounds, together)
    return assemble(
        model, graph, observation, seed=seed, gradients=means if gradients else None,
        notes=(*positions.notes(largest), *losses.notes(), *mean.notes()), samples=samples,
        lent_head=lent_head, backward=backward,
    )  # fmt: skip


def assemble(
    model: nn.Module,
    graph: UnitGraph,
    observation: Observation,
    *,
    seed: int,
    gradients: Mapping[str, Tensor] | None = None,
    notes: tuple[str, ...] = (),
    samples: "RowSamples | None" = None,
    lent_head: LentHead | None = None,
    backward: bool = True,
) -> Profile:
    """Return the profile of what an observer has seen; InputError when it saw nothing."""
    _check_seen(graph, observation)
    graph = _with_learning(_without_unforeseen(graph, observation), model)
    layers = [
        LayerProfile(
            wiring,
            observation.stats[wiring.name],
            None if samples is None else samples.ranks(wiring.name),
        )
        for wiring in graph.layers
    ]
    device = device_of(model)
    lent = lent_head.layers if lent_head else ()
    return Profile(
        layers=tuple(layers),
        coverage=coverage_of(graph, layers, observation),
        mode=next(iter(observation.modes)) if len(observation.modes) == 1 else "mixed",
        samples=observation.samples,
        batches=observation.steps,
        backend=backend(device),
        device=str(device),
        dtype=dtype_of(model),
        seed=seed,
        fingerprint=lent_head.fingerprint if lent_head else fingerprint(model),
        gradients=gradients,
        weights=None if gradients is None else weights_of(model, but=lent),
        notes=(*notes_of(graph, layers, observation, backward=backward), *notes),
    )


def _check_seen(graph: UnitGraph, observation: Observation) -> None:
    """Refuse what is not whole: compiled code ran calls, or layers, past the hooks."""
    bypassed = [layer.name for layer in graph.layers if _bypassed(layer, observation)]
    if observation.unseen:
        what = f"{observation.unseen} calls of the model"
    elif bypassed:
        what = f"{bypassed[0]} ({len(bypassed)} layers in all)"
    else:
        return
    raise InputError(
        f"{what} ran in compiled code that hooks do not see, and could not be measured: the code "
        "was compiled before there were hooks (call torch.compiler.reset() before they are put "
        "on) or is of nn.MultiheadAttention; or measure with every=2 or more, which runs the "
        "measured steps eagerly"
    )


def _bypassed(layer: UnitLayer, observation: Observation) -> bool:
    """Tell whether a layer has gradients though no hook saw it, and old code may have run it."""
    if not observation.stale or layer.tied or layer.name in observation.problems:
        return False
    stats = observation.stats[layer.name]
    hooked = [site.where in ("input", "output") for site in layer.z_sites]
    seen = (stats["n"] + stats["n_nonfinite_h"]).any()
    return bool(hooked) and all(hooked) and not seen and bool(stats["n_dw"].any())


def _without_unforeseen(graph: UnitGraph, observation: Observation) -> UnitGraph:
    """Hide nothing where a layer ran that no trace shows: which units it reads is not known."""
    if not observation.unforeseen:
        return graph
    reason = f"{min(observation.unforeseen)} ran, which is not in the trace of the model"
    layers = tuple(
        replace(layer, hidden=torch.zeros_like(layer.hidden), reasons={reason: layer.n_units})
        for layer in graph.layers
    )
    return replace(graph, layers=layers)


def _with_learning(graph: UnitGraph, model: nn.Module) -> UnitGraph:
    """Say which weights do not learn, beside those of which it is said already."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    still = {name for name, parameter in parameters.items() if not parameter.requires_grad}
    # A model that is frozen as a whole is not being trained: what will learn is not known.
    if len(still) in (0, len(parameters)):
        return graph
    layers = []
    for layer in graph.layers:
        weights = (layer.weight, *(consumer.weight for consumer in layer.consumers))
        known = still.union(layer.without_grad)
        own = tuple(name for name in dict.fromkeys(weights) if name in known)
        layers.append(replace(layer, without_grad=own))
    return replace(graph, layers=tuple(layers))


def _row_samples() -> "RowSamples":
    # Only here: who asks for no ranks does not load what makes them.
    from fastplastic.measure.row_samples import RowSamples

    return RowSamples()


def _meet(model: nn.Module, options: Mapping[str, object], *, ranks: bool) -> Processes | None:
    """Return the processes that share the model, when all are here with the same options."""
    together = all_processes()
    if together is None:
        return None
    if ranks:
        raise InputError(f"{together.size} processes and ranks, expected one process: leave it out")
    said = {name: str(value) for name, value in options.items()}
    copied = {"the weights that all have whole": digest_of_copies(model)}
    together.meet("profile", {"the model": fingerprint(model)[:12], **copied, **said})
    return together


def _of_all(
    losses: "_Losses", largest: int, rounds: Rounds, together: Processes | None
) -> tuple["_Losses", int]:
    """Return what there is to say of losses and of the largest tensor in all processes."""
    if together is None:
        return losses, largest
    said = together.share((losses, largest))
    # Of those that share batches one counts their losses.
    counted = [said[ranks[0]][0] for ranks in rounds.group.every]
    return _Losses.of(counted), max(own for _, own in said)


def _graph_of_all(
    model: nn.Module, rounds: Rounds, example_inputs: Any, together: Processes | None
) -> UnitGraph:
    """Return the wiring, the same in all processes: ProcessError where it is not."""
    try:
        graph = _graph_of(model, rounds, example_inputs)
    except Exception:
        if together is not None:
            together.fail()
        raise
    compare_traces(graph, together)
    return graph


def _graph_of(model: nn.Module, rounds: Rounds, example_inputs: Any) -> UnitGraph:
    """Return the wiring that was passed, or that of a trace."""
    if isinstance(example_inputs, UnitGraph):
        return example_inputs
    example = rounds.spare.example() if example_inputs is None else example_inputs
    return build_graph(model, example)


def _watched(rounds: Rounds, observer: Observer) -> Iterator[tuple[Batch, bool]]:
    """Yield all batches, and pause the observer for those that do not count."""
    for batch, counts in rounds:
        observer.pause(not counts)
        yield batch, counts


@dataclass(frozen=True)
class _Losses:
    """How the losses of batches came out.

    Attributes:
        batches: How many there were.
        dropped: How many of them were not finite.
        attached: Whether they depend on what has gradients.
        total: Sum of those that are finite.
    """

    batches: int = 0
    dropped: int = 0
    attached: bool = True
    total: float = 0.0

    @classmethod
    def of(cls, parts: Sequence["_Losses"]) -> "_Losses":
        """Return those of all processes."""
        return cls(
            sum(part.batches for part in parts),
            sum(part.dropped for part in parts),
            all(part.attached for part in parts),
            sum(part.total for part in parts),
        )

    def notes(self) -> tuple[str, ...]:
        """Return what is to be said about them."""
        notes = []
        if self.dropped:
            notes.append(
                f"the loss of {self.dropped} of {self.batches} batches is not finite: no gradients "
                "of them"
            )
        if not self.attached:
            notes.append(
                "the loss depends on no parameter with requires_grad: there are no gradients"
            )
        return tuple(notes)


def _run_forward(
    model: nn.Module,
    batches: Iterable[tuple[Batch, bool]],
    progress: Callable[[int], None] | None,
) -> _Losses:
    """Run all batches without a loss."""
    with torch.no_grad():
        for done, (batch, _) in enumerate(batches, 1):
            model(*batch.args, **batch.kwargs)
            if progress is not None:
                progress(done)
    reshard(model)
    return _Losses()


def _run(
    model: nn.Module,
    batches: Iterable[tuple[Batch, bool]],
    loss_fn: Callable[[Any, Any], Tensor],
    mean: MeanGradient,
    progress: Callable[[int], None] | None,
) -> _Losses:
    """Run all batches; return how their losses came out."""
    done, dropped, total = 0, 0, 0.0
    attached, spread = True, any(map(is_spread, model.parameters()))
    for batch, counts in batches:
        loss = loss_of(model, batch, loss_fn)
        attached = loss.requires_grad
        value = loss.item()
        finite = math.isfinite(value)
        total += value if counts and finite else 0.0
        dropped += counts and not finite
        if attached and counts and finite:
            torch.autograd.backward(loss)
            mean.add(1)
        elif attached and spread:
            # The other processes need it to get their gradients.
            torch.autograd.backward(loss.nan_to_num(0.0, 0.0, 0.0) * 0)
            mean.add(0)
        done += counts
        if progress is not None:
            progress(done)
    return _Losses(done, dropped, attached, total)
