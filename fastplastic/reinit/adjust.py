"""What a re-initialisation does with batches: loss, lost constants, statistics of norms."""

import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from fastplastic.errors import InputError
from fastplastic.model import loss_of, read_batches, undisturbed
from fastplastic.planning import some_of
from fastplastic.reinit.changes import Change
from fastplastic.reinit.known_means import KnownMeans
from fastplastic.reinit.regions import Region, Tensors, region_mask
from fastplastic.reinit.report import Written
from fastplastic.reinit.transaction import Undo, place_of
from fastplastic.wiring import is_conv1d


def mean_loss(
    model: nn.Module, batches: Iterable[Any], loss_fn: Callable[[Any, Any], Tensor]
) -> float:
    """Return the mean loss over batches, each of the same weight; the model is as before.

    Raises:
        InputError: There are no batches, they can be read once only, or have another form.
    """
    if iter(batches) is batches:
        raise InputError(
            f"batches is a {type(batches).__name__} that can be read once, expected a list or a "
            "DataLoader: the loss is measured before and after"
        )
    device = next(model.parameters()).device
    losses = []
    # Random numbers are put back each time, so that dropout draws the same before and after.
    with undisturbed(model), torch.no_grad():
        for batch in read_batches(batches, device):
            losses.append(loss_of(model, batch, loss_fn).item())
    if not losses:
        raise InputError("there are no batches, expected at least one: check the data")
    # A sum of infinities is an error to fsum.
    return math.fsum(losses) / len(losses) if all(map(math.isfinite, losses)) else math.nan


class Contributions:
    """Watches what some columns of weights contribute to the mean output of their modules.

    That constant is lost when the columns become zero. It is measured by running each module a
    second time with all its other columns at zero, so padding, strides and whatever lies between a
    unit and its consumer are right. After the code of continual backpropagation (Dohare et al.,
    Nature 2024), which multiplies the columns by the mean activation instead.

    Args:
        model: The model that will run while this is attached.
        columns: Where the columns are.
    """

    def __init__(self, model: nn.Module, columns: Iterable[Region]) -> None:
        self._model = model
        self._columns: dict[str, list[Region]] = {}
        for region in columns:
            self._columns.setdefault(region.name, []).append(region)
        self._sums: dict[str, tuple[Tensor, int]] = {}
        self._norms: dict[str, str] = {}
        # The output of each consumer as long as anything holds it, by its id.
        self._latest: dict[int, tuple[weakref.ref[Tensor], str]] = {}
        self._busy = False

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Watch the model inside the block."""
        handles: list[RemovableHandle] = []
        try:
            for weight in self._columns:
                module = self._model.get_submodule(weight.rpartition(".")[0])
                if weight.endswith(".weight") and _channel_axis(module) is not None:
                    consumer = self._consumer(weight)
                    handles.append(module.register_forward_hook(consumer, with_kwargs=True))
            for name, module in self._model.named_modules():
                if isinstance(module, _BatchNorm) and module.running_mean is not None:
                    handles.append(module.register_forward_pre_hook(self._norm(name)))
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._latest.clear()

    def shifts(self, fresh: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """Return {bias or running mean: what to add}, and the weights that nothing can be added to.

        A convolution without bias has the constant taken from the running mean of its norm.

        Args:
            fresh: Layer name -> rows that are drawn afresh, which lose nothing.
        """
        found: dict[str, Tensor] = {}
        without = []
        for weight in self._columns:
            module = weight.rpartition(".")[0]
            bias = getattr(self._model.get_submodule(module), "bias", None)
            if weight in self._sums and isinstance(bias, Tensor):
                found[f"{module}.bias"] = self._mean(weight, fresh.get(module))
            elif weight in self._sums and weight in self._norms:
                mean = self._mean(weight, fresh.get(module))
                found[f"{self._norms[weight]}.running_mean"] = -mean
            else:
                without.append(weight)
        return found, without

    def _mean(self, weight: str, fresh: Tensor | None) -> Tensor:
        total, count = self._sums[weight]
        mean = total / count
        if fresh is not None:
            mean[fresh] = 0.0
        return mean

    def _consumer(self, weight: str) -> Callable[..., None]:
        def hook(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
        ) -> None:
            if self._busy:
                return
            self._busy = True
            try:
                self._add(weight, module, args, kwargs)
            finally:
                self._busy = False
            self._latest[id(output)] = weakref.ref(output), weight

        return hook

    def _add(
        self, weight: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        whole = self._model.get_parameter(weight).detach()
        masks = [region_mask(region, whole) for region in self._columns[weight]]
        kept = torch.where(torch.stack(masks).any(0) if len(masks) > 1 else masks[0], whole, 0)
        bias = getattr(module, "bias", None)
        other = {} if bias is None else {"bias": torch.zeros_like(bias)}
        part = functional_call(module, {"weight": kept, **other}, args, kwargs)
        axis = _channel_axis(module)
        assert axis is not None
        part = part.movedim(axis, 0).flatten(1)
        total, count = self._sums.get(weight, (torch.zeros((), dtype=torch.float64), 0))
        own = part.sum(1, dtype=torch.float64).cpu()
        self._sums[weight] = total + own, count + part.shape[1]

    def _norm(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            latest = self._latest.get(id(args[0])) if args else None
            if latest is not None and latest[0]() is args[0]:
                self._norms[latest[1]] = name

        return hook


def _channel_axis(module: nn.Module) -> int | None:
    """Return the dimension of the output that runs over units; None for what is not foreseen."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return 1
    return -1 if isinstance(module, nn.Linear) or is_conv1d(module) else None


