"""A Recycler in the loops that people have: schedules, resuming, errors, what it leaves alone."""

import copy
import gc
import io
import math
from pathlib import Path

import pytest
import torch
from helpers.recycling import batch, network, train
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fastplastic import Recycler
from fastplastic.graph import build_graph

METHODS = {
    "redo": {"every": 20, "threshold": 0.5},
    "cbp": {"rate": 5e-3, "maturity": 10},
    "cbp in windows": {"rate": 5e-3, "maturity": 10, "every": 10, "window": 3},
    "grama": {"every": 20, "threshold": 0.5},
    "swr": {"every": 20, "threshold": 0.05},
    "random": {"every": 20, "ratio": 0.1},
    "custom": {"criterion": "activation_gradient", "every": 20, "ratio": 0.1},
}


def recycler_of(model: nn.Module, optimizer: torch.optim.Optimizer, name: str, **more) -> Recycler:
    method = name.partition(" ")[0]
    return Recycler(model, torch.randn(2, 8), optimizer, method, **METHODS[name], **more)


def values(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Return every parameter and every tensor of the optimizer's state."""
    found = [p.detach().clone() for p in model.parameters()]
    for parameter in model.parameters():
        found += [v.clone() for v in optimizer.state[parameter].values() if torch.is_tensor(v)]
    return found


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("stop", [1, 37, 60])
def test_training_goes_on_from_a_checkpoint_to_the_same_bits(name: str, stop: int) -> None:
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    recycler = recycler_of(model, optimizer, name, seed=3)
    train(model, optimizer, recycler, range(100))
    assert recycler.log
    wanted = values(model, optimizer)

    first = network()
    begun = torch.optim.Adam(first.parameters(), 1e-2)
    before = recycler_of(first, begun, name, seed=3)
    train(first, begun, before, range(stop))
    file = io.BytesIO()
    torch.save([first.state_dict(), begun.state_dict(), before.state_dict()], file)
    file.seek(0)
    weights, state, own = torch.load(file, weights_only=True)

    second = network(seed=9)
    second.load_state_dict(weights)
    resumed = torch.optim.Adam(second.parameters(), 1e-2)
    resumed.load_state_dict(state)
    after = recycler_of(second, resumed, name, seed=3)
    after.load_state_dict(own)
    train(second, resumed, after, range(stop, 100))
    assert all(map(torch.equal, values(second, resumed), wanted))
    assert [r.to_dict() for r in after.log] == [r.to_dict() for r in recycler.log]


@pytest.mark.parametrize("fused", ["plain", "foreach", "fused"])
@pytest.mark.parametrize("name", METHODS)
def test_installed_it_does_the_same_as_called(name: str, fused: str) -> None:
    found = []
    for installed in (False, True):
        model = network()
        option = {} if fused == "plain" else {fused: True}
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2, **option)
        recycler = recycler_of(model, optimizer, name)
        if installed:
            assert recycler.install() is recycler
        train(model, optimizer, recycler, range(60))
        assert recycler.log
        found.append(values(model, optimizer))
        recycler.detach()
    assert all(map(torch.equal, *found))


def test_what_the_optimizer_remembers_of_fresh_weights_begins_anew() -> None:
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    recycler = Recycler(
        model, torch.randn(2, 8), optimizer, "random", ratio=0.2, every=10, outgoing="zero"
    )
    train(model, optimizer, recycler, range(10))
    (reset,) = recycler.log
    for name, units in reset.units.items():
        weight = model[int(name)].weight
        assert not optimizer.state[weight]["exp_avg"][units].any()
        assert not optimizer.state[weight]["exp_avg_sq"][units].any()
        assert optimizer.state[weight]["step"] == 0
        reader = model[int(name) + 2].weight
        assert not reader[:, units].any() and not optimizer.state[reader]["exp_avg"][:, units].any()
    kept = [p for p in model.parameters() if optimizer.state[p]["step"] == 10]
    assert len(kept) == 1  # the bias of the head


def test_nothing_is_on_the_model_in_steps_that_are_not_measured() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    recycler = Recycler(model, torch.randn(2, 8), optimizer, "redo", every=10)

    def hooks() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    seen = []
    for step in range(20):
        seen.append(hooks() > 0)
        train(model, optimizer, recycler, range(step, step + 1))
    assert seen == ([False] * 9 + [True]) * 2
    recycler.detach()
    assert hooks() == 0 and not optimizer._optimizer_step_post_hooks


def test_start_and_end() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    recycler = Recycler(
        model, torch.randn(2, 8), optimizer, "random", ratio=0.2, every=10, start_step=15,
        end_step=45,
    )  # fmt: skip
    train(model, optimizer, recycler, range(100))
    assert [reset.step for reset in recycler.log] == [20, 30, 40]
    assert recycler._next == math.inf


def test_gradients_that_are_accumulated_are_one_step() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    recycler = Recycler(
        model, torch.randn(2, 8), optimizer, "custom", criterion="dormant", ratio=0.1, every=5
    )
    for step in range(20):
        images, labels = batch(step)
        cross_entropy(model(images), labels).backward()
        if step % 4 == 3:
            optimizer.step()
            optimizer.zero_grad()
        recycler.step()
    assert recycler.steps == 5 and [reset.step for reset in recycler.log] == [5]
    assert recycler.skipped == {"step() without a step of the optimizer: waited for it": 15}


