"""Apply a plan to a model: all of it, or nothing if anything fails."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from fastplastic.errors import FingerprintError, InputError
from fastplastic.initial import make_initializer
from fastplastic.model import check_unwrapped, fingerprint, reshard
from fastplastic.planning import GRANULARITIES, Plan, some_of
from fastplastic.processes import Processes, all_or_nothing, all_processes
from fastplastic.reinit.adjust import Adjustment
from fastplastic.reinit.averages import notes_of_averages, refuse_average
from fastplastic.reinit.changes import unit_change, weight_change
from fastplastic.reinit.copies import ModelCopies
from fastplastic.reinit.known_means import KnownMeans
from fastplastic.reinit.meeting import check_batches_together, facts_of
from fastplastic.reinit.optimizer_state import OptimizerState
from fastplastic.reinit.places import Elements, Region, Where, merged
from fastplastic.reinit.regions import Tensors
from fastplastic.reinit.report import ReinitReport, Written
from fastplastic.reinit.transaction import StateWrites, Undo, apply

OUTGOING = ("zero", "small", "fresh", "keep")


def reinit_(
    model: nn.Module,
    plan: Plan,
    *,
    init: str = "default",
    outgoing: str = "zero",
    compensate: bool | Mapping[str, Tensor] = False,
    recalibrate: bool = False,
    batches: Iterable[Any] | None = None,
    loss_fn: Callable[[Any, Any], Tensor] = cross_entropy,
    optimizer: Optimizer | None = None,
    reset_steps: bool = False,
    copies: Sequence[nn.Module] = (),
    seed: int = 0,
) -> ReinitReport:
    """Re-initialise what a plan names in place: all of it, or nothing if anything fails.

    For each unit: fresh incoming rows and biases (of coupled rows too), norm channels set to gamma
    1, beta 0, running mean 0 and running variance 1, and the outgoing columns as asked. A unit with
    outgoing weights of zero has no effect on the network until it is trained. After Sokar et al.
    (ReDo), arXiv 2302.12902, and Dohare et al., Nature 2024; "keep" after GraMa, arXiv 2505.24061.
    Single weights are drawn afresh and nothing else is touched, after Hernandez-Garcia et al.
    (SWR), arXiv 2508.00212. Which treatment did best on which networks is in
    benchmarks/transfer/README.md.

    Where several processes train the model, copied or spread over them, all call this with the same
    plan and options: each writes what it holds, the values are the same however the model is
    spread, and all processes succeed or none. Sums over batches may differ in the last bit with the
    number of processes.

    Args:
        model: The model that was profiled, or one with the same parameters.
        plan: What `fastplastic.plan` chose.
        init: Law of the fresh weights: "default" (the library's own), "kaiming_uniform",
            "kaiming_normal", "xavier_uniform", "trunc_normal" or "empirical" (see `initializers`).
        outgoing: What becomes of the outgoing columns of units. "zero": the unit has no effect, and
            the first gradient to its incoming weights is 0. "small": a random direction with 0.02
            of the median norm of the other columns: the unit has hardly any effect, and the first
            gradient is not 0, but about as small a share of the usual one. So the criterion
            `gradient` takes most of these units again in a profile made soon: in four networks 61
            to 100 % right away and 48 to 90 % after 12 steps, much as of "zero". "fresh": drawn
            anew. "keep".
        compensate: Add what the outgoing columns contributed on average over `batches` to the bias
            of their layer (without one, take it from the running mean of its BatchNorm), so that a
            unit that is stuck at a value takes no constant with it. For "zero" and "small". Or the
            mean activation of each unit, by layer name, where it is known: no batches are needed.
        recalibrate: Measure the running statistics of fresh norm channels over `batches`, instead
            of mean 0 and variance 1.
        batches: As for `fastplastic.profile`, to be read several times: the mean loss before and
            after is reported. Of several processes each passes its share.
        loss_fn: (output, targets) -> loss of the output as it is, as for `fastplastic.profile`.
        optimizer: The optimizer that trains the model, if it has started: what it remembers of each
            weight that is written (momentum, mean squares) begins anew. Else old momentum moves
            fresh weights.
        reset_steps: Also let its counter of steps begin anew, for each tensor that is written, as
            Adam corrects its means by it.
        copies: Target networks or moving averages of the model: the same elements are given the
            same values there.
        seed: Any integer. Fresh values depend on it, the parameter's name and the element alone;
            the global random state is neither read nor changed.

    Raises:
        FingerprintError: The plan was made for a model with other parameters.
        FileError: The plan does not fit the model or itself (edited by hand).
        InputError: An argument is unknown, or a weight cannot be written: shared between layers,
            transformed before use, not floating-point, not loaded. The optimizer is none, or not
            that of the model. The model is a moving average of another. A copy is none. There are
            no batches for what needs them.
        ProcessError: Another process failed, is gone, or was called with something else; nothing is
            written in any.
    """
    options = Options(
        init, outgoing, compensate, recalibrate, batches, loss_fn, optimizer, reset_steps, copies,
        seed,
    )  # fmt: skip
    together = all_processes()
    undo = Undo()
    # Else what FSDP2 has gathered and kept would be written to, and lost.
    reshard(model)
    try:
        with all_or_nothing(together, "reinit_", lambda: facts_of(model, plan, options.facts())):
            return _reinit(model, plan, options, together, undo)
    except BaseException:  # also KeyboardInterrupt and MemoryError
        undo()
        raise


@dataclass(frozen=True, eq=False)
class Options:
    """The arguments of `reinit_` beside model and plan, under the same names."""

    init: str
    outgoing: str
    compensate: bool | Mapping[str, Tensor]
    recalibrate: bool
    batches: Iterable[Any] | None
    loss_fn: Callable[[Any, Any], Tensor]
    optimizer: Optimizer | None
    reset_steps: bool
    copies: Sequence[nn.Module]
    seed: int

    @property
    def means(self) -> Mapping[str, Tensor] | None:
        """Mean activations that are known; None where they are measured, or not asked for."""
        return None if isinstance(self.compensate, bool) else self.compensate

    @property
    def compensated(self) -> bool:
        """Whether anything is compensated."""
        return self.means is not None or self.compensate is True

    def facts(self) -> dict[str, object]:
        """Return what has to be the same in all processes."""
        given = "none" if self.batches is None else "given"
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return values | {"batches": given, "loss_fn": "", "copies": f"{len(self.copies)} copies"}

    def check(self, model: nn.Module, plan: Plan, together: Processes | None) -> None:
        """Refuse what does not fit together, or is unknown: InputError."""
        check_unwrapped(model, "reinit_")
        check_choices(plan, self.outgoing, self.seed)
        _check_adjustments(plan, self.outgoing, self.compensated, self.recalibrate)
        measured = self.compensate is True
        _check_batches(self.batches is not None, measured, self.recalibrate)
        if self.batches is not None:
            check_batches_together(model, together, looks_inside=measured or self.recalibrate)


def _reinit(
    model: nn.Module, plan: Plan, options: Options, together: Processes | None, undo: Undo
) -> ReinitReport:
    """Do what `reinit_` does; `undo` knows what is written by then."""
    options.check(model, plan, together)
    refuse_average(model)
    initializer = make_initializer(options.init, model)
    tensors = Tensors(model)
    optimizer = options.optimizer
    state = None if optimizer is None else OptimizerState(optimizer, model)
    check_fingerprint(model, plan)
    if plan.granularity == "unit":
        change = unit_change(model, plan, tensors, initializer, options.outgoing)
    else:
        change = weight_change(plan, tensors, initializer)
    places = change.writes.places
    written = count_written(tensors, places)
    memory = _OptimizerReset.of(state, places, written, options.reset_steps)
    means = options.means
    known = None if means is None else KnownMeans(model, plan, tensors, means)
    adjust = Adjustment(model, tensors, change, options.batches, options.loss_fn, known, together)
    along = ModelCopies(options.copies, [entry.name for entry in written], tensors)
    adjust.measure(options.compensated)
    apply(tensors, change.writes, memory.writes, options.seed, undo)
    shifted = adjust.apply(undo, options.compensated, options.recalibrate)
    along.write(places, adjust.shifts, undo)
    notes = (
        *initializer.notes(), *memory.notes, *adjust.notes, *notes_of_averages(written),
        *_frozen(tensors, written),
    )  # fmt: skip
    remembered = (*written, *shifted, *memory.written)
    report = report_of(plan, options.init, options.outgoing, options.seed, remembered, notes)
    return replace(report, loss_before=adjust.loss_before, loss_after=adjust.loss_after)


def report_of(
    plan: Plan, init: str, outgoing: str, seed: int, written: tuple[Written, ...],
    notes: tuple[str, ...],
) -> ReinitReport:  # fmt: skip
    """Return the report of what was done, without losses."""
    counts = plan.counts
    return ReinitReport(
        count=sum(counts.values()),
        layers=counts,
        shares=_shares(plan, counts),
        granularity=plan.granularity,
        init=init,
        outgoing=outgoing if plan.granularity == "unit" else "keep",
        seed=int(seed),
        written=written,
        notes=notes,
    )


def _frozen(tensors: Tensors, written: Iterable[Written]) -> tuple[str, ...]:
    kept = [entry.name for entry in written if entry.kind == "parameter"]
    names = [name for name in kept if not tensors[name].requires_grad]
    if not names:
        return ()
    return (
        f"{len(names)} parameters that were written have requires_grad=False, so they do not "
        f"learn: {some_of(names)}",
    )


def _shares(plan: Plan, counts: dict[str, int]) -> dict[str, float]:
    """Return the share of the units of each layer, or of the weights of each tensor."""
    sizes = plan.sizes
    return {name: count / sizes[name] for name, count in counts.items()}


def _check_batches(given: bool, compensate: bool, recalibrate: bool) -> None:
    for name, asked in (("compensate", compensate), ("recalibrate", recalibrate)):
        if asked and not given:
            raise InputError(f"{name} needs batches, found none: pass batches=..., as to profile")


def _check_adjustments(plan: Plan, outgoing: str, compensate: bool, recalibrate: bool) -> None:
    for name, asked in (("compensate", compensate), ("recalibrate", recalibrate)):
        if asked and plan.granularity == "weight":
            raise InputError(f"{name} is for units, found a plan of single weights: leave it out")
    if compensate and outgoing not in ("zero", "small"):
        raise InputError(
            f"compensate with outgoing {outgoing!r}: expected 'zero' or 'small', which take the "
            "unit out of use: leave one of them out"
        )


def check_choices(plan: Plan, outgoing: str, seed: int) -> None:
    """Refuse arguments that are unknown: InputError."""
    if outgoing not in OUTGOING:
        raise InputError(f"outgoing {outgoing!r} is unknown, expected one of {', '.join(OUTGOING)}")
    if not isinstance(seed, Integral):
        raise InputError(f"seed {seed!r} is not usable, expected an integer")
    if plan.granularity not in GRANULARITIES:
        raise InputError(
            f"granularity {plan.granularity!r} is unknown, expected 'unit' or 'weight'"
        )
    if plan.granularity == "weight" and outgoing != OUTGOING[0]:
        raise InputError(
            f"outgoing {outgoing!r} is for units, expected none for single weights: leave it out"
        )


def check_fingerprint(model: nn.Module, plan: Plan) -> None:
    """Refuse a plan for a model with other parameters: FingerprintError."""
    found = fingerprint(model)
    if found != plan.fingerprint:
        raise FingerprintError(
            f"the plan is for the model with fingerprint {plan.fingerprint[:12]}, this one has "
            f"{found[:12]}, expected the same parameter names, shapes and dtypes: "
            "profile and plan this model"
        )


def count_written(tensors: Tensors, places: Sequence[Where]) -> tuple[Written, ...]:
    """Return how much is written of each tensor."""
    counted = (_count_one(tensors, name, parts) for name, parts in _by_name(places).items())
    return tuple(written for written in counted if written.elements)


def _regions(places: Sequence[Where]) -> list[Region]:
    return [place for place in places if isinstance(place, Region)]


def _by_name(places: Sequence[Where]) -> dict[str, list[Where]]:
    found: dict[str, list[Where]] = {}
    for place in places:
        found.setdefault(place.name, []).append(place)
    return found


def _count_one(tensors: Tensors, name: str, places: list[Where]) -> Written:
    tensor = tensors[name]
    if len(places) == 1:
        elements = places[0].size(tensor)
    else:
        # Regions overlap where rows meet columns. They take all dimensions after the second.
        mask = torch.zeros([*tensor.shape[:2], *[1] * (tensor.dim() - 2)], dtype=torch.bool)
        for region in merged(_regions(places)):
            region.view(mask)[region.index] = True
        elements = int(mask.count_nonzero()) * math.prod(tensor.shape[2:])
    kind = "parameter" if name in tensors.parameters else "buffer"
    return Written(name, kind, elements, tensor.numel())


@dataclass(frozen=True, eq=False)
class _OptimizerReset:
    """What is reset of an optimizer, and what is said of it."""

    writes: StateWrites = field(default_factory=StateWrites)
    written: tuple[Written, ...] = ()
    notes: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        state: OptimizerState | None,
        places: Sequence[Where],
        written: tuple[Written, ...],
        reset_steps: bool,
    ) -> "_OptimizerReset":
        """Return what the optimizer remembers of the places."""
        if state is None:
            return cls()
        elements = {entry.name: entry.elements for entry in written}
        single = [place for place in places if isinstance(place, Elements)]
        by_name = _by_name([*single, *merged(_regions(places))])
        tensors = list(state.tensors(elements))
        return cls(
            StateWrites(
                [(tensor, place) for tensor in tensors for place in by_name[tensor.name]],
                list(state.steps(elements)) if reset_steps else (),
            ),
            tuple(
                Written(
                    f"{tensor.name}: {tensor.key}", "optimizer state", elements[tensor.name],
                    tensor.tensor.numel(),
                )
                for tensor in tensors
            ),
            state.notes(elements),
        )  # fmt: skip
