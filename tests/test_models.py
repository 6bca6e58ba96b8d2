"""Models by name, with random weights or those of a file; heads on loan."""

import random

import numpy as np
import pytest
import timm
import torch
from torch import nn

from fastplastic.errors import FileError, InputError
from fastplastic.files.checkpoint import save_state_dict
from fastplastic.model import LentHead, fingerprint, loss_head
from fastplastic.sources import create_model

TINY = "test_resnet"


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([value.flatten().double() for value in model.state_dict().values()])


def rng_state() -> tuple:
    numpy = np.random.get_state()
    return torch.get_rng_state().tolist(), random.getstate(), numpy[1].tolist(), numpy[2]


# Random weights and arguments


def test_random_weights_depend_on_the_seed_alone():
    before = rng_state()
    loaded = create_model(TINY, pretrained=False)
    assert rng_state() == before
    assert (loaded.name, loaded.weights, loaded.warning) == (TINY, "random", None)
    torch.rand(3)
    assert torch.equal(weights(create_model(TINY, pretrained=False).model), weights(loaded.model))
    other = create_model(TINY, pretrained=False, seed=1).model
    assert not torch.equal(weights(other), weights(loaded.model))


@pytest.mark.parametrize(
    ("sizes", "channels"),
    [
        ({"img_size": 64}, 3),
        ({"in_chans": 1, "img_size": (32, 64)}, 1),
        ({"input_size": (2, 32, 64)}, 2),
        ({"input_size": (2, 32, 64), "in_chans": 2, "img_size": (32, 64)}, 2),
    ],
)
@pytest.mark.parametrize("name", [TINY, "test_vit"])
def test_sizes(name, sizes, channels):
    model = create_model(name, pretrained=False, num_classes=5, **sizes).model.eval()
    side = sizes.get("input_size", (0, 0, 0))[1:]
    side = sizes.get("img_size", side)
    side = (side, side) if isinstance(side, int) else side
    assert model(torch.zeros(1, channels, *side)).shape == (1, 5)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "resnet5O",
            "unknown model 'resnet5O': expected the name of a timm model: did you mean resn",
        ),
        (
            "RESNET50",
            "unknown model 'RESNET50': expected the name of a timm model: did you mean resn",
        ),
        (
            "qqqqqqqq",
            "unknown model 'qqqqqqqq': expected the name of a timm model: timm.list_models",
        ),
        ("", "unknown model '': expected the name of a timm model"),
        (
            "timm/resnet18",
            "unknown model 'timm/resnet18': expected NAME, torchvision:NAME, hf:FOLDER, pa",
        ),
        ("hub:res/net", "unknown model 'hub:res/net': expected NAME, torchvision:NAME, hf:FOLDER"),
        ("hf-hub:", "unknown model 'hf-hub:': expected"),
        ("hf-hub:a/b/c", "hf-hub:a/b/c: no name of a repository: expected hf-hub:OWNER/NAME"),
        (
            "resnet18.nope",
            "unknown weights 'nope' of resnet18: expected a tag of that model: did you mean",
        ),
    ],
)
def test_unknown_names(name, text):
    with pytest.raises(InputError) as error:
        create_model(name, pretrained=None)
    assert str(error.value).startswith(text)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"model_kwargs": {"fo": 1}}, "test_vit cannot be made with fo=1 (TypeError: "),
        ({"model_kwargs": {"embed_dim": 7}}, "test_vit cannot be made with embed_dim=7 (Assertion"),
        ({"num_classes": -1}, "num_classes -1: expected 0 (no head) or more: correct it"),
        ({"img_size": 0}, "img_size (0, 0): expected numbers above 0"),
        ({"in_chans": 0}, "in_chans 0: expected numbers above 0"),
        ({"input_size": (3, 8, -8)}, "img_size (8, -8): expected numbers above 0"),
        (
            {"input_size": (3, 8, 8), "img_size": 9},
            "input size (3, 8, 8) contradicts in_chans None or img_size 9: give (channels, height",
        ),
        (
            {"checkpoint": "a.pth", "pretrained": True},
            "test_vit: pretrained and checkpoint both name weights: give one of them",
        ),
    ],
)
def test_bad_arguments(arguments, text):
    with pytest.raises(InputError) as error:
        create_model("test_vit", **{"pretrained": False} | arguments)
    assert str(error.value).startswith(text)
    assert "\n" not in str(error.value)


