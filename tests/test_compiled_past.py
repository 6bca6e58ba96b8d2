"""Calls past the hooks of a monitor: steps in between, calls unseen, and what is refused."""

import pytest
import torch
from helpers.compiling import WARNINGS, WAYS, Block, compiled, eager, graphs, nothing_compiled
from helpers.monitored import by_hand, close, inputs, like, net, step
from torch import nn

from fastplastic import Monitor, profile
from fastplastic.errors import InputError
from fastplastic.measure import EagerStance

__all__ = ["nothing_compiled"]
pytestmark = WARNINGS


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_steps_in_between_are_compiled_as_without_a_monitor(way, before):
    model = net()
    function = compiled(model, way)
    for seed in (8, 9) if before else ():
        step(function, seed)
    with Monitor(model, inputs(9, 2), every=3) as monitor:
        for seed in range(7):
            step(function, seed)
            assert graphs() == (before or seed > 0)
    profile = monitor.compute()
    assert profile.batches == 3
    if way != "function" or before:
        step(function, 7)
        assert graphs() == 1
    close(profile, by_hand(eager(model), [0, 3, 6]))


def test_calls_without_a_backward_pass():
    model = net()
    function = compiled(model)
    with torch.no_grad():
        function(inputs(8))
        with Monitor(model, inputs(9, 2), every=3) as monitor:
            for seed in range(7):
                function(inputs(seed))
    assert graphs() == 1
    assert monitor.compute()["fc1"].stats["n"].tolist() == [48] * 8


def test_pause_lets_compiled_code_run():
    model = net()
    function = compiled(model)
    with Monitor(model, inputs(9, 2), every=3) as monitor, monitor.pause():
        step(function)
        assert graphs() == 1
    step(function)


def test_stances_end_with_the_last():
    first, second = EagerStance(), EagerStance()
    function = compiled(net())
    first.begin()
    second.begin()
    first.end()
    first.end()
    function(inputs(1))
    assert not graphs()
    second.end()
    function(inputs(1))
    assert graphs() == 1


@pytest.mark.parametrize("way", WAYS)
def test_calls_that_were_not_seen_are_an_error(way):
    model = net()
    function = compiled(model, way)
    step(function)
    monitor = Monitor(model, inputs(9, 2))
    with monitor:
        for seed in (1, 2):
            step(function, seed)
    text = r"2 calls of the model ran in compiled code that hooks .*torch\.compiler\.reset\(\)"
    with pytest.raises(InputError, match=text):
        monitor.compute()
    monitor.reset()
    torch.compiler.reset()
    if way != "function":
        with monitor:
            step(function, 3)
        close(monitor.compute(), by_hand(eager(model), [3]))


def test_code_of_a_model_of_the_same_class():
    """The compiler takes it for this one, without its hooks."""
    step(compiled(net()))
    model = net()
    with Monitor(model, inputs(9, 2)) as monitor:
        step(compiled(model))
    with pytest.raises(InputError, match="1 calls of the model ran in compiled code"):
        monitor.compute()


def test_evaluation_hides_no_unseen_step():
    model = net()
    function = compiled(model, "function")
    step(function)
    with Monitor(model, inputs(9, 2)) as monitor:
        with torch.no_grad():
            model(inputs(1))
        step(function, 2)
    with pytest.raises(InputError, match="1 calls of the model ran in compiled code"):
        monitor.compute()


def test_part_of_a_model_that_was_compiled():
    model = Block()
    model.body.compile(backend="aot_eager")
    step(model)
    with Monitor(model, inputs(9, 2)) as monitor:
        step(model, 1)
    with pytest.raises(InputError, match=r"body\.fc1 \(3 layers in all\) ran in compiled"):
        monitor.compute()
    torch.compiler.reset()
    with Monitor(model, inputs(9, 2)) as monitor:
        step(model, 1)
    model.body._compiled_call_impl = None
    with Monitor(model, inputs(9, 2)) as again:
        step(model, 1)
    expected = {layer.name: layer.stats.table for layer in again.compute().layers}
    close(monitor.compute(), expected)


def test_eager_steps_beside_compiled_code_of_others():
    """Two backward passes of one forward pass are no sign of anything."""
    step(compiled(Block()))
    model = net()
    with Monitor(model, inputs(9, 2)) as monitor:
        one, two = model(inputs(1)).square().mean(), model(inputs(2)).square().mean()
        one.backward()
        two.backward()
    close(monitor.compute(), by_hand(model, [1, 2]))


def test_profile_of_a_compiled_model():
    model = net()
    step(compiled(model, "in place"))
    found = profile(model, [(inputs(1), torch.zeros(16, 3))], loss_fn=nn.functional.mse_loss)
    assert graphs() == 1 and found.coverage.measured == 3
    step(model, 2)
    assert graphs() == 1


def test_a_function_around_a_scaled_model_is_refused():
    model = net()
    with Monitor(model, inputs(9, 2), grad_scale=2.0) as monitor:
        with pytest.raises(torch._dynamo.exc.Unsupported, match="fastplastic: each call of the mo"):
            step(compiled(model, "function"))
        torch.compiler.reset()
        monitor.reset()
        step(compiled(model, "function", fullgraph=False), 1, scale=2.0)
    close(monitor.compute(), by_hand(model, [1]))


def test_attention_that_hooks_do_not_see_is_refused():
    """What it multiplies is not seen by hooks, and its gradients are not in compiled code."""
    torch.manual_seed(0)
    model, x = nn.TransformerEncoderLayer(8, 2, 12, 0.0, batch_first=True), torch.randn(2, 4, 8)
    with Monitor(model, x) as monitor:
        with pytest.raises(torch._dynamo.exc.Unsupported, match=r"gradients in nn\.Multihead"):
            compiled(model)(x)
        torch.compiler.reset()
        monitor.reset()
        compiled(model, fullgraph=False)(x).square().mean().backward()
    with pytest.raises(InputError, match=r"1 calls of the model .* is of nn\.MultiheadAttention"):
        monitor.compute()
    with Monitor(model, x, every=2) as monitor:
        compiled(model)(x).square().mean().backward()
    with Monitor(model, x) as again:
        model(x).square().mean().backward()
    for layer in again.compute().layers:
        like(monitor.compute()[layer.name].stats.table, layer.stats.table)
