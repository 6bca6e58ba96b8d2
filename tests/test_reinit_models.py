"""`reinit_` on timm models with the wiring that `build_graph` finds."""

import math

import pytest
import timm
import torch
from helpers import plan_of_units
from torch import Tensor, nn

from fastplastic.errors import FileError
from fastplastic.graph import build_graph
from fastplastic.reinit import reinit_
from fastplastic.wiring import UnitGraph


def traced(name: str, size: int, **options) -> tuple[nn.Module, UnitGraph, Tensor]:
    torch.manual_seed(0)
    model = timm.create_model(name, **options).eval()
    images = torch.randn(2, 3, size, size)
    return model, build_graph(model, images), images


def some_of_each(graph: UnitGraph) -> dict[str, list[int]]:
    """Return every third hidden unit of every layer."""
    hidden = {layer.name: layer.hidden.nonzero().flatten().tolist() for layer in graph.layers}
    return {name: units[::3] for name, units in hidden.items() if units}


MODELS = {
    "resnet18": (64, {}),
    "vit_tiny_patch16_224": (32, {"img_size": 32, "depth": 2}),
    "mobilenetv3_small_050": (64, {}),
}


@pytest.mark.parametrize("name", MODELS)
def test_reset_units_of_a_real_model_have_no_effect_and_the_right_law(name):
    size, options = MODELS[name]
    model, graph, images = traced(name, size, **options)
    plan = plan_of_units(model, graph.layers, some_of_each(graph))
    report = reinit_(model, plan)
    assert report.notes == () and report.count == plan.count > 100
    fresh = timm.create_model(name, **options)
    with torch.no_grad():
        output = model(images)
        assert output.isfinite().all() and output.std() > 0
        for layer_name, units in plan.units.items():
            weight = model.get_parameter(f"{layer_name}.weight")
            rows = weight[units]
            # Columns that belong to other reset units are zero; the rest follows the law.
            drawn, law = rows[rows != 0], fresh.get_parameter(f"{layer_name}.weight")
            slack = 6 / math.sqrt(min(drawn.numel(), law.numel()))
            assert abs(drawn.std() / law.std() - 1) < slack
            assert abs(drawn.mean()) < slack * law.std()
            weight[units] = torch.where(rows == 0, 0.0, rows + 10.0)
        assert torch.equal(model(images), output)


def test_resetting_dead_units_leaves_a_resnet_as_it_was():
    model, graph, images = traced("resnet18", 64)
    with torch.no_grad():
        model.layer1[0].bn1.weight[:5] = 0
        model.layer1[0].bn1.bias[:5] = -1
        before = model(images)
        plan = plan_of_units(model, graph.layers, {"layer1.0.conv1": [0, 1, 2, 3, 4]})
        reinit_(model, plan)
        assert torch.allclose(model(images), before, rtol=1e-5, atol=1e-5)
        assert (model.layer1[0].conv2.weight[:, :5] == 0).all()
        assert (model.layer1[0].bn1.weight[:5] == 1).all()


def test_resetting_dead_units_leaves_a_transformer_as_it_was():
    size, options = MODELS["vit_tiny_patch16_224"]
    model, graph, images = traced("vit_tiny_patch16_224", size, **options)
    with torch.no_grad():
        model.blocks[1].mlp.fc1.weight[:7] = 0
        model.blocks[1].mlp.fc1.bias[:7] = -30
        before = model(images)
        plan = plan_of_units(model, graph.layers, {"blocks.1.mlp.fc1": list(range(7))})
        reinit_(model, plan)
        assert torch.allclose(model(images), before, rtol=1e-5, atol=1e-5)
        assert (model.blocks[1].mlp.fc1.bias[:7] == 0).all()
        assert model.blocks[1].mlp.fc1.weight[:7].std() == pytest.approx(0.02, rel=0.1)


def test_value_channels_of_an_attention_are_reset_in_the_fused_projection():
    size, options = MODELS["vit_tiny_patch16_224"]
    model, graph, _ = traced("vit_tiny_patch16_224", size, **options)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plan = plan_of_units(model, graph.layers, {"blocks.0.attn.qkv": [384 + 5]})
    reinit_(model, plan)
    changed = {n: t != before[n] for n, t in model.state_dict().items() if (t != before[n]).any()}
    assert set(changed) == {"blocks.0.attn.qkv.weight", "blocks.0.attn.proj.weight"}
    assert changed["blocks.0.attn.qkv.weight"].any(1).nonzero().flatten().tolist() == [389]
    assert changed["blocks.0.attn.proj.weight"].any(0).nonzero().flatten().tolist() == [5]
    with pytest.raises(FileError, match=r"units of 'blocks\.0\.attn\.qkv' are not hidden"):
        reinit_(model, plan_of_units(model, graph.layers, {"blocks.0.attn.qkv": [5]}))
