"""What is done to a model before it is trained: probe, profile, plan, treatment of the arm."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn

from fastplastic.criteria import CRITERIA
from fastplastic.errors import FastPlasticError, InputError
from fastplastic.measure import Profile, profile
from fastplastic.model import device_of, output_layers, read_batches
from fastplastic.planning import Plan, control, plan
from fastplastic.reinit import ReinitReport, reinit_, removal, shrink_perturb_
from fastplastic.trials.arms import Arm, Dose
from fastplastic.trials.loop import precision, seed_all
from fastplastic.trials.probe import fit_head
from fastplastic.trials.settings import TrainSettings
from fastplastic.trials.task import Task


@dataclass(frozen=True, eq=False)
class Prepared:
    """A model as an arm begins to train it.

    Attributes:
        model: The model, on its device.
        hold: To be called after each update, or None.
        report: What was re-initialised, or None.
        plan: What was chosen, or None.
        seconds: What each part of the preparation took.
    """

    model: nn.Module
    hold: Callable[[], None] | None = None
    report: ReinitReport | None = None
    plan: Plan | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)


class Start:
    """Where all arms of one seed start from: the model with its head, and its profiles.

    Args:
        task: The task.
        settings: The budget.
        seed: The seed.
    """

    def __init__(self, task: Task, settings: TrainSettings, seed: int) -> None:
        self._task, self._settings, self.seed = task, settings, seed
        self.data = task.data(seed)
        # Training images may come in random order, here too.
        seed_all(self.data.plain, seed, epoch=-1)
        self.seconds: dict[str, float] = {}
        self.model = task.model(seed)
        self._profiles: dict[str, Profile] = {}
        self._batches: list[Any] = []
        if settings.norms_first and norms_of(self.model):
            with self._timed("norms"), self._precision():
                recalibrate_norms(self.model, self.data.plain)
        if settings.probe_first:
            with self._timed("probe"), self._precision():
                fit_head(self.model, self.data.plain)

    @property
    def begun(self) -> dict[str, float]:
        """Return what all arms begin with, in seconds: norms and probe."""
        return {part: self.seconds[part] for part in ("norms", "probe") if part in self.seconds}

    def profile(self, needs: str = "gradients") -> Profile:
        """Return the profile of the model on some of the plain training images, in eval mode.

        Args:
            needs: "activations", which takes a forward pass only, "gradients", or "weights" for
                plans of single weights.
        """
        if needs not in self._profiles:
            self.model.eval()
            with self._timed(f"profile of {needs}"), self._precision():
                self._profiles[needs] = profile(
                    self.model, self._profiled(), gradients=needs == "weights",
                    backward=needs != "activations",
                )  # fmt: skip
        return self._profiles[needs]

    def profile_again(self) -> Profile:
        """Return the profile of the model as it is now, on the same images."""
        self.model.eval()
        with self._precision():
            return profile(self.model, self._profiled())

    def plan(self, dose: Dose) -> Plan:
        """Return the plan for a dose; InputError when the model cannot give it."""
        return plan(
            self.profile(_needs(dose)), criterion=dose.criterion,
            ratio=dose.ratio, threshold=dose.threshold,
            granularity=dose.granularity, scope=dose.scope, include=dose.include,
            exclude=dose.exclude, max_layer_fraction=dose.max_layer_fraction, seed=self.seed,
        )  # fmt: skip

    def check(self, arm: Arm) -> None:
        """Raise InputError, with the arm's name, where the model cannot give its dose."""
        if arm.kind == "fresh" and self._task.fresh is None:
            raise InputError(f"arm {arm.name}: no way to make random weights: pass fresh=...")
        if arm.kind == "recalibrate" and (self._settings.norms_first or not norms_of(self.model)):
            why = "all arms begin so" if norms_of(self.model) else "the model has no BatchNorm"
            raise InputError(f"arm {arm.name}: {why}: leave it out, or norms_first")
        if arm.kind == "remove" and arm.dose is not None and arm.dose.refit:
            raise InputError(
                f"arm {arm.name}: a head that is fitted again would read what is removed: leave "
                "refit out, or remove"
            )
        if arm.dose is not None and arm.kind == "reinit":
            with _named(arm):
                self.plan(arm.dose)

    def prepare(self, arm: Arm) -> Prepared:
        """Return a model of its own for an arm, treated; errors name the arm."""
        with _named(arm):
            return self._prepare(arm)

    def treat(self, arm: Arm, chosen: Plan | None) -> Prepared:
        """Treat the model itself as an arm that re-initialises says, or as a plan does."""
        assert arm.dose is not None
        return self._dosed(self.model, arm, arm.dose, chosen)

    def _prepare(self, arm: Arm) -> Prepared:
        if arm.kind == "fresh":
            assert self._task.fresh is not None
            return Prepared(self._task.fresh(self.seed))
        model = copy.deepcopy(self.model)
        if arm.dose is not None:
            return self._dosed(model, arm, arm.dose)
        begun = perf_counter()
        if arm.kind == "recalibrate":
            recalibrate_norms(model, self.data.plain)
        elif arm.kind == "shrink-perturb":
            self._shrink(model, arm.shrink)
        seconds = {"reinit": perf_counter() - begun} if arm.kind != "baseline" else {}
        return Prepared(model, seconds=seconds)

    def _dosed(
        self, model: nn.Module, arm: Arm, dose: Dose, chosen: Plan | None = None
    ) -> Prepared:
        if chosen is None or arm.kind == "random":
            self.profile(_needs(dose))
        begun = perf_counter()
        if chosen is None:
            chosen = self.plan(dose)
        if arm.kind == "random":
            chosen = control(chosen, self.profile(_needs(dose)), seed=self.seed)
        planned = perf_counter()
        hold, outgoing, compensate = None, dose.outgoing, dose.compensate
        if arm.kind == "remove":
            hold = removal(model, chosen)
            if dose.granularity == "unit" and outgoing not in ("zero", "small"):
                outgoing = "zero"
        if dose.shrink is not None:
            self._shrink(model, dose.shrink)
        with self._precision():
            report = reinit_(
                model, chosen, init=dose.init, outgoing=outgoing, compensate=compensate,
                recalibrate=dose.recalibrate, seed=self.seed,
                batches=self._profiled() if compensate or dose.recalibrate else None,
            )  # fmt: skip
            if dose.refit:
                self._measure_norms(model)
                fit_head(model, self.data.plain)
        if hold is not None:
            hold()
        seconds = {
            "profile": self.seconds.get(f"profile of {_needs(dose)}", 0.0),
            "plan": planned - begun,
            "reinit": perf_counter() - planned,
        }
        return Prepared(model, hold, report, chosen, seconds)

    def _shrink(self, model: nn.Module, factor: float | None) -> None:
        """Shrink and perturb all but the head."""
        batch = next(read_batches(self._profiled(), device_of(model)))
        heads = [id(head) for head in output_layers(model, batch)]
        names = [name for name, module in model.named_modules() if id(module) in heads]
        if factor is None:
            shrink_perturb_(model, exclude=names, seed=self.seed)
        else:
            shrink_perturb_(model, exclude=names, seed=self.seed, shrink=factor)
        with self._precision():
            self._measure_norms(model)

    def _measure_norms(self, model: nn.Module) -> None:
        """Measure all norms anew where all arms begin so: what is changed needs it again."""
        if self._settings.norms_first and norms_of(model):
            recalibrate_norms(model, self.data.plain)

    def _profiled(self) -> list[Any]:
        """Return the batches that are profiled, whole ones, kept in memory."""
        if not self._batches:
            images = 0
            # Where they come in random order, the same ones whatever has been drawn since.
            seed_all(self.data.plain, self.seed, epoch=-1)
            for batch in self.data.plain:
                self._batches.append(batch)
                images += len(batch["labels"] if isinstance(batch, Mapping) else batch[1])
                if images >= self._settings.profile_images:
                    break
        return self._batches

    def _precision(self) -> Any:
        return precision(self._settings, device_of(self.model))

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        begun = perf_counter()
        yield
        self.seconds[name] = perf_counter() - begun


def _needs(dose: Dose) -> str:
    """Return what has to be measured for a dose."""
    if dose.granularity == "weight":
        return "weights"
    # Units at random are chosen from those that have statistics, of whatever.
    return "gradients" if CRITERIA[dose.criterion].needs == "gradients" else "activations"


@contextmanager
def _named(arm: Arm) -> Iterator[None]:
    """Let errors say which arm they are about."""
    try:
        yield
    except FastPlasticError as error:
        raise type(error)(f"arm {arm.name}: {error}") from error


def norms_of(model: nn.Module) -> list[nn.Module]:
    """Return the BatchNorm layers of a model that keep statistics."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]


def recalibrate_norms(model: nn.Module, batches: Iterable[Any]) -> None:
    """Measure the running statistics of all BatchNorm layers anew over the batches, in place."""
    modes = {module: module.training for module in model.modules()}
    with torch.random.fork_rng(devices=[]):
        inputs = (batch.args[0] for batch in read_batches(batches, device_of(model)))
        update_bn(inputs, model)
    for module, mode in modes.items():
        module.training = mode