def test_checkpoint(tmp_path):
    model = create_model(TINY, pretrained=False, seed=5).model
    path = tmp_path / "a.safetensors"
    save_state_dict(path, model)
    loaded = create_model(TINY, checkpoint=path)
    assert loaded.weights == f"checkpoint: {path}"
    assert torch.equal(weights(loaded.model), weights(model))
    with pytest.raises(FileError, match="does not fit the model"):
        create_model("test_vit", checkpoint=path)


# Heads on loan


def modules(model: nn.Module) -> dict[str, int]:
    return {name: id(module) for name, module in model.named_modules(remove_duplicate=False)}


@pytest.mark.parametrize(
    ("name", "heads"),
    [
        ("test_resnet", ("fc",)),
        ("test_convnext", ("head.fc",)),
        ("test_nfnet", ("head.fc",)),
        ("resnetv2_18", ("head.fc",)),
        ("levit_conv_128s", ("head.linear", "head_dist.linear")),
        ("deit_tiny_distilled_patch16_224", ("head", "head_dist")),
        ("crossvit_9_240", ("head.0", "head.1")),
        ("poolformerv2_s12", ("head.fc",)),
        ("caformer_s18", ("head.fc.fc2",)),
        ("volo_d1_224", ("aux_head", "head")),
    ],
)
def test_loss_head(name, heads):
    with torch.device("meta"):
        model = timm.create_model(name, drop_path_rate=0.0).eval()
    model.half()
    before, inputs = modules(model), torch.empty(2, *model.pretrained_cfg["input_size"])
    own = fingerprint(model)
    with loss_head(model, 7) as lent:
        assert lent == LentHead(heads, own)
        for head in heads:
            layer, old = model.get_submodule(head), before[head]
            assert id(layer) != old
            assert (layer.weight.device.type, layer.weight.dtype) == ("meta", torch.half)
            assert not layer.training
        assert model(inputs.half().to("meta")).shape == (2, 7)
    assert modules(model) == before


def test_loss_head_is_drawn_from_its_seed_alone():
    model = create_model(TINY, pretrained=False).model
    inputs = torch.rand(2, 3, 32, 32)
    outputs = []
    for seed in (0, 0, 1):
        before = rng_state()
        with loss_head(model, 7, seed):
            assert rng_state() == before
            assert model.fc.weight.abs().max() <= model.fc.in_features**-0.5
            assert model.fc.weight.std() > 0.5 * model.fc.in_features**-0.5
            outputs.append(model.eval()(inputs))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize("raised", [ValueError, KeyboardInterrupt])
def test_loss_head_is_taken_back_after_an_exception(raised):
    model = create_model(TINY, pretrained=False).model
    before, head = modules(model), model.fc
    with pytest.raises(raised), loss_head(model, 7):
        raise raised
    assert modules(model) == before
    assert model.fc is head


def test_a_head_that_stands_in_two_places():
    model = create_model(TINY, pretrained=False).model
    model.again = model.fc
    with loss_head(model, 7) as lent:
        assert set(lent.layers) == {"fc", "again"}
        assert model.again is model.fc


@pytest.mark.parametrize(
    "model", [timm.create_model(TINY, num_classes=0), nn.Linear(2, 2)], ids=["headless", "foreign"]
)
def test_models_without_a_classifier(model):
    with pytest.raises(InputError) as error, loss_head(model, 7):
        raise AssertionError("not reached")
    assert str(error.value) == (
        f"{type(model).__name__} has no classifier that could be replaced for these data, expected "
        "a Linear or a convolution: give the model a head with --num-classes"
    )
