"""All that an observer reads of a model, and where its sums go."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from fastplastic.measure.alike import Alike, SeenAlike
from fastplastic.measure.parameters import WeightReader
from fastplastic.measure.slices import Slices
from fastplastic.measure.slots import TensorReads
from fastplastic.measure.together import parts_of
from fastplastic.model import BatchGroup, batch_group
from fastplastic.processes import Processes
from fastplastic.stats import columns_of
from fastplastic.wiring import UnitGraph


@dataclass(frozen=True, eq=False)
class WhatIsRead:
    """What is read.

    Attributes:
        columns: {layer name: its columns of the statistics table}.
        units: Number of all columns.
        weights: What is read of weights.
        tensors: What is read of activations and their gradients.
        group: The processes that share the batches of this one.
        alike: Counts what all of them have alike; None where this one is alone.
    """

    columns: Mapping[str, slice]
    units: int
    weights: WeightReader
    tensors: TensorReads
    group: BatchGroup
    alike: Alike | None

    @property
    def seen_alike(self) -> SeenAlike | None:
        """What all of the group have alike, so far; None where this process is alone."""
        return None if self.alike is None else self.alike.seen

    def note_inputs(self, values: Sequence[Any]) -> None:
        """Take note of what the model is called with."""
        if self.alike is not None:
            self.alike.note_inputs(values)

    def clear(self) -> None:
        """Forget everything seen."""
        if self.alike is not None:
            self.alike.clear()


def what_is_read(
    model: nn.Module, graph: UnitGraph, together: Processes | None, *, each: bool
) -> WhatIsRead:
    """Return what is read of the layers of a graph.

    Args:
        model: The model.
        graph: Its wiring.
        together: The processes that share it; None where this is the only one.
        each: Whether each process reads the weights that all have whole.

    Raises:
        InputError: A parameter is placed in a way that is not understood.
    """
    columns = columns_of({layer.name: layer.n_units for layer in graph.layers})
    group = batch_group(model, together)
    parts, copies = parts_of(model, together, group, each=each)
    if group.alone:
        alike, tensors = None, TensorReads(graph, columns)
    else:
        alike = Alike(columns, group)
        tensors = TensorReads(graph, columns, alike, Slices(model, graph, group).of)
    weights = WeightReader(graph, columns, model, parts, copies, alike)
    units = sum(layer.n_units for layer in graph.layers)
    return WhatIsRead(columns, units, weights, tensors, group, alike)
