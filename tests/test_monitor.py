"""The monitor in a user's own loop, against statistics taken by hand."""

import copy

import pytest
import torch
from helpers.monitored import by_hand, close, inputs, like, net, step
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.checkpoint import checkpoint

import fastplastic
from fastplastic import Monitor
from fastplastic.errors import InputError
from fastplastic.stats import STATISTICS


def traces(model):
    """Everything a hook or an attribute could be left in."""
    sizes = [
        (len(value) if isinstance(value, dict) else None, key)
        for module in model.modules()
        for key, value in sorted(vars(module).items())
    ]
    hooks = [len(p._backward_hooks or {}) for p in model.parameters()]
    return sizes, hooks


def test_statistics_of_two_steps():
    model = net()
    with Monitor(model, inputs(9, 2)) as monitor:
        step(model, 1)
        step(model, 2)
    profile = monitor.compute()
    close(profile, by_hand(model, [1, 2]))
    assert (profile.samples, profile.batches, profile.mode) == (32, 2, "eval")
    assert profile.coverage.measured == profile.coverage.found == 3


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_activations_count_once(reentrant):
    model = net(recompute=reentrant)
    with Monitor(model, inputs(9, 2)) as monitor:
        # Reentrant checkpointing wants an input with a gradient.
        model(inputs(1).requires_grad_()).square().mean().backward()
    close(monitor.compute(), by_hand(model, [1]))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint_around_the_whole_model(reentrant):
    model = net()
    with Monitor(model, inputs(9, 2)) as monitor:
        x = inputs(1).requires_grad_()
        checkpoint(model, x, use_reentrant=reentrant).square().mean().backward()
    profile = monitor.compute()
    close(profile, by_hand(model, [1]))
    assert profile.batches == 1


def test_training_is_bit_identical_with_a_monitor():
    """Dropout draws, momentum, everything."""

    def train(model, around):
        torch.manual_seed(3)
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        model.train()
        with around:
            for seed in range(4):
                optimizer.zero_grad()
                step(model, seed)
                optimizer.step()
        return [p.detach().clone() for p in model.parameters()]

    plain = train(net(), torch.enable_grad())
    model = net()
    monitored = train(model, Monitor(model, inputs(9, 2)))
    assert all(torch.equal(a, b) for a, b in zip(plain, monitored, strict=True))


def test_making_one_and_leaving_one_changes_nothing():
    model = net().train()
    before, state = traces(model), copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    monitor = Monitor(model, inputs(9, 2))
    assert torch.equal(torch.get_rng_state(), random)
    assert traces(model) == before
    with pytest.raises(ZeroDivisionError), monitor:
        step(model)
        assert traces(model) != before
        raise ZeroDivisionError
    assert traces(model) == before
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert model.training


def test_gradients_are_those_of_one_backward_and_grad_is_left_alone():
    """Accumulation over two backward passes: the second is not counted with the first."""
    model, plain = net(), net()
    with Monitor(model, inputs(9, 2)) as monitor:
        step(model, 1)
        model.fc1.weight.grad.mul_(1000)
        step(model, 2)
    close(monitor.compute(), by_hand(model, [1, 2]))
    step(plain, 1)
    plain.fc1.weight.grad.mul_(1000)
    step(plain, 2)
    assert torch.equal(model.fc1.weight.grad, plain.fc1.weight.grad)


def test_every():
    model = net()
    with Monitor(model, inputs(9, 2), every=3) as monitor:
        for seed in range(7):
            step(model, seed)
    close(monitor.compute(), by_hand(model, [0, 3, 6]))
    assert monitor.compute().batches == 3


def test_pause_resume_reset_detach():
    model = net()
    monitor = Monitor(model, inputs(9, 2))
    step(model, 0)
    monitor.attach()
    step(model, 1)
    with monitor.pause():
        step(model, 2)
    monitor.pause()
    step(model, 3)
    monitor.resume()
    monitor.attach()
    step(model, 4)
    monitor.detach()
    step(model, 5)
    close(monitor.compute(), by_hand(model, [1, 4]))
    monitor.reset()
    sixth = by_hand(model, [6])
    with monitor:
        step(model, 6)
        close(monitor.compute(), sixth)
        step(model, 7)
    close(monitor.compute(), by_hand(model, [6, 7]))


def test_backward_after_leaving_is_not_counted():
    model = net()
    with Monitor(model, inputs(9, 2)) as monitor:
        loss = model(inputs(1)).square().mean()
    loss.backward()
    stats = monitor.compute()["fc1"].stats
    assert stats["n"].tolist() == [16] * 8
    assert not stats["n_g"].any()


def test_no_grad():
    model = net()
    with Monitor(model, inputs(9, 2)) as monitor, torch.no_grad():
        model(inputs(1))
    profile = monitor.compute()
    stats, expected = profile["fc2"].stats, by_hand(model, [1])["fc2"]
    like(stats.table[:9], expected[:9])
    assert not stats.table[9:13].any()
    # Weights are read at the end, without gradients.
    torch.testing.assert_close(stats["sum_abs_w"], expected[STATISTICS.index("sum_abs_w")])
    assert not stats["n_dw"].any()
    assert profile["fc2"].no_gradient
    assert any("no gradient reached 3 layers" in note for note in profile.notes)


