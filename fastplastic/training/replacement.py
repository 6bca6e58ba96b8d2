"""Ages and utilities of units, and which of them are replaced at a steady rate.

After continual backpropagation, Dohare et al., Nature 2024: the utility of a unit is a moving
average of its score, corrected for its age; of each layer the mature units with the smallest
utility are replaced, `rate` times their number with each step. What is less than a unit is carried
on to the next step.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastplastic.errors import InputError
from fastplastic.randomness import unit_noise
from fastplastic.training.methods import Method


@dataclass(eq=False)
class _Ages:
    """What is kept of the units of a layer.

    Attributes:
        age: int64, steps since the unit was drawn.
        seen: int64, how many scores its averages are made of.
        activations: int64, the same for its mean activation.
        utility: float64, moving average of the score, not yet corrected.
        mean_h: float64, moving average of the mean activation, not yet corrected.
        carry: The share of a unit that is still to be replaced.
    """

    age: Tensor
    seen: Tensor
    activations: Tensor
    utility: Tensor
    mean_h: Tensor
    carry: float = 0.0

    @classmethod
    def of(cls, n_units: int) -> "_Ages":
        """Return the ages of units that were all drawn just now."""
        age, seen, activations = (torch.zeros(n_units, dtype=torch.int64) for _ in range(3))
        utility, mean_h = (torch.zeros(n_units, dtype=torch.float64) for _ in range(2))
        return cls(age, seen, activations, utility, mean_h)

    def forget(self, units: Tensor) -> None:
        """Let units begin anew."""
        for values in (self.age, self.seen, self.activations, self.utility, self.mean_h):
            values[units] = 0


class Replacement:
    """Chooses units by their moving averages.

    Args:
        sizes: Layer name -> number of its units.
        method: With a rate.
        seed: Of the order of equal utilities.
    """

    def __init__(self, sizes: Mapping[str, int], method: Method, seed: int) -> None:
        assert method.rate is not None
        self._rate, self._decay, self._maturity = method.rate, method.decay, method.maturity
        self._layers = {name: _Ages.of(size) for name, size in sizes.items()}
        self._ties = {
            name: unit_noise(seed, "replacement ties", name, size) for name, size in sizes.items()
        }

    def grow(self, steps: int) -> None:
        """Let all units be so many steps older."""
        for layer in self._layers.values():
            layer.age += steps

    def update(self, scores: Mapping[str, Tensor], means: Mapping[str, Tensor]) -> None:
        """Take the scores and the mean activations of one step into the averages.

        Args:
            scores: Layer name -> float64 [units]; NaN where unknown.
            means: Layer name -> mean h, float64 [units]; NaN where unknown.
        """
        for name, layer in self._layers.items():
            self._average(layer.utility, layer.seen, scores[name])
            self._average(layer.mean_h, layer.activations, means[name])

    def choose(
        self, eligible: Mapping[str, Tensor], steps: int
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the units to replace now and their utilities, {layer name: tensor}.

        Args:
            eligible: Layer name -> bool [units], which may be replaced.
            steps: For how many steps.
        """
        units, utilities = {}, {}
        for name, layer in self._layers.items():
            mature = eligible[name] & (layer.age > self._maturity) & (layer.seen > 0)
            layer.carry += self._rate * steps * int(mature.sum())
            count = int(layer.carry)
            layer.carry -= count
            if not count:
                continue
            utility = self._corrected(layer.utility, layer.seen)
            candidates = mature.nonzero().flatten()
            ties = self._ties[name][candidates].argsort()
            order = utility[candidates[ties]].argsort(stable=True)
            chosen = candidates[ties][order[:count]].sort().values
            units[name], utilities[name] = chosen, utility[chosen]
        return units, utilities

    def means(self) -> dict[str, Tensor]:
        """Return layer name -> mean activation of each unit, float64; 0 where none was seen."""
        return {
            name: self._corrected(layer.mean_h, layer.activations).nan_to_num(0.0)
            for name, layer in self._layers.items()
        }

    def forget(self, units: Mapping[str, Tensor]) -> None:
        """Let units begin anew, as they have been drawn afresh."""
        for name, own in units.items():
            self._layers[name].forget(own)

    def state_dict(self) -> dict[str, Any]:
        """Return everything that later choices depend on."""
        return {
            name: {key: _copy(value) for key, value in vars(layer).items()}
            for name, layer in self._layers.items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave; InputError when it is of other layers."""
        for name in {*state, *self._layers}:
            known = self._layers.get(name)
            if known is None or name not in state or len(state[name]["age"]) != len(known.age):
                raise InputError(
                    f"the state does not fit at {name!r}, expected that of a Recycler of this "
                    "model with these options"
                )
        for name, own in state.items():
            self._layers[name] = _Ages(**{key: _copy(value) for key, value in own.items()})

    def _average(self, average: Tensor, count: Tensor, values: Tensor) -> None:
        known = values.isfinite()
        moved = self._decay * average + (1 - self._decay) * values
        average.copy_(torch.where(known, moved, average))
        count += known

    def _corrected(self, average: Tensor, count: Tensor) -> Tensor:
        """Return an average as if it had not begun at 0; NaN where nothing was seen."""
        return average / (1 - self._decay ** count.double())


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
