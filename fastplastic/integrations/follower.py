"""Profiles a model and re-initialises parts of it behind the steps of its optimizer."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from fastplastic.errors import InputError
from fastplastic.graph import build_graph
from fastplastic.integrations.loggers import metrics, reset_metrics
from fastplastic.measure import Profile
from fastplastic.model import device_of, read_batch
from fastplastic.reinit import optimizers_of
from fastplastic.training import Method, Recycler, StepWatch, method_of

_VERSION = 1
# What is read for a profile: activations, and the gradients of weights.
_PROFILED = Method("profile", "gradient")


@dataclass(frozen=True)
class FollowSettings:
    """What is measured and re-initialised, and when.

    Attributes:
        method: As for `Recycler`; None where nothing is re-initialised.
        freq: Profile each so many steps; None for never.
        start_step, end_step: Nothing is done before and after these steps; None for no end.
        layers: Also log the share of each layer.
        sync: As for `Recycler`.
        seed: As for `Recycler`.
    """

    method: Method | None
    freq: int | None
    start_step: int = 0
    end_step: int | None = None
    layers: bool = False
    sync: tuple[nn.Module, ...] = ()
    seed: int = 0

    @classmethod
    def of(
        cls, method: str | Method | None, freq: int | None, options: Mapping[str, Any]
    ) -> "FollowSettings":
        """Return settings of the arguments of a callback.

        Args:
            method: Or its name.
            freq: See above.
            options: The others above, and fields of `Method` that differ from those of the method.

        Raises:
            InputError: An option is unknown or unusable, or there is nothing to do.
        """
        rest = dict(options)
        own = {key: rest.pop(key) for key in ("layers", "seed", "sync") if key in rest}
        own["sync"] = tuple(own.get("sync", ()))
        span: dict[str, Any] = {key: rest[key] for key in ("start_step", "end_step") if key in rest}
        if method is None:
            if unknown := sorted(rest.keys() - span.keys()):
                raise InputError(
                    f"{', '.join(unknown)} given without a method, expected one such as 'redo': "
                    "name the method, or leave these out"
                )
            if freq is None:
                raise InputError("neither a method nor a freq is given: there is nothing to do")
            # Only to have the numbers checked.
            method_of("redo", span)
        if freq is not None and (isinstance(freq, bool) or not isinstance(freq, int) or freq < 1):
            raise InputError(
                f"freq is {freq!r}, expected an integer of at least 1, or None for no profiles"
            )
        return cls(None if method is None else method_of(method, rest), freq, **span, **own)

    def profiles(self, step: int) -> bool:
        """Tell whether a step is profiled."""
        if self.freq is None or step % self.freq or step <= self.start_step:
            return False
        return self.end_step is None or step <= self.end_step


class Follower:
    """Follows an optimizer: profiles, re-initialises, and gathers what is to be logged.

    Args:
        model: The module that the loop calls; for a wrapped one, the module inside.
        example_inputs: What to trace the model with.
        optimizer: The optimizer of the model, or what wraps it.
        settings: What to do, and when.
        logs: Whether this process logs: no other has to profile.

    Raises:
        InputError, ProcessError: As for `Recycler`.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        optimizer: Optimizer,
        settings: FollowSettings,
        *,
        logs: bool = True,
    ) -> None:
        model = getattr(model, "_orig_mod", model)
        graph = build_graph(model, example_inputs)
        self.steps = 0
        self.profile: Profile | None = None
        self.recycler: Recycler | None = None
        self._settings = settings
        self._values: dict[str, float] = {}
        self._logged = 0
        self._watch = StepWatch(model, graph, _PROFILED, settings.seed) if logs else None
        if settings.method is not None:
            self.recycler = Recycler(
                model, graph, optimizer, settings.method, sync=settings.sync, seed=settings.seed
            ).install()
        # Behind the hook of the recycler, which changes neither activations nor gradients.
        self._handle = list(optimizers_of(optimizer))[-1].register_step_post_hook(self._stepped)
        self._look_ahead()

    def detach(self) -> None:
        """Take all hooks off the model and the optimizer."""
        self._handle.remove()
        if self._watch is not None:
            self._watch.end()
        if self.recycler is not None:
            self.recycler.detach()

    def take(self, *, rest: bool = False) -> dict[str, float]:
        """Return what is to be logged now, empty for nothing: see `loggers`.

        Args:
            rest: Also return what would wait for the next profile.
        """
        values, self._values = self._values, {}
        if self.recycler is not None and (values or rest or self._settings.freq is None):
            resets = self.recycler.log[self._logged :]
            self._logged = len(self.recycler.log)
            if resets or values:
                values |= reset_metrics(resets)
        return values

    def state_dict(self) -> dict[str, Any]:
        """Return what later steps depend on, as values that torch.save takes."""
        own = None if self.recycler is None else self.recycler.state_dict()
        return {
            "version": _VERSION, "steps": self.steps, "logged": self._logged, "recycler": own,
        }  # fmt: skip

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave.

        Raises:
            InputError: The state is of another version, or does not fit the recycler.
        """
        if state.get("version") != _VERSION:
            raise InputError(
                f"the state has version {state.get('version')!r}, expected {_VERSION}: it was "
                "saved by another version of fastplastic, or is no state of such a callback"
            )
        if self.recycler is not None and state["recycler"] is not None:
            self.recycler.load_state_dict(state["recycler"])
            self._logged = state["logged"]
            self.steps = state["steps"]
            self._look_ahead()
        else:
            self.start_at(state["steps"])

    def start_at(self, step: int) -> None:
        """Count from a step on, in a training that had none of this before."""
        self.steps = step
        if self.recycler is not None:
            counts = {"steps": step, "grown": step}
            self.recycler.load_state_dict(self.recycler.state_dict() | counts)
        self._look_ahead()

    def _stepped(self, *_: Any) -> None:
        self.steps += 1
        try:
            if self._watch is not None and self._watch.on:
                self.profile = self._watch.take()
                self._values |= metrics(self.profile, layers=self._settings.layers)
        finally:
            self._look_ahead()

    def _look_ahead(self) -> None:
        """Measure the next step, if it is to be profiled."""
        if self._watch is not None:
            if self._settings.profiles(self.steps + 1):
                self._watch.begin(self.steps + 1)
            else:
                self._watch.end()


def example_of(batch: Any, model: nn.Module) -> Any:
    """Return what to trace a model with, of a batch of its training.

    Raises:
        InputError: The batch is of another form than (inputs, targets) or a mapping.
    """
    try:
        return read_batch(batch, 0, device_of(model)).example()
    except InputError as error:
        raise InputError(
            f"{error}; or give example_inputs, what the model is called with"
        ) from None
