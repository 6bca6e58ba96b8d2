import json
import math
from collections import OrderedDict
from dataclasses import dataclass, replace

import pytest
import torch
from helpers import plan_of_units
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fastplastic.model import fingerprint
from fastplastic.planning import Plan
from fastplastic.reinit import reinit_
from fastplastic.reinit import transaction as apply_module
from fastplastic.wiring import Consumer, Coupling, Norm, UnitLayer

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
NORM_VALUES = {"weight": 1, "bias": 0, "running_mean": 0, "running_var": 1}


@pytest.fixture(params=CASES, ids=lambda make: make.__name__)
def case(request) -> Case:
    torch.manual_seed(0)
    case = request.param()
    for name, tensor in case.model.state_dict().items():
        # No value that a reset would write, so that every write shows.
        if tensor.is_floating_point():
            tensor.copy_(torch.rand_like(tensor) + (0.5 if "var" in name else 0.1))
    return case


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def identical(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def marked(shape: torch.Size, *indices: object) -> Tensor:
    mask = torch.zeros(shape, dtype=torch.bool)
    for index in indices:
        mask[index] = True
    return mask


def expected_masks(case: Case, outgoing: str) -> dict[str, Tensor]:
    parts = [case.rows, case.norms, *([case.columns] if outgoing == "zero" else [])]
    names = {name for part in parts for name in part}
    state = case.model.state_dict()
    return {
        name: marked(state[name].shape, *(part[name] for part in parts if name in part))
        for name in names
    }


@pytest.mark.parametrize("outgoing", ["zero", "keep"])
def test_exactly_the_units_are_written(case, outgoing):
    before = snapshot(case.model)
    report = reinit_(case.model, case.plan, init="kaiming_uniform", outgoing=outgoing)
    masks = expected_masks(case, outgoing)
    for name, tensor in case.model.state_dict().items():
        mask = masks.get(name, torch.zeros_like(tensor, dtype=torch.bool))
        assert torch.equal(tensor != before[name], mask), name
    for name, index in case.norms.items():
        assert (case.model.state_dict()[name][index] == NORM_VALUES[name.split(".")[-1]]).all()
    zeroed = case.columns if outgoing == "zero" else {}
    for name, index in zeroed.items():
        assert (case.model.state_dict()[name][index] == 0).all()
    for name, index in case.rows.items():
        tensor = case.model.state_dict()[name]
        fresh = marked(tensor.shape, index) & ~marked(tensor.shape, zeroed.get(name, []))
        assert ((tensor[fresh] == 0) == name.endswith("bias")).all()
    written = {entry.name: entry for entry in report.written}
    assert {name: entry.elements for name, entry in written.items()} == {
        name: int(mask.sum()) for name, mask in masks.items()
    }
    for name, entry in written.items():
        assert entry.total == before[name].numel()
        assert entry.share == entry.elements / entry.total
        assert entry.kind == ("buffer" if "running" in name else "parameter")


def test_with_outgoing_zero_the_units_have_no_effect(case):
    model = case.model.eval()
    reinit_(model, case.plan)
    with torch.no_grad():
        output = model(case.inputs)
        for name, index in case.rows.items():
            # A column that is zero on purpose stays so.
            parameter = model.get_parameter(name)
            parameter[index] = torch.where(parameter[index] == 0, 0.0, 1e3)
        assert torch.equal(model(case.inputs), output)


def test_the_tensors_themselves_are_written(case):
    pointers = {name: tensor.data_ptr() for name, tensor in case.model.state_dict().items()}
    objects = {name: id(tensor) for name, tensor in case.model.named_parameters()}
    reinit_(case.model, case.plan)
    assert pointers == {n: tensor.data_ptr() for n, tensor in case.model.state_dict().items()}
    assert objects == {name: id(tensor) for name, tensor in case.model.named_parameters()}
    assert all(parameter.requires_grad for parameter in case.model.parameters())


def test_same_seed_same_weights_and_random_state_untouched(case):
    start = snapshot(case.model)
    state = torch.get_rng_state()
    results = []
    for seed in (5, 5, 6):
        case.model.load_state_dict(start)
        torch.manual_seed(seed + len(results))
        reinit_(case.model, case.plan, seed=seed)
        results.append(snapshot(case.model))
    assert identical(results[0], results[1]) and not identical(results[0], results[2])
    torch.set_rng_state(state)
    reinit_(case.model, case.plan)
    assert torch.equal(state, torch.get_rng_state())


# What zeroed columns leave of other live rows changes their mean, so not for "empirical".
@pytest.mark.parametrize("init", ["default", "kaiming_uniform"])
def test_applying_a_plan_twice_gives_the_same(case, init):
    reinit_(case.model, case.plan, init=init)
    once = snapshot(case.model)
    reinit_(case.model, case.plan, init=init)
    assert identical(once, snapshot(case.model))


def test_a_row_does_not_depend_on_which_others_are_drawn():
    torch.manual_seed(0)
    made = mlp()
    start = snapshot(made.model)
    reinit_(made.model, made.plan)
    both = snapshot(made.model)["0.weight"][4]
    made.model.load_state_dict(start)
    reinit_(made.model, replace(made.plan, units={"0": torch.tensor([4])}))
    assert torch.equal(both, snapshot(made.model)["0.weight"][4])


class Interruption(BaseException):
    pass


class Failing:
    """Stands in for what writes, and fails at the call numbered `at`, after or amid the write."""

    def __init__(self, monkeypatch, error: type[BaseException]) -> None:
        self.error, self.calls, self.at, self.late = error, 0, 0, False
        draw, fill = apply_module._draw, apply_module._fill

        def failing_draw(tensors, fresh, seed):
            # A draw that is cut off may leave anything in its regions.
            self.step(
                lambda: draw(tensors, fresh, seed), lambda: draw(tensors, fresh[:1], seed + 1)
            )

        def failing_fill(place, value):
            self.step(lambda: fill(place, value), lambda: fill(place, torch.nan))

        monkeypatch.setattr(apply_module, "_draw", failing_draw)
        monkeypatch.setattr(apply_module, "_fill", failing_fill)

    def step(self, write, cut_off) -> None:
        self.calls += 1
        if self.calls != self.at:
            write()
            return
        (write if self.late else cut_off)()
        raise self.error


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, Interruption])
def test_a_failure_at_any_write_leaves_everything_as_it_was(case, monkeypatch, error):
    before = snapshot(case.model)
    failing = Failing(monkeypatch, error)
    reinit_(case.model, case.plan)
    total = failing.calls
    assert total >= 2 and not identical(snapshot(case.model), before)
    case.model.load_state_dict(before)
    for failing.at in range(1, total + 1):
        for failing.late in (False, True):
            failing.calls = 0
            with pytest.raises(error):
                reinit_(case.model, case.plan)
            assert identical(snapshot(case.model), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype):
    made = convnet()
    made.model.to(dtype).requires_grad_(False)
    reinit_(made.model, replace(made.plan, fingerprint=fingerprint(made.model)))
    weight = made.model[0].weight
    assert weight.dtype == dtype and weight.isfinite().all() and not weight.requires_grad
    assert 0 < weight[[1, 5]].abs().max() <= 1 / math.sqrt(27) + 1e-2
    assert (made.model[3].weight[[0, 1], 1] == 0).all()


