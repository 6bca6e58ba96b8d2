"""The state of an optimizer in a file: which of it belongs to which weight of a model."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastplastic.files.fields import is_number
from fastplastic.files.names import without_wrappers

Parameters = Sequence[nn.Parameter]


@dataclass(frozen=True, eq=False)
class StoredOptimizer:
    """What a file says of an optimizer, beside an optimizer that remembers the same.

    Attributes:
        optimizer: It has the state and the options of the file, and cannot step.
        saved: {index of a parameter: its state} in the file.
        parameters: The parameters by index.
    """

    optimizer: Optimizer
    saved: Mapping[int, dict[str, Any]]
    parameters: Mapping[int, nn.Parameter]

    @classmethod
    def of(cls, saved: Any, model: nn.Module) -> "StoredOptimizer | None":
        """Return the optimizer, or None where it is not known which state is of which weight."""
        try:
            state, groups = saved["state"], list(saved["param_groups"])
            indices = [list(group["params"]) for group in groups]
            for parameters in _orders(groups, model):
                if [len(own) for own in parameters] == [len(own) for own in indices]:
                    by_index = _joined(indices, parameters)
                    if _fits(state, by_index):
                        return cls(_optimizer(groups, parameters, state, by_index), state, by_index)
        # The file may hold anything under these names.
        except (TypeError, ValueError, LookupError, AttributeError):
            pass
        return None

    def write(self) -> None:
        """Give the tensors of the file the values that the optimizer has."""
        with torch.no_grad():
            for index, state in self.saved.items():
                for key, value in self.optimizer.state[self.parameters[index]].items():
                    if isinstance(value, Tensor) and value is not state[key]:
                        state[key].copy_(value)


class _Remembers(Optimizer):
    """An optimizer of any kind that only remembers."""

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, {})

    def step(self, closure: Any = None) -> Any:
        """Refuse to train."""
        raise NotImplementedError


def _optimizer(
    groups: Sequence[Mapping[str, Any]],
    parameters: Sequence[Parameters],
    state: Mapping[int, dict[str, Any]],
    by_index: Mapping[int, nn.Parameter],
) -> Optimizer:
    options = [{k: v for k, v in group.items() if is_number(v)} for group in groups]
    own = [{**given, "params": list(x)} for given, x in zip(options, parameters, strict=True)]
    # What fresh state begins at depends on the class; timm's RMSprop is known by this option.
    kind = "RMSpropTF" if any("lr_in_momentum" in group for group in groups) else "Remembers"
    made: Optimizer = type(kind, (_Remembers,), {})(own)
    for index, values in state.items():
        parameter = by_index[index]
        made.state[parameter] = {
            key: x.to(parameter.device) if isinstance(x, Tensor) and x.dim() else x
            for key, x in values.items()
        }
    return made


def _orders(
    groups: Sequence[Mapping[str, Any]], model: nn.Module
) -> Iterator[Sequence[Parameters]]:
    """Yield the groups in which the parameters may stand: as named, or as torch and timm do."""
    own = dict(model.named_parameters())
    if all("param_names" in group for group in groups):
        names = [without_wrappers(dict.fromkeys(group["param_names"]), "")[0] for group in groups]  # type: ignore[arg-type]
        yield [[own[name] for name in found] for found in names]
        return
    yield [list(own.values())]
    from timm.optim import param_groups_weight_decay  # type: ignore[attr-defined]

    excluded: Collection[str] = getattr(model, "no_weight_decay", tuple)()
    made = param_groups_weight_decay(model, 1.0, no_weight_decay_list=excluded)
    yield [group["params"] for group in made]


def _joined(
    indices: Sequence[Sequence[int]], parameters: Sequence[Parameters]
) -> dict[int, nn.Parameter]:
    pairs = zip(indices, parameters, strict=True)
    return {index: x for own, group in pairs for index, x in zip(own, group, strict=True)}


def _fits(state: Mapping[int, Mapping[str, Any]], by_index: Mapping[int, nn.Parameter]) -> bool:
    """Tell whether each parameter has the shape of its state, wherever there is such a state."""
    for index, values in state.items():
        tensors = [value for value in values.values() if isinstance(value, Tensor) and value.dim()]
        if tensors and not any(value.shape == by_index[index].shape for value in tensors):
            return False
    return True
