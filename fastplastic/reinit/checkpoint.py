"""Apply a plan to a checkpoint in many files, without ever holding the weights in memory."""

import os
from collections.abc import Iterable, Mapping
from contextlib import nullcontext

from torch import nn

from fastplastic.files import (
    OptimizerBeside,
    StoredWeights,
    WeightStore,
    changed_copy,
    check_fit,
    entries_beside,
    find_weights,
    left_out,
    open_store,
    optimizers_beside,
)
from fastplastic.initial import make_initializer
from fastplastic.model import outline
from fastplastic.planning import Plan, some_of
from fastplastic.reinit.averages import notes_of_averages, refuse_average
from fastplastic.reinit.changes import unit_change, weight_change
from fastplastic.reinit.optimizer_state import OptimizerState, StateTensor
from fastplastic.reinit.report import ReinitReport, Written
from fastplastic.reinit.run import check_choices, check_fingerprint, count_written, report_of
from fastplastic.reinit.stored import StoredTensors, write_stored


def reinit_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str] | None,
    model: nn.Module,
    plan: Plan,
    *,
    init: str = "default",
    outgoing: str = "zero",
    seed: int = 0,
    force: bool = False,
) -> ReinitReport:
    """Re-initialise what a plan names in a checkpoint of many files: all of it, or nothing.

    The files are those of `torch.distributed.checkpoint`, written by any number of processes, or
    sharded safetensors with their index, as of Hugging Face. Each is copied, and the tensors that
    the plan names are changed in the copies, one at a time: the result is that of loading all,
    `reinit_` and saving, at the memory of one tensor. Other weights of the same model in the
    checkpoint (averages) get the same values at the same places, and what an optimizer remembers of
    them begins anew; all else stays as it is, and the notes of the report say so.

    Args:
        source: The folder of the checkpoint, or its index. Nothing is written to it.
        target: The folder to write, which gets all other files too (of other frameworks' weights
            and of hidden files those of a distributed checkpoint alone). It appears when it is
            complete. None replaces `source`; the old one is kept as SOURCE.bak.
        model: The model, for its structure: it may be on the meta device (built under
            `torch.device("meta")`), and is not changed.
        plan: What `fastplastic.plan` chose.
        init: As for `reinit_`.
        outgoing: As for `reinit_`.
        seed: As for `reinit_`.
        force: Replace a checkpoint at `target`, or an older SOURCE.bak.

    Raises:
        FingerprintError: The plan was made for a model with other parameters.
        FileError: A file is missing, damaged or does not fit model or plan, or cannot be written.
        InputError: An argument is unknown, or a weight cannot be written.
    """
    check_choices(plan, outgoing, seed)
    refuse_average(model)
    check_fingerprint(model, plan)
    shape = outline(model)
    initializer = make_initializer(init, shape)
    store = open_store(source)
    stored = find_weights(store, shape)
    fit_of(store, stored, shape)
    tensors = StoredTensors(shape, store, stored)
    # Only these look at what there is.
    looks = init == "empirical" or outgoing == "small"
    with tensors.reading() if looks else nullcontext():
        if plan.granularity == "unit":
            change = unit_change(shape, plan, tensors, initializer, outgoing)
        else:
            change = weight_change(plan, tensors, initializer)
    written = count_written(tensors, change.writes.places)
    optimizers = optimizers_beside(store, stored, shape)
    states = _states(optimizers, shape, [entry.name for entry in written])
    left = left_out(store) if target is not None else []
    with changed_copy(store, target, force=force) as folder:
        write_stored(tensors, change.writes, store, stored, states, folder, seed)
    notes = (
        *initializer.notes(),
        *notes_of_averages(written),
        *_rest(store, stored, optimizers),
        *([f"left out, as they may hold other weights: {some_of(left)}"] if left else []),
    )
    everything = (*written, *_remembered(written, states))
    return report_of(plan, init, outgoing, seed, everything, notes)


def fit_of(store: WeightStore, stored: StoredWeights, model: nn.Module) -> None:
    """Raise FileError where tensors of the model are missing or of another shape."""
    found = {name: store.tensors[there] for name, there in stored.names.items()}
    check_fit(model, model.state_dict(keep_vars=True), found, store.folder)
    for copy in stored.copies:
        found = {name: store.tensors[there] for name, there in copy.items()}
        check_fit(model, model.state_dict(keep_vars=True), found, store.folder)


def _states(
    optimizers: Iterable[OptimizerBeside], model: nn.Module, names: Iterable[str]
) -> dict[str, list[tuple[StateTensor, str]]]:
    """Return {parameter: what optimizers remember of it, and where that is in the files}."""
    found: dict[str, list[tuple[StateTensor, str]]] = {}
    wanted = list(names)
    for known in optimizers:
        if known.stored is not None:
            for state in OptimizerState(known.stored.optimizer, model).tensors(wanted):
                where = known.names[state.name, state.key]
                found.setdefault(state.name, []).append((state, where))
    return found


def _remembered(
    written: Iterable[Written], states: Mapping[str, Iterable[tuple[StateTensor, str]]]
) -> list[Written]:
    return [
        Written(f"{entry.name}: {state.key}", "optimizer state", entry.elements, entry.total)
        for entry in written
        for state, _ in states.get(entry.name, ())
    ]


def _rest(
    store: WeightStore, stored: StoredWeights, optimizers: Iterable[OptimizerBeside]
) -> list[str]:
    """Return what became of all else in the checkpoint."""
    notes = []
    if stored.copies:
        notes.append(f"{len(stored.copies)} other copies of the weights were re-initialised alike")
    known = [found for found in optimizers if found.stored is not None]
    unknown = [found.entry or "its optimizer" for found in optimizers if found.stored is None]
    if known:
        names = ", ".join(found.entry or "the optimizer" for found in known)
        notes.append(f"{names}: begins anew for what was re-initialised")
    if unknown:
        notes.append(
            f"{', '.join(unknown)}: left as it is, as it is not known which state belongs to which "
            "weight: begin with a fresh optimizer"
        )
    kept = entries_beside(store, stored, optimizers)
    if kept:
        notes.append(f"kept as they are: {some_of(kept)}")
    return notes
