"""Texts that a fresh reader stumbled over."""

import io

import pytest
import torch
from helpers import Net
from rich.console import Console
from torch import nn
from torch.nn.functional import cross_entropy

from fastplastic import profile
from fastplastic.cli import render
from fastplastic.cli.render import LayerRow, Report
from fastplastic.errors import InputError
from fastplastic.model import Batch, loss_of


def test_logits_of_tokens_are_not_taken_for_classes():
    model = Net(lambda own, x: own.layer(x), layer=nn.Linear(4, 9))
    tokens = torch.randint(0, 9, (2, 6))
    with pytest.raises(
        InputError, match=r"\(2, 6, 9\) for targets of shape \(2, 6\) look like"
    ) as e:
        profile(model, [(torch.randn(2, 6, 4), tokens)])
    assert "yield mappings with 'labels'" in str(e.value) and "own loss_fn" in str(e.value)


def test_classes_of_positions_are_still_taken():
    model = nn.Identity()
    logits, targets = torch.randn(2, 9, 6), torch.randint(0, 9, (2, 6))
    found = loss_of(model, Batch((logits,), {}, targets, False), cross_entropy)
    assert found == cross_entropy(logits, targets)
    # As many tokens as classes: nothing tells them apart.
    logits, targets = torch.randn(2, 6, 6), torch.randint(0, 6, (2, 6))
    found = loss_of(model, Batch((logits,), {}, targets, False), cross_entropy)
    assert found == cross_entropy(logits, targets)


def test_a_model_without_weight_layers():
    model = Net(lambda own, x: own.norm(x), norm=nn.LayerNorm(4))
    with pytest.raises(
        InputError, match="no linear or convolution layer, expected at least one: pas"
    ):
        profile(model, [(torch.randn(3, 4), torch.tensor([0, 1, 2]))])


@pytest.mark.parametrize(("fixed", "shown"), [(True, False), (False, True)])
def test_resettable_layers_come_first_only_where_there_are_any(fixed, shown):
    sick = LayerRow("conv", "conv", "relu", 64, 0, 12, 0, 0, 0, 0.5, 0.1, 1e-6, fixed=fixed)
    report = Report((), (sick,), tau=0.025, saturated=0.95, found=1, skipped=(), fixed=())
    console = Console(file=io.StringIO(), width=200)
    console.print(render.summary(report))
    words = " ".join(console.file.getvalue().split())
    assert ("resettable ones first" in words) == shown
    assert "conv 12 of 64" in words
