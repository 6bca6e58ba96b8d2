"""Wiring against torch-pruning, which finds by autograd what has to be removed with a channel.

What is compared is exact: the rows that make a unit, the columns that read it, and the channels of
the norms between. Both sides are written as sets of (module name, index). Two kinds of models are
not here: those that split a tensor into branches (Res2Net, CSPNet), as torch-pruning takes the
branches in the order of the backward pass, so for others than they are; and those with depthwise
filters on a residual stream (Xception), as it removes channels of the whole stream, where we leave
the stream as it is and re-initialise the filter alone.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import pytest
import timm
import torch
import torch_pruning
from timm.layers import GluMlp, SwiGLU
from torch import Tensor, nn

from fastplastic.graph import build_graph
from fastplastic.wiring import UnitGraph, UnitLayer

Places = frozenset[tuple[str, int]]


class Branches(nn.Module):
    """Two convolutions side by side under one norm, flattened."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 5, 1)
        self.norm, self.pool = nn.BatchNorm2d(9), nn.MaxPool2d(2)
        self.fc, self.head = nn.Linear(9 * 16, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        joined = torch.cat([self.a(x).relu(), self.b(x).relu()], 1)
        return self.head(self.fc(self.pool(self.norm(joined)).flatten(1)).relu())


def classifier() -> nn.Module:
    """A convolutional network of the old shape: pooling, flattening, hidden linear layers."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(), nn.Flatten(),
        nn.Linear(8 * 16, 10), nn.BatchNorm1d(10), nn.ReLU(), nn.Linear(10, 4),
    )  # fmt: skip


def autoencoder() -> nn.Module:
    """Transposed convolutions, whose weights have units along dimension 1."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 2, stride=2), nn.ReLU(), nn.ConvTranspose2d(6, 5, 2, stride=2),
        nn.BatchNorm2d(5), nn.ReLU(), nn.ConvTranspose2d(5, 4, 1), nn.ReLU(), nn.Conv2d(4, 3, 1),
    )  # fmt: skip


def gated() -> nn.Module:
    """Gated MLPs: two layers make a unit, or two rows of one layer do."""
    return nn.Sequential(SwiGLU(6, 8), GluMlp(6, 8), nn.Linear(6, 3))


@dataclass(frozen=True)
class Case:
    """A model, and how much of it the two must agree on at least.

    Attributes:
        make: Makes the model.
        shape: Shape of its input; two samples, so that no other dimension is taken for the batch.
        hidden: Number of layers with hidden units.
        free: Number of layers with units that torch-pruning removes without touching others.
    """

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    hidden: int
    free: int


def from_timm(name: str, size: int, hidden: int, free: int, **options: object) -> Case:
    return Case(partial(timm.create_model, name, **options), (2, 3, size, size), hidden, free)


CASES = {
    "classifier": Case(classifier, (2, 3, 8, 8), 3, 3),
    "branches": Case(Branches, (2, 3, 8, 8), 3, 3),
    "autoencoder": Case(autoencoder, (2, 3, 8, 8), 3, 3),
    # What torch-pruning couples in a gated MLP is one unit made by two rows.
    "gated": Case(gated, (2, 5, 6), 4, 2),
    "resnet18": from_timm("resnet18", 32, 8, 8),
    # Norms before the convolutions, and concatenation throughout.
    "densenet": from_timm("densenet121", 32, 17, 17, growth_rate=8, block_config=(2, 3, 2)),
    "selecsls42": from_timm("selecsls42", 64, 41, 41),
    "dla34": from_timm("dla34", 32, 19, 19),
    # Depthwise filters are rows of the unit that they filter.
    "efficientnet_lite0": from_timm("efficientnet_lite0", 32, 19, 19),
    # Squeeze-and-excite: the channels of its gate belong to the gated units for torch-pruning.
    "mobilenetv3": from_timm("mobilenetv3_small_050", 32, 23, 14),
    # Grouped convolutions in front of others.
    "regnetx_002": from_timm("regnetx_002", 32, 27, 27),
    "convnext_atto": from_timm("convnext_atto", 64, 12, 12),
    "deit_tiny": from_timm("deit_tiny_patch16_224", 32, 6, 3, img_size=32, depth=3),
    "mixer": from_timm("mixer_s32_224", 32, 16, 16, img_size=32),
}
ALL = pytest.mark.parametrize("name", CASES)


@dataclass(frozen=True)
class Group:
    """What belongs to one unit.

    Attributes:
        rows: Rows of weight layers that make it.
        columns: Input channels of weight layers that read it.
        norms: Channels of BatchNorms.
        shared: Whether a LayerNorm mixes it with others or a parameter of no layer (position
            embedding, layer scale) has a place for it.
    """

    rows: Places
    columns: Places
    norms: Places
    shared: bool = False


