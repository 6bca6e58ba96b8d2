"""Models with plans, and by hand what has to be written."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fastplastic.planning import Plan
from fastplastic.wiring import Consumer, Coupling, Norm, UnitLayer
from helpers import plan_of_units

EVERY = slice(None)


def layer(model: nn.Module, name: str, **fields) -> UnitLayer:
    """Return the wiring of a layer with all units hidden."""
    kind, unit_dim = fields.pop("kind", "linear"), fields.pop("unit_dim", 0)
    module = model.get_submodule(name)
    units = module.weight.shape[unit_dim]
    bias = None if module.bias is None else f"{name}.bias"
    hidden = fields.pop("hidden", torch.ones(units, dtype=torch.bool))
    return UnitLayer(
        name, kind, f"{name}.weight", bias, unit_dim, units, None, ((0, units, "relu"),), hidden,
        **fields,
    )  # fmt: skip


def consumer(name: str, unit_of_column: Tensor, column_dim: int = 1, groups: int = 1) -> Consumer:
    return Consumer(name, f"{name}.weight", column_dim, groups, unit_of_column)


def norm(name: str, channels: int) -> Norm:
    return Norm(name, torch.arange(channels))


@dataclass
class Case:
    """A model, a plan for it, and by hand what has to be written: {tensor name: index}."""

    model: nn.Module
    plan: Plan
    inputs: Tensor
    rows: dict[str, object]
    norms: dict[str, object]
    columns: dict[str, object]


class SwiGLU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(5, 8), nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class PackedSwiGLU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(5, 16), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.fc1(x).chunk(2, -1)
        return self.fc2(nn.functional.silu(gate) * up)


class Concat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 6, 1), nn.Conv2d(10, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(torch.cat([self.a(x), self.b(x)], 1)))


def mlp() -> Case:
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    first = layer(model, "0", consumers=(consumer("2", torch.arange(8)),))
    plan = plan_of_units(model, [first], {"0": [1, 4]})
    rows = {"0.weight": [1, 4], "0.bias": [1, 4]}
    return Case(model, plan, torch.randn(7, 5), rows, {}, {"2.weight": (EVERY, [1, 4])})


def deep_mlp() -> Case:
    """Two layers in a row lose units: an outgoing column stays zero in a row drawn afresh."""
    names = ["a", "f", "b", "g", "c"]
    parts = [nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)]
    model = nn.Sequential(OrderedDict(zip(names, parts, strict=True)))
    a = layer(model, "a", consumers=(consumer("b", torch.arange(8)),))
    b = layer(model, "b", consumers=(consumer("c", torch.arange(6)),))
    plan = plan_of_units(model, [a, b], {"b": [0, 5], "a": [2]})
    rows = {"a.weight": [2], "a.bias": [2], "b.bias": [0, 5], "b.weight": [0, 5]}
    columns = {"b.weight": (EVERY, [2]), "c.weight": (EVERY, [0, 5])}
    return Case(model, plan, torch.randn(7, 5), rows, {}, columns)


def convnet() -> Case:
    parts = [nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3, groups=2)]
    model = nn.Sequential(*parts)
    first = layer(
        model, "0", kind="conv", norms=(norm("1", 6),),
        consumers=(consumer("3", torch.arange(6), groups=2),),
    )  # fmt: skip
    # Columns of a grouped convolution: unit 1 is in group 0, unit 5 at column 2 of group 1.
    columns = {"3.weight": ([0, 1, 2, 3], [1, 1, 2, 2])}
    norms = {f"1.{key}": [1, 5] for key in ("weight", "bias", "running_mean", "running_var")}
    plan = plan_of_units(model, [first], {"0": [1, 5]})
    rows = {"0.weight": [1, 5], "0.bias": [1, 5]}
    return Case(model, plan, torch.randn(2, 3, 8, 8), rows, norms, columns)


def mbconv() -> Case:
    model = nn.Sequential(OrderedDict(
        expand=nn.Conv2d(4, 8, 1, bias=False), bn1=nn.BatchNorm2d(8), act1=nn.ReLU6(),
        depthwise=nn.Conv2d(8, 8, 3, groups=8, bias=False), bn2=nn.BatchNorm2d(8), act2=nn.ReLU6(),
        project=nn.Conv2d(8, 4, 1, bias=False),
    ))  # fmt: skip
    every = torch.arange(8)
    expand = layer(
        model, "expand", kind="conv", norms=(norm("bn1", 8),),
        coupled=(Coupling("depthwise", every),),
        # The filter that belongs to the unit reads it: that is not an outgoing column.
        consumers=(consumer("depthwise", every, groups=8),),
    )  # fmt: skip
    depthwise = layer(
        model, "depthwise", kind="depthwise conv", norms=(norm("bn2", 8),),
        hidden=torch.zeros(8, dtype=torch.bool), consumers=(consumer("project", every),),
    )  # fmt: skip
    keys = ("weight", "bias", "running_mean", "running_var")
    norms = {f"{bn}.{key}": [0, 3] for bn in ("bn1", "bn2") for key in keys}
    plan = plan_of_units(model, [expand, depthwise], {"expand": [0, 3]})
    rows = {"expand.weight": [0, 3], "depthwise.weight": [0, 3]}
    columns = {"project.weight": (EVERY, [0, 3])}
    return Case(model, plan, torch.randn(2, 4, 6, 6), rows, norms, columns)


def swiglu() -> Case:
    model = SwiGLU()
    down = (consumer("down", torch.arange(8)),)
    gate = layer(model, "gate", coupled=(Coupling("up", torch.arange(8)),), consumers=down)
    up = layer(model, "up", hidden=torch.zeros(8, dtype=torch.bool))
    plan = plan_of_units(model, [gate, up], {"gate": [2, 7]})
    rows = {f"{name}.{key}": [2, 7] for name in ("gate", "up") for key in ("weight", "bias")}
    return Case(model, plan, torch.randn(7, 5), rows, {}, {"down.weight": (EVERY, [2, 7])})


def packed_swiglu() -> Case:
    model = PackedSwiGLU()
    half, none = torch.arange(8), torch.full((8,), -1)
    fc1 = layer(
        model, "fc1", hidden=torch.cat([half, none]) >= 0,
        coupled=(Coupling("fc1", torch.cat([half + 8, none])),),
        consumers=(consumer("fc2", half),),
    )  # fmt: skip
    plan = plan_of_units(model, [fc1], {"fc1": [2, 7]})
    rows = {"fc1.weight": [2, 7, 10, 15], "fc1.bias": [2, 7, 10, 15]}
    return Case(model, plan, torch.randn(7, 5), rows, {}, {"fc2.weight": (EVERY, [2, 7])})


def concat() -> Case:
    model = Concat()
    # Two layers have columns in one consumer.
    first = torch.cat([torch.arange(4), torch.full((6,), -1)])
    second = torch.cat([torch.full((4,), -1), torch.arange(6)])
    a = layer(model, "a", kind="conv", consumers=(consumer("out", first),))
    b = layer(model, "b", kind="conv", consumers=(consumer("out", second),))
    plan = plan_of_units(model, [a, b], {"a": [1], "b": [0, 5]})
    rows = {"a.weight": [1], "a.bias": [1], "b.weight": [0, 5], "b.bias": [0, 5]}
    return Case(model, plan, torch.randn(2, 3, 4, 4), rows, {}, {"out.weight": (EVERY, [1, 4, 9])})


def flatten() -> Case:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
    repeated = torch.arange(4).repeat_interleave(4)
    conv = layer(model, "0", kind="conv", consumers=(consumer("3", repeated),))
    plan = plan_of_units(model, [conv], {"0": [2]})
    columns = {"3.weight": (EVERY, [8, 9, 10, 11])}
    rows = {"0.weight": [2], "0.bias": [2]}
    return Case(model, plan, torch.randn(2, 3, 4, 4), rows, {}, columns)


def hugging_face() -> Case:
    model = nn.Sequential(Conv1D(8, 5), nn.GELU(), Conv1D(3, 8))
    first = layer(
        model, "0", kind="conv1d", unit_dim=1,
        consumers=(consumer("2", torch.arange(8), column_dim=0),),
    )  # fmt: skip
    plan = plan_of_units(model, [first], {"0": [1, 4]})
    rows = {"0.weight": (EVERY, [1, 4]), "0.bias": [1, 4]}
    return Case(model, plan, torch.randn(7, 5), rows, {}, {"2.weight": [1, 4]})


CASES = [mlp, deep_mlp, convnet, mbconv, swiglu, packed_swiglu, concat, flatten, hugging_face]


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def identical(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def filled(make: Callable[[], Case]) -> Case:
    """Return a case with values that no reset would write, so that every write shows."""
    torch.manual_seed(0)
    case = make()
    for name, tensor in case.model.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand_like(tensor) + (0.5 if "var" in name else 0.1))
    return case
