"""What a re-initialisation does with batches: loss, lost constants, statistics of norms."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastplastic.errors import InputError
from fastplastic.measure import Rounds
from fastplastic.model import (
    device_of,
    local_of,
    loss_of,
    part_of,
    read_batches,
    reshard,
    undisturbed,
)
from fastplastic.planning import some_of
from fastplastic.processes import Processes
from fastplastic.reinit.changes import Change
from fastplastic.reinit.contributions import Contributions
from fastplastic.reinit.known_means import KnownMeans
from fastplastic.reinit.places import Region, shift_within
from fastplastic.reinit.regions import Tensors
from fastplastic.reinit.report import Written
from fastplastic.reinit.transaction import Undo, place_of


def mean_loss(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: Callable[[Any, Any], Tensor],
    together: Processes | None = None,
    contributions: Contributions | None = None,
) -> float:
    """Return the mean loss over batches, each of the same weight; the model is as before.

    Args:
        model: The model.
        batches: Those of this process, to be read several times.
        loss_fn: (output, targets) -> loss.
        together: The processes whose batches they are; None for this one alone.
        contributions: What watches the model meanwhile.

    Raises:
        InputError: There are no batches, they can be read once only, or have another form.
    """
    if iter(batches) is batches:
        raise InputError(
            f"batches is a {type(batches).__name__} that can be read once, expected a list or a "
            "DataLoader: the loss is measured before and after"
        )
    losses = []
    watched = nullcontext() if contributions is None else contributions.attached()
    # Random numbers are put back each time, so that dropout draws the same before and after.
    with undisturbed(model), torch.no_grad(), watched:
        for batch, counts in Rounds(read_batches(batches, device_of(model)), model, together):
            if contributions is not None:
                contributions.paused = not counts
            loss = loss_of(model, batch, loss_fn).item()
            losses += [loss] * counts
        reshard(model)
    # A sum of infinities is an error to fsum.
    total = math.fsum(losses) if all(map(math.isfinite, losses)) else math.nan
    sums = torch.tensor([total, len(losses)], dtype=torch.float64)
    if together is not None:
        together.add_(sums)
    return float(sums[0] / sums[1])


def fresh_statistics(
    model: nn.Module,
    names: Iterable[str],
    batches: Iterable[Any],
    loss_fn: Callable[[Any, Any], Tensor],
    together: Processes | None = None,
) -> Mapping[str, Tensor]:
    """Return {buffer: running mean or variance} of some norms over batches; nothing is changed.

    All else runs in eval mode, so that dropout does not enter. The mean over batches, as
    `torch.optim.swa_utils.update_bn` takes it, over those of all processes.
    """
    norms = {name: model.get_submodule(name) for name in names}
    momenta = {
        name: norm.momentum
        for name, norm in norms.items()
        if isinstance(norm, _BatchNorm) and norm.track_running_stats
    }
    found, seen = {}, 0
    with undisturbed(model), _with_momenta(norms, dict.fromkeys(momenta), momenta):
        model.eval()
        for name in momenta:
            norms[name].reset_running_stats()  # type: ignore[operator]
        with torch.no_grad():
            for batch, counts in Rounds(read_batches(batches, device_of(model)), model, together):
                for name in momenta:
                    norms[name].train(counts)
                loss_of(model, batch, loss_fn)
                seen += counts
            reshard(model)
        for name in momenta:
            for kind in ("running_mean", "running_var"):
                found[f"{name}.{kind}"] = getattr(norms[name], kind).clone()
    return found if together is None else _mean_over_processes(found, seen, together)


def _mean_over_processes(
    found: Mapping[str, Tensor], seen: int, together: Processes
) -> dict[str, Tensor]:
    """Return the means of statistics, each weighted by the number of batches it is of."""
    count = torch.tensor(float(seen), dtype=torch.float64)
    together.add_(count)
    means = {}
    for name, values in found.items():
        sums = values.double().cpu() * seen
        together.add_(sums)
        means[name] = (sums / count).to(values.device, values.dtype)
    return means


@contextmanager
def _with_momenta(
    norms: Mapping[str, Any], inside: Mapping[str, Any], outside: Mapping[str, Any]
) -> Iterator[None]:
    try:
        for name, momentum in inside.items():
            norms[name].momentum = momentum
        yield
    finally:
        for name, momentum in outside.items():
            norms[name].momentum = momentum


class Adjustment:
    """What is measured on batches before and after, and written besides.

    Args:
        model: The model.
        tensors: Its tensors.
        change: What the plan does.
        batches: As for `fastplastic.profile`; None to measure nothing.
        loss_fn: (output, targets) -> loss.
        known: What the outgoing columns contribute, where that need not be measured.
        together: The processes whose batches they are; None for this one alone.
    """

    def __init__(
        self,
        model: nn.Module,
        tensors: Tensors,
        change: Change,
        batches: Iterable[Any] | None,
        loss_fn: Callable[[Any, Any], Tensor],
        known: KnownMeans | None = None,
        together: Processes | None = None,
    ) -> None:
        self._model, self._tensors, self._change = model, tensors, change
        self._batches, self._loss_fn, self._known = batches, loss_fn, known
        self._together = together
        self._lost: tuple[dict[str, Tensor], list[str]] = ({}, [])
        self.shifts: dict[str, Tensor] = {}
        self.loss_before: float | None = None
        self.loss_after: float | None = None
        self.notes: list[str] = []

    def measure(self, compensate: bool) -> None:
        """Measure the loss before, and what would be lost."""
        if self._batches is None:
            return
        if not compensate or self._known is not None:
            self.loss_before = self._mean_loss(self._batches)
            return
        watching = Contributions(self._model, self._change.columns, self._together)
        self.loss_before = self._mean_loss(self._batches, watching)
        # From columns that are still there.
        self._lost = watching.shifts(self._change.rows)

    def apply(self, undo: Undo, compensate: bool, recalibrate: bool) -> list[Written]:
        """Write what is wanted besides, measure the loss after; return what was not yet counted."""
        shifted = self._compensate(undo) if compensate else []
        if self._batches is None:
            return shifted
        if recalibrate:
            self._recalibrate(self._batches)
        self.loss_after = self._mean_loss(self._batches)
        return shifted

    def _mean_loss(self, batches: Iterable[Any], watching: Contributions | None = None) -> float:
        return mean_loss(self._model, batches, self._loss_fn, self._together, watching)

    def _compensate(self, undo: Undo) -> list[Written]:
        known = self._known
        self.shifts, without = known.shifts(self._change.rows) if known else self._lost
        if without:
            self.notes.append(
                f"{len(without)} weights have no bias or BatchNorm to compensate with: "
                f"{some_of(without)}"
            )
        written = []
        for name, shift in self.shifts.items():
            _check_finite(f"what columns contributed to {name!r}", shift)
            own = local_of(self._tensors[name].detach())
            undo.keep(partial(own.copy_, own.clone()))
            here = shift_within(shift, part_of(name, self._tensors[name]))
            own.copy_(own.double() + here.to(own.device))
            kind = "parameter" if name in self._tensors.parameters else "buffer"
            count = int(shift.count_nonzero())
            written.append(Written(name, kind, count, self._tensors[name].numel()))
        return [entry for entry in written if entry.elements]

    def _recalibrate(self, batches: Iterable[Any]) -> None:
        regions = {region.name: region for region in self._change.norms}
        names = [name.removesuffix(".running_mean") for name in regions]
        fresh = fresh_statistics(self._model, names, batches, self._loss_fn, self._together)
        for norm in names:
            region = regions[f"{norm}.running_mean"]
            for kind in ("running_mean", "running_var"):
                name = f"{norm}.{kind}"
                if name in fresh:
                    place = place_of(self._tensors[name], Region(name, region.index))
                    values = place_of(fresh[name], Region(name, region.index)).read()
                    _check_finite(f"the fresh {name!r}", values)
                    place.write(values)


def _check_finite(what: str, values: Tensor) -> None:
    if not bool(values.isfinite().all()):
        raise InputError(
            f"{what} is NaN or infinite over the batches, expected numbers: mend the weights or "
            "the data, or leave out compensate and recalibrate"
        )
