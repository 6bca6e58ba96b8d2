"""What an optimizer remembers of each weight, and what it should remember of a fresh one."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastplastic.errors import InputError
from fastplastic.model import is_spread, local_of, part_of

# State that begins as the weights themselves (ASGD, MADGRAD, Lookahead, schedule-free optimizers):
# zeros would pull the weights to zero, so it takes the fresh ones.
_COPIES_OF_WEIGHTS = ("ax", "x0", "z", "lookahead_slow_buff", "slow_buffer", "slow_param")
# State that does not begin at zero: its name, and the option of the group that it begins at.
_BEGINS_AT = {"sum": "initial_accumulator_value", "step_size": "lr"}
# The same for single optimizers: class and state, and the value.
_BEGINS_AT_IN = {("RMSpropTF", "square_avg"): 1.0}


@dataclass(frozen=True, eq=False)
class StateTensor:
    """One tensor of optimizer state that has an element for each weight.

    Attributes:
        name: Name of the parameter.
        key: Name of the state.
        tensor: The state, in the shape of the parameter.
        start: Its value for a fresh weight; None for the weight itself.
    """

    name: str
    key: str
    tensor: Tensor
    start: float | None


class OptimizerState:
    """The state of an optimizer for the parameters of a model.

    Args:
        optimizer: Any torch optimizer.
        model: The model that it trains.

    Raises:
        InputError: It is no optimizer, or trains no parameter of the model.
    """

    def __init__(self, optimizer: Optimizer, model: nn.Module) -> None:
        if not isinstance(optimizer, Optimizer):
            raise InputError(
                f"optimizer is a {type(optimizer).__name__}, expected a torch.optim.Optimizer"
            )
        layers = list(optimizers_of(optimizer))
        self._states = [layer.state for layer in layers]
        self._classes = [type(layer).__name__ for layer in layers]
        self._groups = {
            id(weight): group for group in optimizer.param_groups for weight in group["params"]
        }
        self._parameters = {
            name: weight
            for name, weight in model.named_parameters(remove_duplicate=False)
            if id(weight) in self._groups
        }
        if not self._parameters:
            raise InputError(
                "the optimizer trains none of the parameters of the model, expected the one that "
                "was built from model.parameters()"
            )

    @property
    def trained(self) -> frozenset[str]:
        """Names of the parameters that it trains, all names of those that are shared."""
        return frozenset(self._parameters)

    def tensors(self, names: Iterable[str]) -> Iterator[StateTensor]:
        """Yield the state of some parameters that has an element for each weight."""
        for name in names:
            weight = self._parameters.get(name)
            for key, value in self._of(weight).items():
                if isinstance(value, Tensor) and weight is not None and _is_like(value, weight):
                    _check_placed(name, key, value, weight)
                    yield StateTensor(name, key, value, self._start(weight, key))

    def steps(self, names: Iterable[str]) -> Iterator[tuple[dict[str, Any], str]]:
        """Yield the state of some parameters that counts steps, and the key of the counter."""
        for name in names:
            weight = self._parameters.get(name)
            for state in self._states:
                if weight is not None and "step" in state.get(weight, {}):
                    yield state[weight], "step"

    def notes(self, names: Iterable[str]) -> tuple[str, ...]:
        """Return what is known of these parameters and cannot be reset by element."""
        other = set()
        for name in names:
            weight = self._parameters.get(name)
            for key, value in self._of(weight).items():
                many = isinstance(value, Tensor) and value.numel() > 1
                if many and weight is not None and not _is_like(value, weight):
                    _check_whole(name, key, value, weight)
                    other.add(key)
        if not other:
            return ()
        return (
            f"optimizer state {', '.join(sorted(other))} has no element for each weight and was "
            "left as it is",
        )

    def _of(self, weight: Tensor | None) -> dict[str, Any]:
        # Not by index: that would make an entry.
        found = ({} if weight is None else state.get(weight, {}) for state in self._states)
        return dict(item for state in found for item in state.items())

    def _start(self, weight: Tensor, key: str) -> float | None:
        if key in _COPIES_OF_WEIGHTS:
            return None
        for name in self._classes:
            if (name, key) in _BEGINS_AT_IN:
                return _BEGINS_AT_IN[name, key]
        option = _BEGINS_AT.get(key)
        value = self._groups[id(weight)].get(option, 0.0) if option else 0.0
        return float(value)


def optimizers_of(optimizer: Optimizer) -> Iterator[Optimizer]:
    """Yield an optimizer and those that it wraps (timm's Lookahead, Accelerate)."""
    yield optimizer
    for name in ("_base_optimizer", "base_optimizer", "optimizer"):
        inner = getattr(optimizer, name, None)
        if isinstance(inner, Optimizer) and inner is not optimizer:
            yield from optimizers_of(inner)
            return


def _is_like(value: Tensor, weight: Tensor) -> bool:
    return value.shape == weight.shape and value.is_floating_point()


def _check_whole(name: str, key: str, value: Tensor, weight: Tensor) -> None:
    """Refuse state of the part of a weight that is kept as if that were the weight."""
    if is_spread(weight) and not is_spread(value) and value.shape == local_of(weight).shape:
        _refuse_placing(name, key)


def _check_placed(name: str, key: str, value: Tensor, weight: Tensor) -> None:
    """Refuse state of which this process has other elements than of the weight."""
    if part_of(name, weight) != part_of(f"{name}: {key}", value):
        _refuse_placing(name, key)


def _refuse_placing(name: str, key: str) -> None:
    raise InputError(
        f"what the optimizer remembers of {name!r} ({key}) is not spread over processes as the "
        "weight is, expected the same part of both in each: leave out the optimizer, and begin "
        "with a fresh one"
    )


def step_of(state: Mapping[str, Any], key: str) -> Any:
    """Return a counter of steps, a copy where it is a tensor."""
    return state[key].clone() if isinstance(state[key], Tensor) else state[key]


def set_step(state: dict[str, Any], key: str, value: Any) -> None:
    """Set a counter of steps, in place where it is a tensor."""
    if isinstance(state[key], Tensor):
        with torch.no_grad():
            state[key].fill_(value)
    else:
        state[key] = type(state[key])(value)
