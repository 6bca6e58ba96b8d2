"""Pre-activations and gradients of attention that is one function, against attention by parts."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from helpers import Net
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from fastplastic import Monitor, Profile, profile

E, HEADS = 16, 4
X = torch.randn(3, 5, E, generator=torch.Generator().manual_seed(0))
MEMORY = torch.randn(3, 7, 12, generator=torch.Generator().manual_seed(1))

# Query, key and value of an attention from the model's input.
SOURCES: dict[str, Callable[[Any, Tensor], tuple[Tensor, Tensor, Tensor]]] = {
    "itself": lambda s, x: (x, x, x),
    "crossed": lambda s, x: (s.q(x), (y := s.k(x)), y),
    "of three": lambda s, x: (s.q(x), s.k(x), s.v(x)),
    "other widths": lambda s, x: (x, s.k(x), s.v(x)),
}


def attending(name: str, call: Callable[..., Any] | None = None, **options: Any) -> Net:
    """Return a model with one attention, `call(attention, query, key, value)`."""
    torch.manual_seed(0)
    width = 12 if name == "other widths" else E
    a = nn.MultiheadAttention(E, HEADS, kdim=width, vdim=width, **{"batch_first": True} | options)
    for bias in (a.in_proj_bias, a.out_proj.bias):
        if bias is not None:
            nn.init.normal_(bias)
    call = call or (lambda a, q, k, v: a(q, k, v)[0])
    return Net(
        lambda s, x: call(s.a, *SOURCES[name](s, x)),
        a=a, q=nn.Linear(E, E), k=nn.Linear(E, width), v=nn.Linear(E, width),
    )  # fmt: skip


def projections(a: nn.MultiheadAttention) -> list[tuple[str, Tensor, Tensor | None]]:
    """Return (layer, weight, bias) of the query, the key and the value."""
    none = (None,) * 3
    biases = none if a.in_proj_bias is None else a.in_proj_bias.chunk(3)
    if a.in_proj_weight is not None:
        return [("a.in_proj", w, b) for w, b in zip(a.in_proj_weight.chunk(3), biases, strict=True)]
    weights = [(f"a.{x}_proj", getattr(a, f"{x}_proj_weight")) for x in "qkv"]
    return [(*named, b) for named, b in zip(weights, biases, strict=True)]


def by_parts(model: Net, name: str, x: Tensor, batch_first: bool) -> tuple[Tensor, list[Tensor]]:
    """Return the output, and the projections of query, key and value, each a tensor of its own."""
    z = [
        linear(source, weight, bias).requires_grad_()
        for source, (_, weight, bias) in zip(
            SOURCES[name](model, x), projections(model.a), strict=True
        )
    ]
    for tensor in z:
        tensor.retain_grad()
    rows = [t if batch_first else t.transpose(0, 1) for t in z]
    heads = [t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in rows]
    scores = (heads[0] @ heads[1].transpose(-1, -2) / (E // HEADS) ** 0.5).softmax(-1)
    out = model.a.out_proj((scores @ heads[2]).transpose(1, 2).flatten(2))
    return out if batch_first else out.transpose(0, 1), z


def profiled(model: nn.Module, **options: Any) -> Profile:
    batch = X, torch.zeros(3, 5, dtype=torch.int64)
    loss = options.pop("loss_fn", lambda out, y: out.square().mean())
    return profile(model.eval(), [batch], loss_fn=loss, **options)


def check_values(found: Profile, model: Net, z: list[Tensor], gradients: bool = True) -> None:
    """Compare what was measured with projections, and their gradients."""
    expected: dict[str, dict[str, list[Tensor]]] = {}
    for tensor, (name, _, _) in zip(z, projections(model.a), strict=True):
        rows = tensor.detach().flatten(0, -2).double()
        figures = expected.setdefault(name, {})
        grads = [] if tensor.grad is None else [tensor.grad.flatten(0, -2).double()]
        for key, value in (
            ("sum_abs_h", rows.abs().sum(0)), ("min_h", rows.amin(0)), ("max_h", rows.amax(0)),
            ("n", torch.full((E,), len(rows))),
            *(("sum_abs_g", g.abs().sum(0)) for g in grads),
            *(("sum_sq_g", g.square().sum(0)) for g in grads),
        ):  # fmt: skip
            figures.setdefault(key, []).append(value.double())
    for name, figures in expected.items():
        for key, values in figures.items():
            seen = found[name].stats[key]
            torch.testing.assert_close(seen, torch.cat(values), rtol=1e-4, atol=1e-6, msg=key)
        assert bool((found[name].stats["n_g"] > 0).all()) == gradients, name


@pytest.mark.parametrize("options", [{}, {"batch_first": False}, {"bias": False}], ids=str)
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("name", SOURCES)
def test_what_goes_into_attention(name: str, need_weights: bool, options: dict[str, Any]) -> None:
    call = lambda a, q, k, v: a(q, value=v, key=k, need_weights=need_weights)[0]  # noqa: E731
    model = attending(name, call, **options)
    out, z = by_parts(model, name, X, options.get("batch_first", True))
    torch.testing.assert_close(model(X), out)
    out.square().mean().backward()
    model.zero_grad()
    check_values(profiled(model), model, z)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["itself", "crossed"])
def test_recomputed_attention_counts_once(name: str, reentrant: bool) -> None:
    def call(a: nn.Module, *inputs: Tensor) -> Any:
        run = lambda *x: a(*x)[0]  # noqa: E731
        tracing = torch.compiler.is_exporting()
        return run(*inputs) if tracing else checkpoint(run, *inputs, use_reentrant=reentrant)

    model = attending(name, call)
    if name == "itself":
        # Reentrant checkpointing needs an input with a gradient.
        model._forward = lambda s, x: call(s.a, *(s.q(x),) * 3)
    out, z = by_parts(model, name, model.q(X) if name == "itself" else X, True)
    out.square().mean().backward()
    model.zero_grad()
    check_values(profiled(model), model, z)


def test_rows_without_gradient_have_values() -> None:
    model = attending("itself")
    _, z = by_parts(model, "itself", X, True)
    model.a.in_proj_weight.requires_grad_(False)
    check_values(profiled(model), model, z, gradients=False)
    assert not profiled(model)["a.in_proj"].stats["n_g"].any()


def test_one_tensor_in_the_trace_may_be_three_when_it_runs() -> None:
    def call(a: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Any:
        return a(q, k, v if torch.compiler.is_exporting() else v.clone())[0]

    model = attending("itself", call)
    out, z = by_parts(model, "itself", X, True)
    out.square().mean().backward()
    model.zero_grad()
    check_values(profiled(model), model, z)


def test_training_goes_on_as_without_a_monitor() -> None:
    model = attending("crossed")
    out, z = by_parts(model, "crossed", X, True)
    out.square().mean().backward()
    gradients = []
    for watched in (True, False):
        model.zero_grad()
        with Monitor(model, X) if watched else nullcontext() as monitor:
            model(X).square().mean().backward()
            if monitor is not None:
                check_values(monitor.compute(), model, z)
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == 8 and all(map(torch.equal, *gradients))


def test_a_module_of_two_names_is_skipped_with_the_reason() -> None:
    a = nn.MultiheadAttention(E, HEADS, batch_first=True)
    model = Net(lambda s, x: s.b(*(s.a(x, x, x)[0],) * 3)[0], a=a, b=a)
    (skipped,) = profiled(model).coverage.skipped
    assert skipped[0] == "a.in_proj" and skipped[1].startswith("no hook can see its value")


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("tokens", [5, 7])
def test_padding_counts_neither_in_values_nor_in_gradients(tokens: int, batch_first: bool) -> None:
    """The module turns what is batch first: a gradient has the rows in its order."""
    model = Masked(attending("itself", batch_first=batch_first))
    # Of 5 tokens in 5 samples, both orders have the same shape.
    x = torch.randn(5, tokens, E, generator=torch.Generator().manual_seed(2))
    mask = torch.arange(tokens) < torch.tensor([[5], [1], [4], [2], [3]])
    out, z = by_parts(model.inner, "itself", x, batch_first)
    out.square().mean().backward()
    model.zero_grad()
    with Monitor(model, x) as monitor:
        model(x, attention_mask=mask).square().mean().backward()
    stats = monitor.compute()["inner.a.in_proj"].stats
    for key, values in (("sum_abs_h", z), ("sum_abs_g", [t.grad for t in z])):
        expected = torch.cat([t.detach()[mask].abs().sum(0) for t in values]).double()
        torch.testing.assert_close(stats[key], expected, rtol=1e-4, atol=1e-6, msg=key)


class Masked(nn.Module):
    """A model that takes an attention mask, and leaves out nothing."""

    def __init__(self, inner: Net) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.inner(x)


def test_half_precision() -> None:
    model = attending("itself")
    _, z = by_parts(model, "itself", X, True)
    with torch.autocast("cpu", torch.bfloat16):
        row = profiled(model, loss_fn=lambda out, y: out.float().square().mean())["a.in_proj"]
    assert bool((row.stats["n_g"] > 0).all())
    expected = torch.cat([t.detach().flatten(0, 1).abs().sum(0) for t in z]).double()
    torch.testing.assert_close(row.stats["sum_abs_h"], expected, rtol=0.02, atol=0.02)
