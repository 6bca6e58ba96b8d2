"""Units that are broken on purpose are found, planned and re-initialised: these and no others."""

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import nn

import fastplastic

IMAGES = [(torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 2, 3])) for _ in range(2)]


def _wake(model: nn.Module) -> nn.Module:
    """Give layer scales that start near zero a size at which gradients pass."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("gamma", "ls1", "ls2")):
                parameter.fill_(1.0)
    return model.eval()


def _freeze_rows(model: nn.Module, layer: str, rows: list[int]) -> None:
    module: Any = model.get_submodule(layer)
    with torch.no_grad():
        module.weight[rows] = 0
        module.bias[rows] = -30


def resnet() -> tuple[nn.Module, str, list[int], list[Any]]:
    model = timm.create_model("resnet18", num_classes=4, zero_init_last=False)
    units = [3, 17, 18, 40, 63]
    with torch.no_grad():
        # Random weights alone would leave a unit dead.
        model.layer1[0].bn1.bias.fill_(0.5)
        model.layer1[0].bn1.weight[units] = 0
        model.layer1[0].bn1.bias[units] = -1
    return _wake(model), "layer1.0.conv1", units, IMAGES


def vit() -> tuple[nn.Module, str, list[int], list[Any]]:
    model = timm.create_model("vit_tiny_patch16_224", num_classes=4, depth=3, img_size=64)
    _freeze_rows(model, "blocks.2.mlp.fc1", list(range(7)))
    return _wake(model), "blocks.2.mlp.fc1", list(range(7)), IMAGES


def convnext() -> tuple[nn.Module, str, list[int], list[Any]]:
    model = timm.create_model("convnext_atto", num_classes=4)
    _freeze_rows(model, "stages.1.blocks.0.mlp.fc1", [0, 5, 319])
    return _wake(model), "stages.1.blocks.0.mlp.fc1", [0, 5, 319], IMAGES


def bert() -> tuple[nn.Module, str, list[int], list[Any]]:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=48, max_position_embeddings=16, num_labels=4,
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    layer = "bert.encoder.layer.1.intermediate.dense"
    _freeze_rows(model, layer, [1, 2, 47])
    tokens = torch.randint(0, 60, (4, 9))
    mask = torch.ones_like(tokens)
    mask[0, 5:] = 0
    batch = {"input_ids": tokens, "attention_mask": mask, "labels": torch.tensor([0, 1, 2, 3])}
    return _wake(model), layer, [1, 2, 47], [batch]


@pytest.mark.parametrize("build", [resnet, vit, convnext, bert])
def test_planted_units_are_found_and_reset_and_no_others(
    build: Callable[[], tuple[nn.Module, str, list[int], list[Any]]],
) -> None:
    torch.manual_seed(0)
    model, name, units, batches = build()
    found = fastplastic.profile(model, batches)
    assert found[name].dead.nonzero().flatten().tolist() == units
    assert found[name].frozen.nonzero().flatten().tolist() == units

    chosen = fastplastic.plan(found, criterion="dead", threshold=0.0, include=[name])
    assert {layer: rows.tolist() for layer, rows in chosen.units.items()} == {name: units}

    before = _outputs(model, batches)
    fastplastic.reinit_(model, chosen)
    # h is zero everywhere (GELU of -30 is -0.0), so that zeroed outgoing weights change nothing.
    torch.testing.assert_close(_outputs(model, batches), before, rtol=1e-5, atol=1e-6)
    assert not fastplastic.profile(model, batches)[name].dead.any()


def _outputs(model: nn.Module, batches: list[Any]) -> torch.Tensor:
    with torch.no_grad():
        if isinstance(batches[0], dict):
            return torch.cat([model(**batch).logits for batch in batches])
        return torch.cat([model(images) for images, _ in batches])
