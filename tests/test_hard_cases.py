"""Models and loops that are hard to measure: random branches, reuse, no gradients, no values."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from helpers import Net
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from fastplastic import FastPlasticError, Monitor, Profile, plan, profile, reinit_
from fastplastic.kernels.reference.activation_stats import activation_stats
from fastplastic.kernels.reference.gradient_stats import gradient_stats
from fastplastic.kernels.reference.parameter_stats import parameter_stats
from fastplastic.stats import STATISTICS

# What the rows of a layer's table are about: activations, their gradients, incoming weights.
H, G, W = slice(0, 9), slice(9, 13), slice(13, 21)
# Weights are read as they were in each step with a gradient.
OF_WEIGHTS = {"n_in", "sum_abs_w", "sum_sq_w", "n_out", "sum_abs_w_out", "sum_sq_w_out"}
OTHERS = [row for row, name in enumerate(STATISTICS) if name not in OF_WEIGHTS]


def net(forward, **layers) -> Net:
    """Return the model in eval mode with values that depend on its shapes alone."""
    model = Net(forward, **layers).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.rand(parameter.shape, generator=generator) - 0.4)
    return model


def mlp() -> Net:
    return net(
        lambda s, x: s.head(F.relu(s.b(F.gelu(s.a(x))))),
        a=nn.Linear(6, 8), b=nn.Linear(8, 8), head=nn.Linear(8, 3),
    )  # fmt: skip


def rows(size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, 6, generator=torch.Generator().manual_seed(seed))


def batch(size: int = 16, seed: int = 0) -> tuple[Tensor, Tensor]:
    return rows(size, seed), torch.arange(size) % 3


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """The kernels sum up in float32, the reference in float64."""
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_calls_of_one_module_add_up():
    model = net(
        lambda s, x: s.head(F.relu(s.a(F.relu(s.a(x))))), a=nn.Linear(6, 6), head=nn.Linear(6, 3)
    )
    x, y = batch()
    z = model.a(x)
    both = torch.cat([z, model.a(z.relu())])
    close(profile(model, [(x, y)])["a"].stats.table[H], activation_stats(both, 1, "relu"))


def test_one_activation_module_behind_two_layers():
    """Each layer has its own numbers, although one module with an in-place function makes both."""
    model = net(
        lambda s, x: s.head(s.act(s.b(s.act(s.a(x))))),
        a=nn.Linear(6, 6), b=nn.Linear(6, 8), head=nn.Linear(8, 3), act=nn.ReLU(inplace=True),
    )  # fmt: skip
    x, y = batch()
    found = profile(model, [(x, y)])
    z = model.a(x)
    for name, pre in (("a", z), ("b", model.b(z.relu()))):
        close(found[name].stats.table[H], activation_stats(pre, 1, "relu"))
        assert found[name].hidden.all()


def test_dropout_and_stochastic_depth_in_train_mode():
    model = net(
        lambda s, x: s.head(x + s.path(s.fc2(s.drop(s.act(s.fc1(x)))))),
        fc1=nn.Linear(6, 12), act=nn.GELU(), drop=nn.Dropout(0.4), fc2=nn.Linear(12, 6),
        path=DropPath(0.5), head=nn.Linear(6, 3),
    ).train()  # fmt: skip
    x, y = batch()
    torch.manual_seed(1)
    found = profile(model, [(x, y)])
    torch.manual_seed(1)
    z = model.fc1(x)
    h = model.act(z)
    branch = model.path(model.fc2(model.drop(h)))
    g, dw = torch.autograd.grad(cross_entropy(model.head(x + branch), y), [h, model.fc1.weight])
    assert 0 < (branch == 0).all(1).sum() < 16
    table = found["fc1"].stats.table
    close(table[H], activation_stats(z, 1, "gelu"))
    close(table[G], gradient_stats(g, 1))
    close(table[W], parameter_stats([model.fc1.weight], [dw])[0])
    assert found.mode == "train" and found["fc1"].hidden.all()


def frozen_layer() -> nn.Module:
    model = net(
        lambda s, x: s.head(s.act(s.b(F.relu(s.cut(x))))),
        cut=nn.Linear(6, 8), b=nn.Linear(8, 8), act=nn.ReLU(), head=nn.Linear(8, 3),
    )  # fmt: skip
    model.cut.requires_grad_(False)
    return model


def detached_branch() -> nn.Module:
    return net(
        lambda s, x: s.head(torch.cat([s.act(s.b(x)), F.relu(s.cut(x)).detach()], 1)),
        cut=nn.Linear(6, 8), b=nn.Linear(6, 8), act=nn.ReLU(), head=nn.Linear(16, 3),
    )  # fmt: skip


@pytest.mark.parametrize("criterion", ["gradient", "activation_gradient"])
@pytest.mark.parametrize("build", [frozen_layer, detached_branch])
def test_gradient_criteria_leave_out_a_layer_without_gradient_and_say_so(build, criterion):
    found = profile(build(), [batch()])
    text = "no gradient reached 1 layer (cut): gradient scores are unknown there"
    assert found.notes == (text,)
    made = plan(found, criterion=criterion, ratio=0.5)
    assert set(made.units) == {"b"} and made.eligible == 8
    to_h = criterion == "activation_gradient"
    why = "no gradient to their activation was seen" if to_h else "no gradient reaches them"
    text = f"8 hidden units have no {criterion} score and are left out ({why}): cut"
    if build is frozen_layer:
        text = (
            "8 hidden units are made or read by weights that do not learn (requires_grad=False) "
            "and are left out: to take them, include the full names of their layers, or let the "
            "weights learn: cut"
        )
    # Of the 4 units that half of b is, none is weak.
    assert made.notes[0] == text and len(made.notes) == 2 and "healthy" in made.notes[1]
    with pytest.raises(FastPlasticError, match=f"none of the 8 hidden .* has a {criterion} score"):
        plan(found, criterion=criterion, ratio=0.5, include="cut")
    assert set(plan(found, criterion="dormant", ratio=0.5, include="cut").units) == {"cut"}


def train(scaler: torch.amp.GradScaler | None, overflow: int) -> tuple[Profile, nn.Module]:
    """Train for 3 optimizer steps of 2 micro-batches each; in one micro-batch the loss overflows.

    Without a scaler, that one is only looked at, and its optimizer step is left out by hand.
    """
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Monitor(model, rows(2), grad_scale=scaler) as monitor:
        for micro in range(6):
            look = scaler is None and micro == overflow
            with torch.no_grad() if look else nullcontext():
                x, y = batch(8, micro)
                loss = cross_entropy(model(x), y) / 2
            if scaler is not None:
                scaler.scale(loss * (torch.inf if micro == overflow else 1.0)).backward()
            elif not look:
                loss.backward()
            if micro % 2 == 0:
                continue
            if scaler is not None:
                scaler.step(optimizer)
                scaler.update()
            elif micro // 2 != overflow // 2:
                optimizer.step()
            optimizer.zero_grad()
    return monitor.compute(), model


@pytest.mark.parametrize("overflow", [2, 3])
def test_gradient_accumulation_under_a_grad_scaler(overflow):
    """Scaled and accumulated gradients give the numbers of plain ones; what overflows is dropped.

    All scales are powers of two, so that nothing is rounded.
    """
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1)
    scaled, model = train(scaler, overflow)
    plain, twin = train(None, overflow)
    assert scaler.get_scale() == 2048.0
    assert all(map(torch.equal, model.parameters(), twin.parameters()))
    for layer in plain:
        found, expected = scaled[layer.name].stats.table, layer.stats.table
        torch.testing.assert_close(found[OTHERS], expected[OTHERS], rtol=1e-12, atol=0)
    text = "1 of 6 steps had gradients that are not finite under the loss scale: left out"
    assert scaled.notes == (text,) and plain.notes == ()
    stats = scaled["a"].stats
    assert stats["n"].tolist() == [48] * 8 and stats["n_dw"].tolist() == [5 * 6] * 8


@pytest.mark.parametrize("watch", ["monitor", "profile"])
def test_autocast_to_bfloat16(watch):
    model = net(
        lambda s, x: s.head(F.relu(s.b(s.act(s.a(x))))),
        a=nn.Linear(6, 8), act=nn.GELU(), b=nn.Linear(8, 8), head=nn.Linear(8, 3),
    )  # fmt: skip
    x, y = batch()
    with torch.autocast("cpu", torch.bfloat16):
        if watch == "profile":
            found = profile(model, [(x, y)])
        else:
            with Monitor(model, x[:2]) as monitor:
                cross_entropy(model(x).float(), y).backward()
            found = monitor.compute()
        z = model.a(x)
        h = model.act(z)
        loss = cross_entropy(model.head(F.relu(model.b(h))).float(), y)
    g, dw = torch.autograd.grad(loss, [h, model.a.weight])
    assert (z.dtype, g.dtype, dw.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    table = found["a"].stats.table
    # The reference rounds every h to the dtype, as the network does, the kernel does not.
    close(table[H], activation_stats(z, 1, "gelu"), torch.finfo(z.dtype).eps)
    close(table[G], gradient_stats(g, 1))
    close(table[W], parameter_stats([model.a.weight], [dw])[0])
    assert found.dtype == "float32" and found.notes == ()


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_activations_are_those_without(reentrant):
    """Two checkpoints in a row, with dropout that is repeated in the backward pass."""

    def first(s: Net, x: Tensor) -> Tensor:
        return s.drop1(s.act1(s.a(x)))

    def second(s: Net, x: Tensor) -> Tensor:
        return s.drop2(s.act2(s.b(x)))

    def saving(s: Net, x: Tensor) -> Tensor:
        x = checkpoint(first, s, x, use_reentrant=reentrant)
        return s.head(checkpoint(second, s, x, use_reentrant=reentrant))

    x, y = batch()
    profiles = []
    for forward in (lambda s, x: s.head(second(s, first(s, x))), saving):
        model = net(
            forward, a=nn.Linear(6, 8), act1=nn.ReLU(inplace=True), drop1=nn.Dropout(0.3),
            b=nn.Linear(8, 8), act2=nn.GELU(), drop2=nn.Dropout(0.3), head=nn.Linear(8, 3),
        ).train()  # fmt: skip
        torch.manual_seed(1)
        # Reentrant checkpointing wants an input with a gradient.
        profiles.append(profile(model, [(x.requires_grad_(), y)] * 2, gradients=True))
    plain, saved = profiles
    assert all(torch.equal(layer.stats.table, saved[layer.name].stats.table) for layer in plain)
    assert all(torch.equal(g, saved.gradients[name]) for name, g in plain.gradients.items())
    for name in ("a", "b"):
        assert saved[name].stats["n"].tolist() == saved[name].stats["n_g"].tolist() == [32] * 8
        assert saved[name].hidden.all()
    assert saved.notes == ()


def lazy() -> nn.Module:
    return nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.Linear(8, 3))


def lazy_norm() -> nn.Module:
    norm = nn.LazyBatchNorm1d(affine=False)
    return nn.Sequential(nn.Linear(6, 8), norm, nn.ReLU(), nn.Linear(8, 3))


def on_meta() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).to("meta")


def partly_on_meta() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    model[1].running_var = model[1].running_var.to("meta")
    return model


def profiled(model: nn.Module) -> object:
    return profile(model, [batch()])


def monitored(model: nn.Module) -> object:
    return Monitor(model, rows(2))


def reset(model: nn.Module) -> object:
    whole = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    return reinit_(model, plan(profile(whole, [batch()]), ratio=0.25))


@pytest.mark.parametrize("call", [profiled, monitored, reset])
@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lazy, r"^'0\.weight' is not built yet, expected a built model: run one forward pass firs"),
        (lazy_norm, r"^'1\.running_mean' is not built yet, expected a built model: run one forwar"),
        (on_meta, r"^'0\.weight' is on the meta device, expected real values: load the weights f"),
        (partly_on_meta, r"^'1\.running_var' is on the meta device, expected real values: load th"),
    ],
)
def test_models_without_values_are_refused(build, text, call):
    with pytest.raises(FastPlasticError, match=text):
        call(build())


@pytest.mark.parametrize("call", [profiled, monitored, reset])
def test_the_ways_out_for_models_without_values(call):
    built = lazy()
    built(rows(2))
    loaded = on_meta().to_empty(device="cpu")
    loaded.load_state_dict(built.state_dict())
    assert call(built) is not None and call(loaded) is not None