def fresh_statistics(
    model: nn.Module,
    names: Iterable[str],
    batches: Iterable[Any],
    loss_fn: Callable[[Any, Any], Tensor],
) -> Mapping[str, Tensor]:
    """Return {buffer: running mean or variance} of some norms over batches; nothing is changed.

    All else runs in eval mode, so that dropout does not enter. The mean over batches, as
    `torch.optim.swa_utils.update_bn` takes it.
    """
    norms = {name: model.get_submodule(name) for name in names}
    momenta = {
        name: norm.momentum
        for name, norm in norms.items()
        if isinstance(norm, _BatchNorm) and norm.track_running_stats
    }
    found = {}
    with undisturbed(model), _with_momenta(norms, dict.fromkeys(momenta), momenta):
        model.eval()
        for name in momenta:
            norms[name].train()
            norms[name].reset_running_stats()  # type: ignore[operator]
        with torch.no_grad():
            for batch in read_batches(batches, next(model.parameters()).device):
                loss_of(model, batch, loss_fn)
        for name in momenta:
            for kind in ("running_mean", "running_var"):
                found[f"{name}.{kind}"] = getattr(norms[name], kind).clone()
    return found


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
    """

    def __init__(
        self,
        model: nn.Module,
        tensors: Tensors,
        change: Change,
        batches: Iterable[Any] | None,
        loss_fn: Callable[[Any, Any], Tensor],
        known: KnownMeans | None = None,
    ) -> None:
        self._model, self._tensors, self._change = model, tensors, change
        self._batches, self._loss_fn, self._known = batches, loss_fn, known
        self._contributions = Contributions(model, change.columns)
        self.shifts: dict[str, Tensor] = {}
        self.loss_before: float | None = None
        self.loss_after: float | None = None
        self.notes: list[str] = []

    def measure(self, compensate: bool) -> None:
        """Measure the loss before, and what would be lost."""
        if self._batches is None:
            return
        watched = compensate and self._known is None
        with self._contributions.attached() if watched else nullcontext():
            self.loss_before = mean_loss(self._model, self._batches, self._loss_fn)

    def apply(self, undo: Undo, compensate: bool, recalibrate: bool) -> list[Written]:
        """Write what is wanted besides, measure the loss after; return what was not yet counted."""
        shifted = self._compensate(undo) if compensate else []
        if self._batches is None:
            return shifted
        if recalibrate:
            self._recalibrate(self._batches)
        self.loss_after = mean_loss(self._model, self._batches, self._loss_fn)
        return shifted

    def _compensate(self, undo: Undo) -> list[Written]:
        source = self._known or self._contributions
        self.shifts, without = source.shifts(self._change.rows)
        if without:
            self.notes.append(
                f"{len(without)} weights have no bias or BatchNorm to compensate with: "
                f"{some_of(without)}"
            )
        written = []
        for name, shift in self.shifts.items():
            _check_finite(f"what columns contributed to {name!r}", shift)
            tensor = self._tensors[name].detach()
            undo.keep(partial(tensor.copy_, tensor.clone()))
            tensor.copy_(tensor.double() + shift.to(tensor.device))
            kind = "parameter" if name in self._tensors.parameters else "buffer"
            count = int(shift.count_nonzero())
            written.append(Written(name, kind, count, tensor.numel()))
        return [entry for entry in written if entry.elements]

    def _recalibrate(self, batches: Iterable[Any]) -> None:
        regions = {region.name: region for region in self._change.norms}
        names = [name.removesuffix(".running_mean") for name in regions]
        fresh = fresh_statistics(self._model, names, batches, self._loss_fn)
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