def test_evaluation_in_between_is_not_measured() -> None:
    found = []
    for evaluates in (False, True):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        recycler = Recycler(model, torch.randn(2, 8), optimizer, "redo", every=1, threshold=0.3)
        for step in range(10):
            if evaluates:
                with torch.no_grad():
                    model(torch.full((64, 8), 5.0))
            train(model, optimizer, recycler, range(step, step + 1))
        found.append([reset.to_dict() for reset in recycler.log])
    assert found[0] == found[1] != []


def test_copies_get_the_same_elements() -> None:
    model = network()
    target = copy.deepcopy(model)
    average = torch.optim.swa_utils.AveragedModel(model)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    recycler = Recycler(
        model, torch.randn(2, 8), optimizer, "random", ratio=0.2, every=10,
        sync=[target, average],
    )  # fmt: skip
    before = {name: p.detach().clone() for name, p in target.named_parameters()}
    train(model, optimizer, recycler, range(10))
    (reset,) = recycler.log
    for other in (target, average.module):
        own = dict(other.named_parameters())
        for name, units in reset.units.items():
            weight = f"{name}.weight"
            assert torch.equal(own[weight][units], model[int(name)].weight[units])
            assert not own[f"{int(name) + 2}.weight"][:, units].any()
    name = next(iter(reset.units))
    units = reset.units[name]
    kept = [u for u in range(len(before[f"{name}.bias"])) if u not in units.tolist()]
    assert torch.equal(target[int(name)].bias[kept], before[f"{name}.bias"][kept])


def test_batches_of_their_own_are_measured() -> None:
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    images, labels = batch(99)
    recycler = Recycler(
        model, torch.randn(2, 8), optimizer, "redo", every=10, threshold=0.5,
        batches=lambda: [(images, labels)],
    )  # fmt: skip
    train(model, optimizer, recycler, range(9))
    images_now, labels_now = batch(9)
    optimizer.zero_grad()
    cross_entropy(model(images_now), labels_now).backward()
    optimizer.step()
    with torch.no_grad():
        h = model[:2](images).double()
    wanted = (h.abs().mean(0) / (h.abs().mean() + 1e-9) <= 0.5).nonzero().flatten()
    gradients = [p.grad.clone() for p in model.parameters()]
    reset = recycler.step()
    assert torch.equal(reset.units["0"], wanted) and len(wanted)
    assert all(map(torch.equal, (p.grad for p in model.parameters()), gradients))


def test_a_loss_that_is_not_a_number_is_counted_and_skipped() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    recycler = Recycler(model, torch.randn(2, 8), optimizer, "random", ratio=0.2, every=5)
    weights = copy.deepcopy(model.state_dict())
    for step in range(10):
        images, labels = batch(step)
        optimizer.zero_grad()
        factor = math.nan if step == 4 else 1.0
        (cross_entropy(model(images), labels) * factor).backward()
        optimizer.step()
        recycler.step()
        if step == 4:
            model.load_state_dict(weights)
    assert recycler.skipped == {"gradients are NaN or infinite": 1}
    assert [reset.step for reset in recycler.log] == [10]


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_a_grad_scaler_skips(fused: bool) -> None:
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    recycler = Recycler(
        model, torch.randn(2, 8), optimizer, "custom", criterion="gradient", ratio=0.2, every=5
    ).install()
    for step in range(10):
        images, labels = batch(step)
        optimizer.zero_grad()
        factor = math.inf if step == 4 else 1.0
        scaler.scale(cross_entropy(model(images), labels) * factor).backward()
        scaler.step(optimizer)
        scaler.update()
    # A fused optimizer is called for the step that is skipped, another is not.
    assert recycler.steps == (10 if fused else 9)
    assert [reset.step for reset in recycler.log] == ([10] if fused else [5])
    assert recycler.skipped == ({"gradients are NaN or infinite": 1} if fused else {})
    assert all(p.isfinite().all() for p in model.parameters())


def test_resets_that_take_the_same_again_are_told_of() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    recycler = Recycler(
        model, torch.randn(2, 8), optimizer, "custom", criterion="contribution", ratio=0.2, every=2
    )
    with pytest.warns(
        UserWarning, match="3 times in a row more than 90% of what is re-init"
    ) as seen:
        train(model, optimizer, recycler, range(20))
    # The line of the loop, and not one inside.
    assert [Path(warning.filename).name for warning in seen] == ["recycling.py"]
    assert recycler.log[-1].overlap == 1.0


def test_two_that_measure_at_overlapping_times_leave_compiled_code_compiled() -> None:
    from torch._dynamo import eval_frame

    gc.collect()  # those of other tests may still be measuring
    first, second = network(), network(1)
    optimizers = [torch.optim.SGD(model.parameters(), 0.1) for model in (first, second)]
    # One measures step 2, the other steps 2 to 4.
    recyclers = [
        Recycler(first, torch.randn(2, 8), optimizers[0], "random", ratio=0.1, every=2, end_step=2),
        Recycler(second, torch.randn(2, 8), optimizers[1], rate=0.01, every=4, window=3),
    ]
    seen = []
    for step in range(4):
        for three in zip((first, second), optimizers, recyclers, strict=True):
            train(*three, range(step, step + 1))
        seen.append(eval_frame._stance.stance)
    assert seen == ["force_eager"] * 3 + ["default"]


def test_a_wiring_that_is_known_is_not_traced_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    graph = build_graph(model, torch.randn(2, 8))
    monkeypatch.delattr("fastplastic.training.checks.build_graph")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Recycler(model, graph, optimizer, "random", ratio=0.2, every=5) as recycler:
        train(model, optimizer, recycler, range(5))
    assert len(recycler.log) == 1
