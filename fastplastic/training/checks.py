"""What a Recycler refuses before anything is measured."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastplastic.errors import InputError
from fastplastic.graph import build_graph
from fastplastic.initial import make_initializer
from fastplastic.model import check_built, check_unwrapped
from fastplastic.planning import matching
from fastplastic.reinit import OptimizerState
from fastplastic.training.methods import Method
from fastplastic.wiring import UnitGraph, UnitLayer

_FAILED = "running it failed"


def check_arguments(
    model: nn.Module, optimizer: Optimizer, method: Method, batches: object
) -> None:
    """Refuse arguments that do not fit together: InputError."""
    check_unwrapped(model, "Recycler")
    check_built(model, spread=True)
    OptimizerState(optimizer, model)
    make_initializer(method.init, model)
    if batches is None:
        return
    if method.rate is not None:
        raise InputError("batches with a rate: its averages are made of the running batches")
    if method.sample_positions is not None:
        raise InputError(
            "batches with sample_positions: it is for the running batch, batches are read whole: "
            "leave one of them out"
        )
    if not callable(batches):
        raise InputError(
            f"batches is a {type(batches).__name__}, expected a function that returns the batches "
            "each time that it is called: batches=lambda: [(inputs, targets)]"
        )


def copies_of(sync: Sequence[nn.Module] | nn.Module) -> tuple[nn.Module, ...]:
    """Return the copies of a model; InputError unless they are modules."""
    copies = (sync,) if isinstance(sync, nn.Module) else tuple(sync)
    for number, copy in enumerate(copies):
        if not isinstance(copy, nn.Module):
            raise InputError(
                f"sync: copy {number} is a {type(copy).__name__}, expected a copy of the model"
            )
    return copies


def graph_of(
    model: nn.Module, example_inputs: Any, optimizer: Optimizer, method: Method
) -> UnitGraph:
    """Return the wiring of a model, in which there is something to choose from."""
    known = isinstance(example_inputs, UnitGraph)
    graph: UnitGraph = example_inputs if known else build_graph(model, example_inputs)
    failed = [why for layer in graph.layers for why in layer.unknown if _FAILED in why]
    if failed:
        raise InputError(
            f"the model does not run on example_inputs: {failed[0]}: give what the loop calls the "
            "model with, two samples are enough"
        )
    graph = _with_trained(graph, model, OptimizerState(optimizer, model).trained)
    _check_patterns(graph, method, model)
    if method.granularity == "unit":
        _check_units(graph, model, method)
    return graph


def _with_trained(graph: UnitGraph, model: nn.Module, trained: frozenset[str]) -> UnitGraph:
    """Say which weights do not learn with this optimizer; whether others do may change."""
    # Weights that are computed from others are no parameters.
    known = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    layers = []
    for layer in graph.layers:
        weights = dict.fromkeys((layer.weight, *(consumer.weight for consumer in layer.consumers)))
        still = tuple(name for name in weights if name in known and name not in trained)
        layers.append(replace(layer, without_grad=still))
    return replace(graph, layers=tuple(layers))


def _check_units(graph: UnitGraph, model: nn.Module, method: Method) -> None:
    """Refuse a model, or a method, by which no unit can be chosen."""
    frozen = {
        name for name, weight in model.named_parameters(remove_duplicate=False)
        if not weight.requires_grad
    }  # fmt: skip
    hidden = [layer for layer in graph.layers if layer.hidden.any()]
    if not hidden:
        why = f": {graph.note}" if graph.note else ""
        raise InputError(
            f"the model has no unit that can be re-initialised{why}: fastplastic.profile(model, "
            "batches) shows why, layer by layer; or choose single weights (granularity='weight')"
        )
    sizes = []
    for layer in hidden:
        named = not layer.names.isdisjoint(method.include)
        units = layer.hidden if named else layer.hidden & _learning(layer, frozen)
        sizes.append(int(units.sum()))
    if not any(sizes):
        raise InputError(
            "no unit is made and read by weights that learn (requires_grad, and among those of the "
            "optimizer), so none can be re-initialised: let the weights learn, pass the optimizer "
            "that trains them, or include the full names of layers"
        )
    most = sum(math.floor(method.max_layer_fraction * size) for size in sizes)
    if method.ratio is not None and most < math.floor(method.ratio * sum(sizes)):
        raise InputError(
            f"max_layer_fraction {method.max_layer_fraction} leaves {most} units, ratio "
            f"{method.ratio} of {sum(sizes)} is more: expected a larger max_layer_fraction or a "
            "smaller ratio"
        )


def _learning(layer: UnitLayer, frozen: set[str]) -> Tensor:
    """Return which units are made by weights that learn, and read by such alone."""
    still = frozen.union(layer.without_grad)
    learning = torch.full((layer.n_units,), layer.weight not in still)
    for consumer in layer.consumers:
        if consumer.weight in still:
            read = consumer.unit_of_column
            learning[read[read >= 0]] = False
    return learning


def _check_patterns(graph: UnitGraph, method: Method, model: nn.Module) -> None:
    """Refuse patterns that match no layer now, not in the step in which they are used."""
    names = [layer.name for layer in graph.layers]
    others = [name for layer in graph.layers for name in layer.tied]
    if method.granularity == "weight":
        others += [name for name, _ in model.named_parameters()]
    matching(names, method.include, "include", others)
    matching(names, method.exclude, "exclude", others)


def nothing_known(n_units: int) -> tuple[Tensor, Tensor]:
    """Return scores that are unknown, of units that may not be chosen."""
    return (
        torch.full((n_units,), torch.nan, dtype=torch.float64),
        torch.zeros(n_units, dtype=torch.bool),
    )


def difference(found: Any, expected: Any) -> str:
    """Say where a value of a state differs from that of the Recycler that it is loaded into."""
    if not isinstance(found, Mapping) or not isinstance(expected, Mapping):
        return f"{found!r}, this one has {expected!r}"
    for name in {*found, *expected}:
        if found.get(name) != expected.get(name):
            return f"{name} {found.get(name)!r}, this one has {expected.get(name)!r}"
    return "equal"
