"""Wiring, figures and writes of the smallest models of timm's families.

The wiring has the two properties of `helpers`. The profile says of units what their consumers get:
some are driven deep into the negative, where activation functions are flat, and hooks on the
consumers' inputs tell which are constant there. A reset writes only to what the wiring names.
"""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import timm
import torch
from helpers import FAMILIES, SHORTER, check_wiring
from torch import Tensor, nn

from fastplastic import Profile, plan, profile, reinit_
from fastplastic.graph import build
from fastplastic.graph.nodes import base_name, op_name
from fastplastic.graph.rules import RULES
from fastplastic.measure import run
from fastplastic.wiring import UnitGraph, UnitLayer

# Here a constant is added behind the activation function, or a gate reads units before it.
FORCED_AT_CONSUMERS = {"poolformerv2_s12", "hgnetv2_b0", "fastvit_t8", "rexnet_100"}
# Their layers before an activation function have no bias or norm to drive units by.
NOTHING_PLANTED = {"poolformerv2_s12", "pvt_v2_b0"}
# What these do to units is not known here: they are given up, and have no activation function.
GIVEN_UP = {
    "__and__", "_upsample_bicubic2d_aa", "addcmul", "argmax", "bernoulli", "bitwise_not",
    "col2im", "copy", "embedding", "eq", "gather", "ge", "gt", "index", "le", "lt", "meshgrid",
    "ne", "one_hot", "lstm", "sort", "topk", "wrap_with_autocast",
}  # fmt: skip


