"""The plasticity profile of a model: what it holds, and the function that makes one."""

import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fastplastic import __version__
from fastplastic._batches import Batch, loss_of, read_batches
from fastplastic._built import check_built
from fastplastic._coverage import Coverage, coverage_of, notes_of
from fastplastic._layer_profile import LayerProfile, Totals
from fastplastic._mean_gradient import MeanGradient
from fastplastic._observer import Observation, Observer
from fastplastic._restore import undisturbed
from fastplastic._weights import Weights, weights_of
from fastplastic.checkpoint import fingerprint
from fastplastic.criteria import CRITERIA, Layer
from fastplastic.errors import InputError, no_such
from fastplastic.graph import build_graph
from fastplastic.kernels import backend
from fastplastic.stats import LayerStats
from fastplastic.wiring import UnitGraph

if TYPE_CHECKING:
    from fastplastic._samples import RowSamples

SCHEMA_VERSION = 1

__all__ = ["SCHEMA_VERSION", "LayerProfile", "Profile", "Totals", "assemble", "profile"]


@dataclass(frozen=True, eq=False, repr=False)
class Profile:
    """The plasticity profile of a model on some data.

    Attributes:
        layers: One entry per weight layer, in execution order.
        coverage: Which weight layers were measured, and why others were not.
        mode: "train" or "eval", the mode the model was in, or "mixed".
        samples: Number of samples.
        batches: Number of batches (forward passes).
        backend: What computed the statistics.
        device: Device of the model.
        dtype: Type of its first floating-point parameter.
        seed: Seed of torch's random numbers when profiling began (dropout draws from them).
        fingerprint: Fingerprint of the model.
        gradients: {parameter name: mean gradient over the batches}, if they were asked for.
        weights: {parameter name: the parameter itself, not a copy}, if gradients were asked for.
        notes: What a reader of the numbers has to know.
    """

    layers: tuple[LayerProfile, ...]
    coverage: Coverage
    mode: str
    samples: int
    batches: int
    backend: str
    device: str
    dtype: str
    seed: int
    fingerprint: str
    gradients: Mapping[str, Tensor] | None = None
    weights: Weights | None = None
    notes: tuple[str, ...] = ()
    _by_name: dict[str, LayerProfile] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        # A tied weight answers to the names of all modules that hold it.
        names = {other: layer for layer in self.layers for other in layer.wiring.tied}
        names |= {layer.name: layer for layer in self.layers}
        object.__setattr__(self, "_by_name", names)

    def __repr__(self) -> str:
        totals = self.totals
        return (
            f"Profile({totals.layers} layers, {totals.units} units: {totals.hidden_units} hidden, "
            f"{totals.dead} dead, {totals.frozen} frozen, {totals.dormant} dormant; "
            f"{self.samples} samples, {self.mode})"
        )

    def __iter__(self) -> Iterator[LayerProfile]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, name: str) -> LayerProfile:
        """Return the layer with this name; InputError when there is none."""
        if name not in self._by_name:
            raise InputError(no_such("layer", name, self._by_name))
        return self._by_name[name]

    @property
    def totals(self) -> Totals:
        """Counts over all layers."""
        rows = [layer.to_dict() for layer in self.layers]
        sums = {
            key: sum(row[key] or 0 for row in rows)
            for key in ("units", "hidden", "dead", "frozen", "dormant")
        }
        return Totals(layers=len(rows), hidden_units=sums.pop("hidden"), **sums)

    def score(self, criterion: str, *, seed: int = 0) -> dict[str, Tensor]:
        """Return {layer name: float64 [n_units]}, NaN where the score is unknown.

        Args:
            criterion: Name of a criterion in `criteria.CRITERIA`; it says which scores are bad.
            seed: Read by the criterion `random` only.

        Raises:
            InputError: There is no such criterion.
        """
        if criterion not in CRITERIA:
            raise InputError(no_such("criterion", criterion, CRITERIA))
        rule = CRITERIA[criterion]
        return {
            layer.name: rule.score(layer.stats, Layer(layer.name, layer.wiring.activations, seed))
            for layer in self.layers
        }

    def to_dict(
        self, *, model: str | None = None, weights: str | None = None, data: str | None = None
    ) -> dict[str, Any]:
        """Return the profile as plain values (schema version 1); unknown numbers are None.

        Args:
            model: Name of the model, if it has one.
            weights: Where its weights come from.
            data: Name of the data.
        """
        skipped = [{"name": name, "reason": reason} for name, reason in self.coverage.skipped]
        return {
            "schema_version": SCHEMA_VERSION,
            "fastplastic_version": __version__,
            "model": model,
            "weights": weights,
            "data": data,
            "device": self.device,
            "dtype": self.dtype,
            "mode": self.mode,
            "samples": self.samples,
            "seed": self.seed,
            "coverage": {
                "found": self.coverage.found,
                "measured": self.coverage.measured,
                "skipped": skipped,
            },
            "totals": asdict(self.totals),
            "layers": [layer.to_dict() for layer in self.layers],
        }

    def save(self, path: str | os.PathLike[str], *, force: bool = False) -> None:
        """Write the profile as safetensors with JSON metadata.

        Gradients and weights are in it where the profile has them.

        Raises:
            FileError: The path cannot be written, or exists and `force` is not set.
            InputError: The weights have changed since they were profiled.
        """
        from fastplastic.profile_file import save_profile

        save_profile(self, path, force=force)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Profile":
        """Read a profile from a file.

        Raises:
            FileError: The file is missing, damaged or not a profile.
        """
        from fastplastic.profile_file import load_profile

        return load_profile(path)


