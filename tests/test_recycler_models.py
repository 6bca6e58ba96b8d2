"""A Recycler on networks with norms, coupled rows, attention and mappings as inputs."""

import pytest
import timm
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel

from fastplastic import Recycler

METHODS = {
    "redo": {"threshold": 0.95, "every": 2},
    "cbp": {"rate": 0.05, "maturity": 1},
    "grama": {"threshold": 0.5, "every": 2},
    "swr": {"threshold": 0.01, "every": 2},
}
MODELS = {
    "resnet18": {"img": 32},
    "mobilenetv2_050": {"img": 32},
    "vit_tiny_patch16_224": {"img": 32, "img_size": 32, "depth": 2},
    "eva02_tiny_patch14_224": {"img": 28, "img_size": 28, "depth": 2},
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MODELS)
def test_image_models(name: str, method: str) -> None:
    torch.manual_seed(0)
    options = dict(MODELS[name])
    side = options.pop("img")
    model = timm.create_model(name, num_classes=3, **options)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    images = torch.randn(8, 3, side, side)
    recycler = Recycler(model, images[:2], optimizer, method, **METHODS[method])
    for _ in range(4):
        optimizer.zero_grad()
        cross_entropy(model(images), torch.arange(8) % 3).backward()
        optimizer.step()
        recycler.step()
    assert recycler.log and not recycler.skipped
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_model_that_takes_a_mapping() -> None:
    torch.manual_seed(0)
    config = GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=50, n_positions=16)
    model = GPT2LMHeadModel(config)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    tokens = torch.randint(50, (4, 12))
    recycler = Recycler(model, {"input_ids": tokens[:2]}, optimizer, "cbp", rate=0.05, maturity=1)
    for _ in range(4):
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        recycler.step()
    assert recycler.log


def test_activation_checkpointing_counts_once() -> None:
    found = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=3)
        model.set_grad_checkpointing(checkpointed)
        optimizer = torch.optim.SGD(model.parameters(), 1e-2)
        images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        recycler = Recycler(
            model, images[:2], optimizer, "custom", criterion="dormant", ratio=0.1, every=2
        )
        for _ in range(4):
            optimizer.zero_grad()
            cross_entropy(model(images), torch.arange(4) % 3).backward()
            optimizer.step()
            recycler.step()
        found.append([reset.to_dict() for reset in recycler.log])
    assert found[0] == found[1] != []


def test_mixed_precision() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    images = torch.randn(8, 8)
    recycler = Recycler(model, images[:2], optimizer, "redo", threshold=0.8, every=2)
    for _ in range(4):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = cross_entropy(model(images), torch.arange(8) % 3)
        loss.backward()
        optimizer.step()
        recycler.step()
    assert recycler.log and not recycler.skipped