@pytest.fixture
def given_up(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """Return the operators that units are given up at, while models are traced."""
    names: set[str] = set()
    unknown = build.unknown

    def noting(walk: Any, node: Any, args: Any) -> Any:
        names.add(base_name(op_name(node)))
        return unknown(walk, node, args)

    monkeypatch.setattr(build, "unknown", noting)
    yield names


class Inputs:
    """The least and largest value in every channel of a module's input, over all positions."""

    def __init__(self, module: nn.Module) -> None:
        self.axis = 1 if isinstance(module, nn.modules.conv._ConvNd) else -1
        self.low = self.high = torch.empty(0)
        module.register_forward_pre_hook(self.see)

    def see(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        if not torch.compiler.is_exporting():
            rows = args[0].detach().movedim(self.axis, 0).flatten(1)
            self.low, self.high = rows.amin(1), rows.amax(1)


def plant(model: nn.Module, layer: UnitLayer) -> Tensor:
    """Drive a quarter of the hidden units deep into the negative; return which, bool [units]."""
    wanted = layer.hidden & (torch.rand(layer.n_units) < 0.25)
    places = [(f"{norm.name}.bias", norm.unit_of_channel) for norm in layer.norms]
    if not places and layer.bias is not None:
        places = [(layer.bias, torch.arange(layer.n_units))]
    done = torch.zeros(layer.n_units, dtype=torch.bool)
    for name, units in places:
        at = (units >= 0) & wanted[units]
        model.get_parameter(name).data[at] -= 60
        done[units[at]] = True
    return done


def at_consumers(layer: UnitLayer, inputs: dict[str, Inputs]) -> tuple[Tensor, Tensor] | None:
    """Return which units are the same at every position of every consumer, and which are not.

    Both are bool [units]. What moves by a rounding error is neither.
    """
    constant = torch.ones(layer.n_units, dtype=torch.bool)
    moving = torch.zeros(layer.n_units, dtype=torch.bool)
    consumers = [c for c in layer.consumers if c.name in inputs and not gates(layer, c.name)]
    for consumer in consumers:
        seen, units = inputs[consumer.name], consumer.unit_of_column
        size, width = torch.maximum(seen.low.abs(), seen.high.abs()), seen.high - seen.low
        constant[units[(width > 1e-6 * size) & (units >= 0)]] = False
        moving[units[(width > 1e-5 * size.max()) & (units >= 0)]] = True
    return (constant, moving) if consumers else None


def gates(layer: UnitLayer, name: str) -> bool:
    """Tell whether a module makes a gate, of units before their activation function perhaps."""
    return ".se." in name and ".se." not in layer.name


def check_figures(graph: UnitGraph, found: Profile, planted: dict[str, Tensor],
                  inputs: dict[str, Inputs], padded: bool) -> int:  # fmt: skip
    """Compare a profile with what consumers get; return how many planted units it calls still."""
    total = 0
    for layer in graph.layers:
        row = found[layer.name]
        unknown = torch.zeros(layer.n_units, dtype=torch.bool)
        for start, stop, name in layer.activations:
            unknown[start:stop] = name == "unknown"
        assert not (unknown & (row.dead | row.frozen | row.dormant)).any(), layer.name
        assert (row.measured | unknown).all(), layer.name
        truth = at_consumers(layer, inputs)
        if truth is None or layer.activation == "identity" or not row.measured.any():
            continue
        constant, moving = truth
        size = torch.maximum(row.stats["max_h"].abs(), row.stats["min_h"].abs())
        still = row.stats.range_h <= 1e-4 * size[row.measured].max()
        planted_here = planted.get(layer.name, torch.zeros_like(still))
        lost = planted_here & constant & row.measured & ~still
        assert not lost.any(), (layer.name, layer.activation, int(lost.sum()), "are not found")
        # At 0 it stays, whatever gate or pooling follows.
        wrong = row.dead & (size == 0) & moving & layer.hidden
        assert padded or not wrong.any(), (layer.name, layer.activation, int(wrong.sum()))
        total += int((still & planted_here).sum())
    return total


def may_change(graph: UnitGraph, chosen: dict[str, Tensor], state: dict[str, Tensor]) -> Any:
    """Return {name: bool mask} of what a reset of these units may write to."""
    masks = {name: torch.zeros(value.shape, dtype=torch.bool) for name, value in state.items()}

    def rows(layer: UnitLayer, units: Tensor) -> None:
        masks[layer.weight].movedim(layer.unit_dim, 0)[units] = True
        if layer.bias is not None:
            masks[layer.bias][units] = True
        for norm in layer.norms:
            at = torch.isin(norm.unit_of_channel, units)
            for part in ("weight", "bias", "running_mean", "running_var"):
                if f"{norm.name}.{part}" in masks:
                    masks[f"{norm.name}.{part}"][at] = True

    for name, units in chosen.items():
        members = [(graph[c.name], c.row_of_unit[units]) for c in graph[name].coupled]
        for layer, own in [(graph[name], units), *members]:
            own = own[own >= 0]
            rows(layer, own)
            for consumer in layer.consumers:
                weight = masks[consumer.weight].movedim(consumer.column_dim, 1)
                groups = weight.unflatten(0, (consumer.groups, -1))
                size = len(consumer.unit_of_column) // consumer.groups
                for column in torch.isin(consumer.unit_of_column, own).nonzero().flatten().tolist():
                    groups[column // size, :, column % size] = True
    return masks


def check_writes(model: nn.Module, graph: UnitGraph, found: Profile) -> None:
    """Re-initialise units and compare every number of the model with what it was."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    chosen = plan(found, criterion="random", ratio=0.2)
    reinit_(model, chosen)
    masks = may_change(graph, chosen.units, state)
    for name, value in model.state_dict().items():
        changed = value != state[name]
        assert not (changed & ~masks[name]).any(), name
    weight = graph[next(iter(chosen.units))].weight
    assert (model.state_dict()[weight] != state[weight]).any()


@pytest.mark.parametrize("name", FAMILIES)
def test_timm_family(name: str, given_up: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, **SHORTER.get(name, {}))
    if name in ("gmlp_ti16_224", "mixer_s32_224"):
        model.blocks = model.blocks[:3]
    config = model.pretrained_cfg
    x = torch.randn(2, *(config["input_size"] if config.get("fixed_input_size") else (3, 96, 96)))
    graph = check_wiring(model, x[:1].double(), name in FORCED_AT_CONSUMERS).graph
    assert given_up <= GIVEN_UP, given_up - GIVEN_UP
    assert not GIVEN_UP & RULES.keys()
    model = model.float()
    # Traced once: the wiring depends on no number.
    monkeypatch.setattr(run, "build_graph", lambda *_: graph)
    with torch.no_grad():
        planted = {x.name: plant(model, x) for x in graph.layers if x.hidden.any()}
    names = {consumer.name for layer in graph.layers for consumer in layer.consumers}
    inputs = {n: Inputs(model.get_submodule(n)) for n in names if called(model, n)}
    found = profile(model, [(x, torch.zeros(2, dtype=torch.int64))])
    # Nothing that the forward pass cached holds a graph.
    copy.deepcopy(model)
    # hgnetv2 pads with zeros behind a constant that it adds.
    total = check_figures(graph, found, planted, inputs, name == "hgnetv2_b0")
    assert total > 0 or name in NOTHING_PLANTED
    check_writes(model, graph, found)


def called(model: nn.Module, name: str) -> bool:
    module = model.get_submodule(name)
    return not isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)
