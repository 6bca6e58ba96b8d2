"""Re-initialising single weights: what a mask names is drawn afresh, and nothing else."""

import json
from dataclasses import replace

import pytest
import timm
import torch
from helpers import made_plan
from torch import Tensor, nn

from fastplastic import FastPlasticError, Plan, reinit_
from fastplastic.model import fingerprint
from fastplastic.reinit import transaction as apply_module
from fastplastic.wiring import UnitLayer


def mask_of(tensor: Tensor, share: float = 0.3, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(tensor.shape, generator=generator) < share


def layer(model: nn.Module, name: str, kind: str = "linear", unit_dim: int = 0) -> UnitLayer:
    units = model.get_parameter(f"{name}.weight").shape[unit_dim]
    hidden = torch.zeros(units, dtype=torch.bool)
    return UnitLayer(
        name, kind, f"{name}.weight", None, unit_dim, units, None, ((0, units, "relu"),), hidden
    )


def plan_of(model: nn.Module, masks: dict[str, Tensor], layers: list[UnitLayer] = ()) -> Plan:
    wiring = {own.name: own for own in layers}
    return made_plan(
        masks=masks, wiring=wiring, criterion="swr", granularity="weight",
        fingerprint=fingerprint(model),
    )  # fmt: skip


def mlp() -> tuple[nn.Module, Plan]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 50), nn.ReLU(), nn.Linear(50, 30))
    masks = {name: mask_of(model.get_parameter(name)) for name in ("0.weight", "2.weight")}
    return model, plan_of(model, masks, [layer(model, "0"), layer(model, "2")])


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def identical(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], two[name]) for name in one)


def test_what_the_mask_names_is_drawn_afresh_and_nothing_else():
    model, made = mlp()
    before = snapshot(model)
    report = reinit_(model, made)
    for name, value in model.state_dict().items():
        mask = made.masks.get(name, torch.zeros_like(value, dtype=torch.bool))
        assert torch.equal(value[~mask], before[name][~mask])
        assert (value[mask] != before[name][mask]).all()
    bound = 1 / 40**0.5
    fresh = model[0].weight.detach()[made.masks["0.weight"]]
    assert fresh.abs().max() <= bound and fresh.std() == pytest.approx(bound / 3**0.5, rel=0.1)
    assert report.count == made.count == sum(report.layers.values())
    assert [(entry.name, entry.elements) for entry in report.written] == list(made.counts.items())
    assert json.loads(json.dumps(report.to_dict()))["layers"] == made.counts
    assert repr(report) == (
        f"ReinitReport({made.count} weights in 2 tensors: init default, "
        f"{made.count} elements of 2 tensors)"
    )
    assert report.outgoing == "keep"


def test_fresh_values_depend_on_seed_name_and_element_alone():
    model, made = mlp()
    start = snapshot(model)
    reinit_(model, made, seed=5)
    once = snapshot(model)
    model.load_state_dict(start)
    turned = dict(reversed(made.masks.items()))
    reinit_(model, replace(made, masks=turned), seed=5)
    assert identical(once, snapshot(model))
    model.load_state_dict(start)
    less = made.masks["0.weight"] & mask_of(model[0].weight, 0.5, seed=2)
    reinit_(model, replace(made, masks={"0.weight": less}), seed=5)
    assert torch.equal(model[0].weight[less], once["0.weight"][less])
    model.load_state_dict(start)
    reinit_(model, made, seed=6)
    assert not identical(once, snapshot(model))


def test_weights_of_any_strides():
    model, made = mlp()
    other, _ = mlp()
    turned = other[0].weight.detach().t().contiguous().t()
    other[0].weight.data = turned
    assert not other[0].weight.is_contiguous()
    reinit_(model, made)
    optimizer = torch.optim.SGD(other.parameters(), 0.1)
    reinit_(other, made, optimizer=optimizer)
    assert identical(snapshot(model), snapshot(other)) and not other[0].weight.is_contiguous()


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("at", ["_draw", "_fill"])
def test_a_failure_leaves_weights_and_optimizer_as_they_were(monkeypatch, error, at):
    model, made = mlp()
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(8, 40)).square().sum().backward()
    optimizer.step()
    before = snapshot(model)
    kept = {key: value.clone() for key, value in optimizer.state[model[2].weight].items()}
    original = getattr(apply_module, at)

    def failing(*arguments):
        original(*arguments)
        raise error

    monkeypatch.setattr(apply_module, at, failing)
    with pytest.raises(error):
        reinit_(model, made, optimizer=optimizer, reset_steps=True)
    assert identical(before, snapshot(model))
    assert all(torch.equal(kept[key], optimizer.state[model[2].weight][key]) for key in kept)


def test_the_optimizer_forgets_the_fresh_weights_alone():
    model, made = mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(8, 40)).square().sum().backward()
    optimizer.step()
    state = optimizer.state[model[0].weight]
    before = state["exp_avg_sq"].clone()
    report = reinit_(model, made, optimizer=optimizer)
    mask = made.masks["0.weight"]
    assert (state["exp_avg_sq"][mask] == 0).all() and (state["exp_avg"][mask] == 0).all()
    assert torch.equal(state["exp_avg_sq"][~mask], before[~mask]) and before[mask].any()
    kinds = {entry.name: entry.elements for entry in report.written}
    assert kinds["0.weight: exp_avg"] == int(mask.sum())