def test_inference_mode():
    model = net()
    with Monitor(model, inputs(9, 2)) as monitor:
        with torch.inference_mode():
            model(inputs(1))
        step(model, 2)
    one, two = by_hand(model, [1, 2]), by_hand(model, [2])
    table = monitor.compute()["fc1"].stats.table
    torch.testing.assert_close(table[:9], one["fc1"][:9])
    torch.testing.assert_close(table[9:], two["fc1"][9:], rtol=1e-6, atol=1e-9)


def test_frozen_parameter_and_one_that_thaws():
    model = net()
    model.fc1.weight.requires_grad_(False)
    model.fc2.weight.requires_grad_(False)
    with Monitor(model, inputs(9, 2)) as monitor:
        step(model, 1)
        model.fc2.weight.requires_grad_(True)
        step(model, 2)
    profile = monitor.compute()
    assert profile["fc1"].stats["n_dw"].tolist() == [0] * 8
    assert profile["fc1"].stats["n_in"].tolist() == [6] * 8
    assert profile["fc1"].no_gradient
    assert profile["fc2"].stats["n_dw"].tolist() == [8] * 5


@pytest.mark.parametrize("every", [0, -1, 1.5, True, "2"])
def test_bad_every(every):
    with pytest.raises(InputError, match=f"every is {every!r}, expected a positive"):
        Monitor(net(), inputs(0), every=every)


@pytest.mark.parametrize("scale", [0, -2.0, float("nan"), float("inf")])
def test_bad_scale(scale):
    with pytest.raises(InputError, match=r"grad_scale is .*, expected a positive number"):
        Monitor(net(), inputs(0), grad_scale=scale)


def test_scale_of_another_kind():
    with pytest.raises(InputError, match="'x', expected a number, a function or a GradScaler"):
        Monitor(net(), inputs(0), grad_scale="x")


def test_nothing_measured():
    model = net()
    with Monitor(model, inputs(9, 2)) as monitor:
        pass
    with pytest.raises(InputError, match=r"none of 3 .* measured \(fc1: no forward pass"):
        monitor.compute()


def test_compute_can_be_merged_and_repeated():
    model = net()
    with Monitor(model, inputs(9, 2)) as monitor:
        step(model, 1)
        first = monitor.compute()["fc1"].stats.table
        assert torch.equal(first, monitor.compute()["fc1"].stats.table)
        step(model, 2)
    assert not torch.equal(first, monitor.compute()["fc1"].stats.table)


def test_public_name():
    assert fastplastic.Monitor is Monitor


def test_two_monitors_and_a_profile_of_one_model():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
    x, y = torch.randn(8, 4), torch.randint(0, 3, (8,))
    alone = fastplastic.profile(model, [(x, y)])
    with fastplastic.Monitor(model, x[:2]) as first:
        with fastplastic.Monitor(model, x[:2]) as second:
            model(x).sum().backward()
        totals = first.compute().totals
        assert totals == second.compute().totals == alone.totals
        assert totals.hidden_units == 6
        assert fastplastic.profile(model, [(x, y)]).totals == alone.totals
        # Of a part of the model, too.
        fastplastic.profile(model[:2], [(x, torch.zeros(8, 6))], loss_fn=mse_loss)
        assert first.compute()["0"].stats["n_dw"].tolist() == [4] * 6
        with first.pause():
            fastplastic.profile(model, [(x, y)])
            model(x)
        model(x)
        assert first.compute().samples == 16
    model(x)
    assert first.compute().samples == 16


@pytest.mark.parametrize("every", [1, 2])
def test_a_profile_within_a_loop_does_not_count(every):
    model = net()
    batches = [(inputs(9), torch.zeros(16, dtype=torch.int64))]
    with Monitor(model, inputs(9, 2), every=every) as monitor:
        step(model, 1)
        fastplastic.profile(model, batches * 3)
        plan = fastplastic.plan(fastplastic.profile(model, batches), criterion="random", ratio=0.2)
        step(model, 2)
        fastplastic.reinit_(copy.deepcopy(model), plan, batches=batches)
        with pytest.raises(ZeroDivisionError):
            fastplastic.profile(model, batches, loss_fn=lambda *_: 1 / 0)
        step(model, 3)
    close(monitor.compute(), by_hand(model, [1, 2, 3] if every == 1 else [1, 3]))


def test_a_monitor_that_was_made_and_watched_in_inference_mode():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
    x = torch.randn(8, 4)
    with torch.inference_mode(), fastplastic.Monitor(model, x[:2]) as monitor:
        model(x)
    assert monitor.compute().samples == 8


def test_a_monitor_that_saw_nothing_says_so():
    model = nn.Sequential(nn.Linear(4, 3)).eval()
    monitor = fastplastic.Monitor(model, torch.randn(2, 4))
    model(torch.randn(8, 4))
    with pytest.raises(fastplastic.FastPlasticError) as error:
        monitor.compute()
    assert str(error.value) == (
        "none of 1 weight layers was measured (0: no forward pass of the model was seen): call "
        "the model itself on data, a monitor's after attach() or inside its with block"
    )
