"""What a Recycler sees of a model: activations of the steps that count, weights and gradients."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from fastplastic.errors import InputError, NothingToChooseError
from fastplastic.measure import (
    EagerStance,
    LayerProfile,
    Observer,
    PositionSample,
    Profile,
    assemble,
    profile,
)
from fastplastic.model import local_of
from fastplastic.processes import Processes
from fastplastic.training.methods import Method
from fastplastic.training.processes import gradient_norm
from fastplastic.wiring import UnitGraph


class StepWatch:
    """Measures single steps of a training, and nothing in between.

    Hooks are on the model during the steps that are measured only, and code that was compiled runs
    eagerly in these.

    Args:
        model: The model.
        graph: Its wiring.
        method: Its criterion says what is measured.
        seed: Of a criterion that draws, and of the positions that are read.
        together: The processes that share the model; None where this one measures by itself.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: UnitGraph,
        method: Method,
        seed: int,
        together: Processes | None = None,
    ) -> None:
        self._model, self._graph, self._method, self._seed = model, graph, method, seed
        self._positions = PositionSample(method.sample_positions, seed)
        self._observer = Observer(
            model, graph, gradients=method.criterion == "activation_gradient", training=True,
            positions=self._positions, together=together,
        )  # fmt: skip
        self._on = False
        self._eager = EagerStance()
        self._first: Profile | None = None

    def begin(self, step: int) -> None:
        """Measure from now on, which is this step; what was seen before is forgotten."""
        self._observer.reset()
        self._positions.restart(step)
        if not self._on:
            self._on = True
            self._observer.attach()
            self._eager.begin()

    def end(self) -> None:
        """Take all hooks off the model."""
        if self._on:
            self._on = False
            self._observer.detach()
            self._eager.end()

    @property
    def on(self) -> bool:
        """Whether it is measuring."""
        return self._on

    @property
    def calls(self) -> int:
        """How many calls of the model were seen in this step; 0 where it is not measured."""
        return self._observer.calls.steps if self._on else 0

    def take(self) -> Profile:
        """Return the profile of what was seen, with weights and gradients as they are now.

        Raises:
            InputError: Nothing was seen, or there are no gradients for what needs them.
        """
        gradients = self._gradients() if self._method.needs_gradients else {}
        observation = self._observer.observation(gradients)
        if not observation.steps:
            raise InputError(
                "the model was not called with gradients since the last step, so nothing was "
                "measured: pass the model that the loop calls, or batches"
            )
        weights = self._method.granularity == "weight"
        return assemble(
            self._model, self._graph, observation, seed=self._seed,
            gradients=gradients if weights else None, backward=self._method.needs_gradients,
            notes=self._positions.notes(),
        )  # fmt: skip

    def take_layers(self) -> Profile:
        """Return the same for scores of units alone, which takes less time."""
        if self._first is None:
            self._first = self.take()
            return self._first
        gradients = self._gradients() if self._method.needs_gradients else {}
        stats = self._observer.observation(gradients).stats
        layers = (
            LayerProfile(layer.wiring, stats[layer.name], None) for layer in self._first.layers
        )
        return replace(self._first, layers=tuple(layers))

    def of(self, batches: Iterable[Any], loss_fn: Callable[[Any, Any], Tensor]) -> Profile:
        """Return the profile of batches, which are run for it; the model is as before."""
        return profile(
            self._model, batches, loss_fn=loss_fn, gradients=self._method.granularity == "weight",
            backward=self._method.needs_gradients or self._method.granularity == "weight",
            example_inputs=self._graph,
        )  # fmt: skip

    def _gradients(self) -> Mapping[str, Tensor]:
        found = {
            name: local_of(parameter.grad.detach().to_dense())
            for name, parameter in self._model.named_parameters(remove_duplicate=False)
            if parameter.grad is not None
        }
        if not found:
            raise InputError(
                f"criterion {self._method.criterion!r} reads gradients, and there are none: call "
                "step() right behind optimizer.step(), before zero_grad(), or use install()"
            )
        return found


def check_gradients(model: nn.Module, method: Method, together: Processes | None) -> None:
    """Raise NothingToChooseError where gradients are not finite, or all 0 for what reads them."""
    norm = gradient_norm(model, together)
    if norm is None:
        return
    if not math.isfinite(norm):
        raise NothingToChooseError("gradients are NaN or infinite")
    if norm == 0 and method.needs_gradients:
        raise NothingToChooseError(
            f"criterion {method.criterion!r} reads gradients, and all are 0: call step() right "
            "behind optimizer.step(), before zero_grad(), or use install()"
        )
