"""What columns of weights contribute to the mean output of their modules, measured on batches."""

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map_only
from torch.utils.hooks import RemovableHandle

from fastplastic.processes import Processes
from fastplastic.reinit.places import Region, columns_of
from fastplastic.wiring import is_conv1d


class Contributions:
    """Watches what some columns of weights contribute to the mean output of their modules.

    That constant is lost when the columns become zero. The mean of what each weight of a column is
    multiplied with is measured, position by position of a kernel, so padding, strides and whatever
    lies between a unit and its consumer are right, and no process needs more of a weight than it
    holds. After the code of continual backpropagation (Dohare et al., Nature 2024), which
    multiplies the columns by the mean activation instead.

    Args:
        model: The model that will run while this is attached.
        columns: Where the columns are.
        together: The processes that run it, each on batches of its own; None for this one alone.
    """

    def __init__(
        self, model: nn.Module, columns: Iterable[Region], together: Processes | None = None
    ) -> None:
        self._model, self._together = model, together
        self._columns: dict[str, list[Region]] = {}
        for region in columns:
            self._columns.setdefault(region.name, []).append(region)
        # Sums, [groups, columns, positions of the kernel], and how many positions they are of.
        self._sums: dict[str, tuple[Tensor, int]] = {}
        self._norms: dict[str, str] = {}
        # The output of each consumer as long as anything holds it, by its id.
        self._latest: dict[int, tuple[weakref.ref[Tensor], str]] = {}
        self.paused = False

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Watch the model inside the block."""
        handles: list[RemovableHandle] = []
        try:
            for weight in self._columns:
                module = self._model.get_submodule(weight.rpartition(".")[0])
                if weight.endswith(".weight") and _is_foreseen(module):
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
        self._put_together()
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

    def _put_together(self) -> None:
        """Add up what all processes have seen; some may have had no batch."""
        if self._together is None:
            return
        own = {name: sums.shape for name, (sums, _) in self._sums.items()}
        shapes = {name: shape for seen in self._together.share(own) for name, shape in seen.items()}
        for name in sorted(shapes):
            sums, count = self._sums.get(name, (torch.zeros(shapes[name], dtype=torch.float64), 0))
            table = torch.cat([sums.flatten(), sums.new_tensor([count])])
            self._together.add_(table)
            self._sums[name] = table[:-1].view(shapes[name]), int(table[-1])
        for norms in self._together.share(self._norms):
            self._norms |= norms

    def _mean(self, weight: str, fresh: Tensor | None) -> Tensor:
        """Return what the columns contribute to each output of a module, float64."""
        sums, count = self._sums[weight]
        regions = self._columns[weight]
        factors = torch.zeros_like(sums)
        for region in regions:
            factors[region.columns] = sums[region.columns] / count
        mean = columns_of(regions[0], self._model.get_parameter(weight)).weigh(factors)
        if fresh is not None:
            mean[fresh] = 0.0
        return mean

    def _consumer(self, weight: str) -> Callable[..., None]:
        def hook(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
        ) -> None:
            if not self.paused:
                shape = self._model.get_parameter(weight).shape
                own, positions = _input_sums(module, shape, args, kwargs)
                sums, count = self._sums.get(weight, (torch.zeros_like(own), 0))
                self._sums[weight] = sums + own, count + positions
            self._latest[id(output)] = weakref.ref(output), weight

        return hook

    def _norm(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            latest = self._latest.get(id(args[0])) if args else None
            if latest is not None and latest[0]() is args[0]:
                self._norms[latest[1]] = name

        return hook


def _is_foreseen(module: nn.Module) -> bool:
    return _is_linear(module) or isinstance(module, nn.modules.conv._ConvNd)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_conv1d(module)


def _input_sums(
    module: nn.Module, shape: torch.Size, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, int]:
    """Return what each weight of an output is multiplied with, summed over all positions.

    Args:
        module: The module.
        shape: Of its weight.
        args: What it is called with.
        kwargs: The same by name.

    Returns:
        Sums, float64 [groups, columns of a group, positions of the kernel], and how many positions
        of the output they are of.
    """
    if _is_linear(module):
        inputs = args[0] if args else next(iter(kwargs.values()))
        rows = inputs.detach().flatten(0, -2)
        return rows.sum(0, dtype=torch.float64).cpu()[None, :, None], len(rows)
    # The gradient of one output of each group, to a weight of its own.
    outputs = 1 if module.transposed else int(module.groups)  # type: ignore[arg-type]
    own = (shape[0], 1) if module.transposed else (outputs, shape[1])
    args, kwargs = tree_map_only(Tensor, _float, (args, kwargs))
    inputs = args[0] if args else next(iter(kwargs.values()))
    probe = torch.zeros((*own, *shape[2:]), device=inputs.device, requires_grad=True)
    # Without its hooks, and whatever gathers its parameters.
    bare: Any = object.__new__(type(module))
    vars(bare).update(vars(module), _parameters={"weight": probe, "bias": None})
    with torch.enable_grad(), torch.autocast(inputs.device.type, enabled=False):
        output = bare.forward(*args, **kwargs)
        (sums,) = torch.autograd.grad(output.sum(), probe)
    sums = sums.double().cpu()
    sums = sums.movedim(0, 1) if module.transposed else sums
    return sums.flatten(2), output.numel() // outputs


def _float(tensor: Tensor) -> Tensor:
    return tensor.detach().float()