def profile(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    loss_fn: Callable[[Any, Any], Tensor] = cross_entropy,
    gradients: bool = False,
    ranks: bool = False,
    example_inputs: Any = None,
    progress: Callable[[int], None] | None = None,
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
        example_inputs: What to trace the model with: a tensor, a tuple of positional or a mapping
            of keyword arguments. By default up to two samples of the first batch.
        progress: Called with the number of batches done after each.

    Raises:
        InputError: A parameter or buffer has no values yet (lazy, or on the meta device), there are
            no batches, a batch has another form, there is nothing to compute a loss from, or no
            layer could be measured.
    """
    check_built(model)
    device = _device(model)
    seed = torch.initial_seed()
    mean = MeanGradient(model)
    with undisturbed(model), torch.inference_mode(False), torch.enable_grad():
        stream = read_batches(batches, device)
        first = next(stream, None)
        if first is None:
            raise InputError("there are no batches, expected at least one: check the data")
        graph = build_graph(model, first.example() if example_inputs is None else example_inputs)
        samples = _row_samples() if ranks else None
        observer = Observer(model, graph, sample=None if samples is None else samples.read)
        try:
            observer.attach()
            notes = _run(model, itertools.chain([first], stream), loss_fn, mean, progress)
        finally:
            observer.detach()
        observation = observer.observation()
        means = mean.take()
        observer.read_weights(observation.table, means)
    kept = means if gradients else None
    found = assemble(model, graph, observation, seed=seed, gradients=kept, notes=notes)
    return found if samples is None else _with_ranks(found, samples)


def assemble(
    model: nn.Module,
    graph: UnitGraph,
    observation: Observation,
    *,
    seed: int,
    gradients: Mapping[str, Tensor] | None = None,
    notes: tuple[str, ...] = (),
) -> Profile:
    """Return the profile of what an observer has seen; InputError when it saw nothing."""
    layers = []
    start = 0
    graph = _without_unforeseen(graph, observation)
    for wiring in graph.layers:
        stats = LayerStats(observation.table[:, start : start + wiring.n_units])
        layers.append(LayerProfile(wiring, stats))
        start += wiring.n_units
    device = _device(model)
    return Profile(
        layers=tuple(layers),
        coverage=coverage_of(graph, layers, observation),
        mode=next(iter(observation.modes)) if len(observation.modes) == 1 else "mixed",
        samples=observation.samples,
        batches=observation.steps,
        backend=backend(device),
        device=str(device),
        dtype=_dtype(model),
        seed=seed,
        fingerprint=fingerprint(model),
        gradients=gradients,
        weights=None if gradients is None else weights_of(model),
        notes=(*notes_of(graph, layers, observation), *notes),
    )


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


def _row_samples() -> "RowSamples":
    # Only here: who asks for no ranks does not load what makes them.
    from fastplastic._samples import RowSamples

    return RowSamples()


def _with_ranks(found: Profile, samples: "RowSamples") -> Profile:
    layers = (replace(layer, ranks=samples.ranks(layer.name)) for layer in found.layers)
    return replace(found, layers=tuple(layers))


def _run(
    model: nn.Module,
    batches: Iterable[Batch],
    loss_fn: Callable[[Any, Any], Tensor],
    mean: MeanGradient,
    progress: Callable[[int], None] | None,
) -> tuple[str, ...]:
    """Run all batches; return what is to be said about their losses."""
    done = dropped = 0
    attached = True
    for batch in batches:
        loss = loss_of(model, batch, loss_fn)
        attached = loss.requires_grad
        if not math.isfinite(loss.item()):
            dropped += 1
        elif attached:
            torch.autograd.backward(loss)
            mean.add()
        done += 1
        if progress is not None:
            progress(done)
    notes = []
    if dropped:
        notes.append(f"the loss of {dropped} of {done} batches is not finite: no gradients of them")
    if not attached:
        notes.append("the loss depends on no parameter with requires_grad: there are no gradients")
    return tuple(notes)


def _device(model: nn.Module) -> torch.device:
    for parameter in model.parameters():
        return parameter.device
    raise InputError("the model has no parameters, expected weight layers: nothing to profile")


def _dtype(model: nn.Module) -> str:
    types = (p.dtype for p in model.parameters() if p.is_floating_point())
    return str(next(types, torch.float32)).removeprefix("torch.")
