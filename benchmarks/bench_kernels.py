"""Kernels against one plain read of the same memory, naive torch and torch.compile.

pytest benchmarks/bench_kernels.py --benchmark-json results.json
"""

from functools import partial

import interleaved
import naive
import pytest
import timm
import torch
from interleaved import DEVICE, GPU, compare, noise
from torch import Tensor

from fastplastic import kernels
from fastplastic.kernels.reference import activation_stats as reference
from fastplastic.kernels.reference import pieces

FUNCTIONS = {
    "identity": lambda z: z, "relu": torch.relu, "gelu": torch.nn.functional.gelu,
    "silu": torch.nn.functional.silu,
}  # fmt: skip
BATCHES = (64, 256) if GPU else (8, 64)
# (channels, height, width) of ResNet-50's layers and (tokens, channels) of ViT-B's.
PLANES = ((64, 112, 112), (256, 56, 56), (512, 28, 28), (1024, 14, 14), (2048, 7, 7))
TOKENS = ((197, 768), (197, 3072))
SHAPES = [(batch, *rest) for batch in BATCHES for rest in (*PLANES, *TOKENS)]
DTYPES = (torch.float32, torch.bfloat16) if GPU else (torch.float32,)


def axis_of(shape: tuple[int, ...]) -> int:
    return 1 if len(shape) == 4 else 2


def out_of_place(z: Tensor, axis: int, name: str) -> Tensor:
    """The oracle as one expression, for torch.compile."""
    return reference._activation_piece(z.movedim(axis, 1).flatten(2), name)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_activation_stats(benchmark, shape, dtype, name):
    z, axis = noise(*shape, dtype=dtype), axis_of(shape)
    benchmark.extra_info["MB"] = round(z.numel() * z.element_size() / 1e6, 1)
    out = kernels.activation_stats(z, axis, name)
    rivals = {"sum": z.sum}
    if GPU:
        target = torch.empty_like(z)
        rivals["copy"] = partial(target.copy_, z)
    compare(benchmark, partial(kernels.activation_stats, z, axis, name, out=out), rivals)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradient_stats(benchmark, shape):
    g, axis = noise(*shape), axis_of(shape)
    benchmark.extra_info["MB"] = round(g.numel() * g.element_size() / 1e6, 1)
    out = kernels.gradient_stats(g, axis)
    compare(benchmark, partial(kernels.gradient_stats, g, axis, out=out), {"sum": g.sum})


@pytest.mark.parametrize("layout", ["channels_last", "transposed"])
def test_other_layouts(benchmark, layout):
    if layout == "channels_last":
        z = noise(BATCHES[1], 256, 56, 56).contiguous(memory_format=torch.channels_last)
    else:
        z = noise(BATCHES[1], 768, 197).transpose(1, 2)
    axis = axis_of(tuple(z.shape))
    out = kernels.activation_stats(z, axis, "relu")
    compare(benchmark, partial(kernels.activation_stats, z, axis, "relu", out=out), {"sum": z.sum})


@pytest.mark.parametrize("name", ["relu", "gelu"])
def test_rivals(benchmark, monkeypatch, name):
    """The same statistics by naive torch operations and by torch.compile of the oracle."""
    shape = (BATCHES[0], 256, 56, 56)
    z = noise(*shape)
    monkeypatch.setattr(pieces, "_all_finite", lambda x: False)
    compiled = torch.compile(out_of_place, dynamic=False)
    out = kernels.activation_stats(z, 1, name)
    compare(
        benchmark,
        partial(kernels.activation_stats, z, 1, name, out=out),
        {
            "naive": partial(naive.activation_stats, z, 1, FUNCTIONS[name]),
            "torch.compile": partial(compiled, z, 1, name),
            "sum": z.sum,
        },
    )


def weights_of(model: str) -> tuple[list[str], list[Tensor], list[Tensor]]:
    with torch.device(DEVICE):
        named = timm.create_model(model).named_parameters()
    pairs = [(name, p.detach()) for name, p in named if p.ndim > 1 and min(p.shape[:2]) > 1]
    weights = [weight for _, weight in pairs]
    generator = torch.Generator(DEVICE).manual_seed(1)
    gradients = [torch.randn(w.shape, generator=generator, device=DEVICE) * 1e-3 for w in weights]
    return [name for name, _ in pairs], weights, gradients


@pytest.mark.parametrize("model", ["resnet50", "vit_base_patch16_224"])
def test_parameter_stats(benchmark, model):
    _, weights, gradients = weights_of(model)
    out = kernels.parameter_stats(weights, gradients)
    benchmark.extra_info["MB"] = round(sum(w.numel() * 8 for w in weights) / 1e6, 1)

    def read() -> None:
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.sum()
            gradient.sum()

    compare(
        benchmark, partial(kernels.parameter_stats, weights, gradients, out=out), {"read": read}
    )


@pytest.mark.parametrize("model", ["resnet50", "vit_large_patch16_224"])
def test_select_and_resample(benchmark, model):
    """The 5 % of all weights with the smallest abs(w dw) drawn afresh, against torch.topk."""
    names, weights, gradients = weights_of(model)
    total = sum(weight.numel() for weight in weights)
    count = total // 20
    laws = [kernels.Law("normal", 0.0, 0.02)] * len(weights)

    def ours() -> None:
        chosen = kernels.select(weights, gradients, names, count)
        masks = kernels.selection_masks(chosen, weights, gradients)
        kernels.resample_(weights, names, laws, masks=masks)

    def scores() -> Tensor:
        pairs = zip(weights, gradients, strict=True)
        return torch.cat([(weight * gradient).abs().flatten() for weight, gradient in pairs])

    def by_topk() -> None:
        scores = torch.cat(
            [(w * d).abs().flatten() for w, d in zip(weights, gradients, strict=True)]
        )
        chosen = torch.topk(scores, count, largest=False).indices
        start = 0
        for weight in weights:
            here = chosen[(chosen >= start) & (chosen < start + weight.numel())] - start
            weight.view(-1)[here] = torch.randn(len(here), device=DEVICE) * 0.02
            start += weight.numel()

    def by_kthvalue() -> None:
        scores = torch.cat(
            [(w * d).abs().flatten() for w, d in zip(weights, gradients, strict=True)]
        )
        limit = torch.kthvalue(scores, count).values
        for weight, gradient in zip(weights, gradients, strict=True):
            mask = (weight * gradient).abs() <= limit
            weight[mask] = torch.randn(int(mask.sum()), device=DEVICE) * 0.02

    benchmark.extra_info["million weights"] = round(total / 1e6, 1)
    rivals = {"topk": by_topk, "kthvalue": by_kthvalue}
    for name, function in {"ours": ours, **rivals}.items():
        function()
        benchmark.extra_info[f"extra MB {name}"] = round(interleaved.extra_memory(function), 1)
    compare(benchmark, ours, rivals)