@dataclass(frozen=True)
class Pair:
    """A model as both libraries see it."""

    model: nn.Module
    graph: UnitGraph
    oracle: torch_pruning.DependencyGraph

    def group(self, name: str, unit: int) -> Group:
        """Return what torch-pruning removes together with a row of a layer."""
        root = self.model.get_submodule(name)
        prune = (
            torch_pruning.prune_linear_out_channels
            if isinstance(root, nn.Linear)
            else torch_pruning.prune_conv_out_channels
        )
        names = {module: name for name, module in self.model.named_modules()}
        found: dict[str, set[tuple[str, int]]] = {"rows": set(), "columns": set(), "norms": set()}
        shared = False
        for dependency, indices in self.oracle.get_pruning_group(root, prune, [unit]):
            kind = self.kind(dependency)
            if kind in found:
                found[kind].update((names[dependency.target.module], i) for i in indices)
            shared |= kind == "shared"
        return Group(*map(frozenset, found.values()), shared)

    def kind(self, dependency: torch_pruning.Dependency) -> str:
        module = dependency.target.module
        if isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
            # Of a depthwise convolution the two are one function.
            outgoing = self.oracle.is_out_channel_pruning_fn(dependency.handler)
            return "rows" if outgoing else "columns"
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            return "norms"
        alike = nn.LayerNorm | nn.GroupNorm | nn.Parameter
        return "shared" if isinstance(module, alike) else "operator"

    def own_group(self, layer: UnitLayer, unit: int) -> Group:
        """Return what the graph says of a hidden unit, over all rows that make it."""
        rows = {(layer.name, unit)} | {
            (member.name, int(member.row_of_unit[unit]))
            for member in layer.coupled
            if member.row_of_unit[unit] >= 0
        }
        columns: set[tuple[str, int]] = set()
        norms: set[tuple[str, int]] = set()
        for name, row in rows:
            for consumer in self.graph[name].consumers:
                columns |= places(consumer.name, consumer.unit_of_column, row)
            for norm in self.graph[name].norms:
                norms |= places(norm.name, norm.unit_of_channel, row)
        return Group(frozenset(rows), frozenset(columns), frozenset(norms))


def places(name: str, unit_of_index: Tensor, unit: int) -> set[tuple[str, int]]:
    return {(name, i) for i in (unit_of_index == unit).nonzero().flatten().tolist()}


@cache
def pair(name: str) -> Pair:
    torch.manual_seed(0)
    model = CASES[name].make().eval()
    x = torch.randn(CASES[name].shape)
    # As a tuple: torch-pruning unpacks a tensor along the batch first. Not verbose: it would warn
    # of every parameter that belongs to no layer.
    oracle = torch_pruning.DependencyGraph().build_dependency(model, (x,), verbose=False)
    return Pair(model, build_graph(model, (x,)), oracle)


def sample(units: Tensor) -> list[int]:
    """Return the first, a middle and the last one; all of a small layer."""
    listed = units.tolist()
    return listed if len(listed) <= 12 else [listed[0], listed[len(listed) // 2], listed[-1]]


def partners(pair: Pair, own: Group) -> set[tuple[str, int]]:
    """Return the rows that torch-pruning removes too because it keeps products in one shape.

    They change what is multiplied with the unit, not what makes it; here they are no units:
    the gate of a squeeze-and-excite, which scales the unit, and the query and the key at the same
    place of the attention, whose value alone passes through to its projection.
    """
    gates = {
        (name.replace("conv_reduce", "conv_expand"), channel)
        for name, channel in own.columns
        if name.endswith(".se.conv_reduce")
    }
    others = {
        (name, row - back * pair.graph[name].n_units // 3)
        for name, row in own.rows
        if name.endswith(".attn.qkv")
        for back in (1, 2)
    }
    found = gates | others
    assert not any(pair.graph[name].hidden[row] for name, row in found)
    return found


@ALL
def test_every_hidden_unit_is_wired_as_in_torch_pruning(name):
    both = pair(name)
    compared = [layer for layer in both.graph.layers if layer.hidden.any()]
    for layer in compared:
        for unit in sample(layer.hidden.nonzero().flatten()):
            own, theirs = both.own_group(layer, unit), both.group(layer.name, unit)
            where = f"{layer.name} unit {unit}"
            assert own.columns == theirs.columns, where
            assert own.norms == theirs.norms, where
            assert own.rows | partners(both, own) == theirs.rows, where
            assert own.columns and not theirs.shared, where
    assert len(compared) >= CASES[name].hidden


@ALL
def test_what_torch_pruning_removes_alone_is_hidden(name):
    """The other way round: no unit is missed, be it for a rule that gave up too early.

    A channel of a residual stream has rows in several layers for torch-pruning: it is not alone.
    """
    both = pair(name)
    free = set()
    for layer in both.graph.layers:
        for unit in sample(torch.arange(layer.n_units)):
            if stands_alone(both, layer, unit):
                assert layer.hidden[unit], (layer.name, unit, layer.reasons)
                free.add(layer.name)
    assert len(free) >= CASES[name].free


def stands_alone(both: Pair, layer: UnitLayer, unit: int) -> bool:
    """Tell whether one row and depthwise filters of it are all that makes a unit others read."""
    group = both.group(layer.name, unit)
    makers = {place for place in group.rows if both.graph[place[0]].kind != "depthwise conv"}
    return makers == {(layer.name, unit)} and bool(group.columns) and not group.shared


@ALL
def test_consumers_have_the_columns_and_groups_of_the_module(name):
    both = pair(name)
    consumers = [consumer for layer in both.graph.layers for consumer in layer.consumers]
    for consumer in consumers:
        module = both.model.get_submodule(consumer.name)
        pruner = both.oracle.get_pruner_of_module(module)
        channels, groups = pruner.get_in_channels(module), pruner.get_in_channel_groups(module)
        assert len(consumer.unit_of_column) == channels, consumer.name
        assert consumer.groups == groups, consumer.name
        weight = both.model.get_parameter(consumer.weight)
        assert weight.shape[consumer.column_dim] * consumer.groups == channels, consumer.name
        assert consumer.column_dim == (not getattr(module, "transposed", False)), consumer.name
    assert len(consumers) >= CASES[name].hidden