@pytest.mark.parametrize("init", ["kaiming_normal", "trunc_normal", "empirical", "xavier_uniform"])
def test_initializers(init):
    model, _ = mlp()
    mask = mask_of(model[0].weight)
    with torch.no_grad():
        model[0].weight.mul_(3).add_(1)
        model[0].weight[mask] = 100.0
    live = model[0].weight.detach()[~mask]
    stds = {
        "kaiming_normal": (2 / 40) ** 0.5, "trunc_normal": 0.02, "empirical": float(live.std()),
        "xavier_uniform": (2 / 90) ** 0.5,
    }  # fmt: skip
    reinit_(model, plan_of(model, {"0.weight": mask}, [layer(model, "0")]), init=init)
    fresh = model[0].weight.detach()[mask]
    assert float(fresh.std()) == pytest.approx(stds[init], rel=0.1)
    mean = float(live.mean()) if init == "empirical" else 0.0
    assert float(fresh.mean()) == pytest.approx(mean, abs=0.15 * stds[init])


def test_a_timm_model_gets_the_laws_with_which_timm_begins():
    model = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=10)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0)
    names = ["blocks.0.mlp.fc1.weight", "pos_embed", "cls_token", "blocks.0.norm1.weight",
             "blocks.0.mlp.fc1.bias", "blocks.0.norm1.bias"]  # fmt: skip
    masks = {name: mask_of(model.get_parameter(name), 0.5) for name in names}
    # A wide law asked for weights is not that of norms, embeddings and biases.
    for init in ("default", "kaiming_uniform"):
        own = [layer(model, "blocks.0.mlp.fc1")]
        reinit_(model, plan_of(model, masks, own), init=init)
        fresh = {name: model.get_parameter(name).detach()[masks[name]] for name in names}
        assert float(fresh["pos_embed"].std()) == pytest.approx(0.02, rel=0.05)
        assert 0 < float(fresh["cls_token"].abs().max()) < 1e-4
        assert (fresh["blocks.0.norm1.weight"] == 1).all()
        assert not fresh["blocks.0.mlp.fc1.bias"].any() and not fresh["blocks.0.norm1.bias"].any()
        expected = 0.02 if init == "default" else (2 / 192) ** 0.5
        assert float(fresh["blocks.0.mlp.fc1.weight"].std()) == pytest.approx(expected, rel=0.02)
    assert (model.pos_embed[~masks["pos_embed"]] == 7).all()


class Other(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(20))
        self.fc, self.norm = nn.Linear(4, 20), nn.LayerNorm(20)
        self.tied = nn.Linear(4, 20)
        self.tied.weight = self.fc.weight
        self.register_buffer("mean", torch.zeros(20))


def refused(model: nn.Module, masks: dict[str, Tensor], text: str, **arguments) -> None:
    before = snapshot(model)
    with pytest.raises(FastPlasticError, match=text):
        reinit_(model, plan_of(model, masks), **arguments)
    assert identical(before, snapshot(model))


def test_other_models_get_pytorchs_laws_where_there_are_any():
    model = Other()
    with torch.no_grad():
        model.fc.bias.fill_(7.0)
        model.norm.weight.fill_(7.0)
    everything = torch.ones(20, dtype=torch.bool)
    reinit_(model, plan_of(model, {"fc.bias": everything, "norm.weight": everything}))
    assert 0 < model.fc.bias.abs().max() <= 0.5 and (model.norm.weight == 1).all()
    refused(model, {"table": everything}, "no initial distribution of 'table' is known")


def test_a_plan_for_another_model_is_refused():
    model, made = mlp()
    other = nn.Sequential(*model, nn.Linear(30, 2))
    before = snapshot(other)
    with pytest.raises(FastPlasticError, match="the plan is for the model with fingerprint"):
        reinit_(other, made)
    assert identical(before, snapshot(other))


def test_masks_that_do_not_fit_are_refused():
    model = Other()
    mask = torch.ones(20, dtype=torch.bool)
    both = {"norm.weight": mask, "norm.bias": mask[:3]}
    refused(
        model, both, r"mask of 'norm\.bias' is torch\.bool \(3,\), expected torch\.bool \(20,\)"
    )
    refused(model, {"norm.bias": mask.long()}, r"is torch\.int64 \(20,\), expected torch\.bool")
    refused(model, {"nothing": mask}, "'nothing', which is no parameter or buffer of the model")
    refused(model, {"mean": mask}, "'mean' is a buffer, expected a parameter")
    shared = {"fc.weight": torch.ones(20, 4, dtype=torch.bool)}
    refused(model, shared, r"'fc\.weight' shares its values with 'tied\.weight', expected")
    refused(model, {"norm.bias": mask}, "outgoing 'keep' is for units", outgoing="keep")
