"""The table of scores: one entry makes a criterion on every backend."""

import importlib

import numpy as np
import pytest
import torch

from fastplastic.criteria import WEIGHT_CRITERIA
from fastplastic.kernels.scores import SCORES, Score

# NumPy says so of the interpreter of Triton 3.6.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")

DEVICE = {"gpu": "cuda" if torch.cuda.is_available() else "cpu"}


def tensors(device="cpu"):
    generator = torch.Generator().manual_seed(0)
    w, dw = (torch.randn(2, 37, 11, generator=generator) for _ in range(2))
    return [w[0].to(device), w[1].t().to(device)], [dw[0].to(device), dw[1].t().to(device)]


@pytest.mark.parametrize(
    ("name", "expected"),
    [("swr", [3.0, 8.0]), ("gradient", [1.5, 2.0]), ("magnitude", [2.0, 4.0]), ("random", [0, 0])],
)
def test_formulas(name, expected):
    w, dw = torch.tensor([-2.0, 4.0]), torch.tensor([1.5, -2.0])
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        score = SCORES[name].of(w.to(dtype), dw.to(dtype))
        assert score.dtype == torch.float32 and score.tolist() == expected


def test_every_score_is_a_criterion_of_weights():
    assert list(WEIGHT_CRITERIA) == list(SCORES)
    for name, rule in WEIGHT_CRITERIA.items():
        assert rule.formula == SCORES[name].of
        assert (rule.needs == "gradients") == (SCORES[name].dw > 0)


@pytest.mark.parametrize("score", [Score(2, 1), Score(1, 3)])
@pytest.mark.parametrize("backend", ["cpu", "gpu", "reference"])
def test_a_new_entry_is_all_that_a_criterion_needs(monkeypatch, backend, score):
    monkeypatch.setitem(SCORES, "new", score)
    weights, gradients = tensors(DEVICE.get(backend, "cpu"))
    module = importlib.import_module(f"fastplastic.kernels.{backend}.select")
    with np.errstate(all="ignore"):
        chosen = module.select(weights, gradients, ["a", "b"], 100, criterion="new")
        masks = module.selection_masks(chosen, weights, gradients)
    pairs = zip(*tensors(), strict=True)
    scores = torch.cat([(w.abs() ** score.w * dw.abs() ** score.dw).flatten() for w, dw in pairs])
    # No two scores of these are equal.
    limit = scores.kthvalue(100).values
    assert torch.equal(torch.cat([mask.flatten().cpu() for mask in masks]), scores <= limit)
