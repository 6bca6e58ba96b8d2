"""What columns contributed on average, from the mean activations that a caller has kept."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fastplastic.errors import InputError
from fastplastic.model import Lines
from fastplastic.planning import Plan
from fastplastic.reinit.regions import Tensors
from fastplastic.wiring import Consumer, UnitLayer


class KnownMeans:
    """The constants that outgoing columns contribute, computed before they are written.

    Column times mean activation, summed over a kernel as if no padding were there: after the code
    of continual backpropagation (Dohare et al., Nature 2024).

    Args:
        model: The model.
        plan: Which units lose their columns.
        tensors: The tensors of the model.
        means: Layer name -> mean h of each of its units.

    Raises:
        InputError: A layer of the plan has no means, or not one for each unit.
    """

    def __init__(
        self, model: nn.Module, plan: Plan, tensors: Tensors, means: Mapping[str, Tensor]
    ) -> None:
        self._model, self._tensors = model, tensors
        self._shifts: dict[str, Tensor] = {}
        self._without: list[str] = []
        for name, units in plan.units.items():
            layer = plan.wiring[name]
            if name not in means or means[name].shape != (layer.n_units,):
                raise InputError(
                    f"compensate has no mean activation for each of the {layer.n_units} units of "
                    f"{name!r}: pass one for each layer of the plan, or True and batches"
                )
            inner = {name, *(member.name for member in layer.coupled)}
            for consumer in layer.consumers:
                if consumer.name not in inner:
                    self._add(layer, consumer, units, means[name])

    def shifts(self, fresh: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """Return {bias: what to add}, and the weights whose layer has none.

        Args:
            fresh: Layer name -> rows that are drawn afresh, which lose nothing.
        """
        for name, rows in fresh.items():
            if f"{name}.bias" in self._shifts:
                self._shifts[f"{name}.bias"][rows] = 0.0
        return self._shifts, self._without

    def _add(self, layer: UnitLayer, consumer: Consumer, units: Tensor, means: Tensor) -> None:
        module = self._model.get_submodule(consumer.name)
        bias = getattr(module, "bias", None)
        if not isinstance(bias, Tensor) or isinstance(module, nn.modules.conv._ConvTransposeNd):
            self._without.append(consumer.weight)
            return
        chosen = torch.zeros(layer.n_units + 1, dtype=torch.float64)
        chosen[units] = means[units].double().cpu()
        # One entry more, of 0, for -1; a column of another unit counts 0.
        of_column = chosen[consumer.unit_of_column]
        weight = self._tensors[consumer.weight]
        lines = Lines(consumer.weight, weight, consumer.column_dim, consumer.groups)
        shift = lines.weigh(of_column.view(consumer.groups, -1, 1))
        key = f"{consumer.name}.bias"
        self._shifts[key] = self._shifts.get(key, torch.zeros_like(shift)) + shift