def test_channels_last_weights():
    made = convnet()
    other = convnet()
    other.model.load_state_dict(made.model.state_dict())
    other.model.to(memory_format=torch.channels_last)
    reinit_(made.model, made.plan)
    reinit_(other.model, made.plan)
    assert identical(snapshot(made.model), snapshot(other.model))
    assert other.model[3].weight.is_contiguous(memory_format=torch.channels_last)


def test_a_norm_without_parameters_or_statistics():
    made = convnet()
    model = made.model
    model[1] = nn.BatchNorm2d(6, affine=False)
    plan = replace(made.plan, fingerprint=fingerprint(model))
    model[1].running_mean.fill_(3.0)
    reinit_(model, plan)
    assert model[1].running_mean.tolist() == [3, 0, 3, 3, 3, 0]
    model[1] = nn.BatchNorm2d(6, track_running_stats=False)
    nn.init.constant_(model[1].weight, 3.0)
    reinit_(model, replace(made.plan, fingerprint=fingerprint(model)))
    assert model[1].weight.tolist() == [3, 1, 3, 3, 3, 1]


def test_a_plan_from_a_file_does_the_same(tmp_path):
    made = mbconv()
    start = snapshot(made.model)
    reinit_(made.model, made.plan)
    once = snapshot(made.model)
    made.model.load_state_dict(start)
    made.plan.save(tmp_path / "plan.json")
    reinit_(made.model, Plan.load(tmp_path / "plan.json"))
    assert identical(once, snapshot(made.model))


def test_an_empty_plan_writes_nothing():
    made = mlp()
    before = snapshot(made.model)
    report = reinit_(made.model, replace(made.plan, units={}, scores={}))
    assert report.count == 0 and report.written == () and identical(before, snapshot(made.model))


def test_the_report_says_what_was_done():
    made = convnet()
    report = reinit_(made.model, made.plan, init="kaiming_uniform", seed=4)
    assert (report.count, report.layers) == (2, {"0": 2})
    assert (report.init, report.outgoing, report.seed) == ("kaiming_uniform", "zero", 4)
    values = json.loads(json.dumps(report.to_dict()))
    names = [entry["name"] for entry in values["written"]]
    norms = ["1.weight", "1.bias", "1.running_mean", "1.running_var"]
    assert names == ["0.weight", "0.bias", *norms, "3.weight"]
    assert values["written"][0] == {
        "name": "0.weight", "kind": "parameter", "elements": 54, "total": 162, "share": 1 / 3,
    }  # fmt: skip
    assert values["layers"] == {"0": 2} and values["notes"] == []
