"""A monitor in other modes, calls, threads and copies of the model."""

import copy
import io
import threading

import pytest
import torch
from helpers.monitored import by_hand, close, inputs, net, step

from fastplastic import Monitor
from fastplastic.errors import InputError


@pytest.mark.parametrize(
    ("modes", "expected"),
    [((True,), "train"), ((False,), "eval"), ((True, False), "mixed")],
)
def test_mode(modes, expected):
    model = net()
    with Monitor(model, inputs(9, 2)) as monitor:
        for training in modes:
            step(model.train(training))
    profile = monitor.compute()
    assert profile.mode == expected
    note = "some modules were in train mode and some in eval mode"
    assert (note in profile.notes) == (expected == "mixed")


def test_one_module_in_another_mode_is_mixed():
    model = net().train()
    model.drop.eval()
    with Monitor(model, inputs(9, 2)) as monitor:
        step(model)
    profile = monitor.compute()
    assert profile.mode == "mixed"
    assert "some modules were in train mode and some in eval mode" in profile.notes


def test_modules_called_outside_of_the_model_are_not_counted():
    model = net()
    with Monitor(model, inputs(9, 2)) as monitor:
        model.fc1(inputs(0))
        step(model, 1)
        model.fc1(inputs(2))
        with pytest.raises(RuntimeError, match="shapes"):
            model(torch.ones(2, 5))
        model.fc1(inputs(3))
    assert monitor.compute()["fc1"].stats["n"].tolist() == [16] * 8


def test_interrupt_in_the_forward_pass():
    """Hooks that end a forward pass are not called for Ctrl-C."""

    def interrupt(*_):
        raise KeyboardInterrupt

    model = net()
    monitor = Monitor(model, inputs(9, 2))
    handle = model.act2.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt), monitor:
        step(model)
    handle.remove()
    with monitor:
        model.fc2(torch.ones(3, 8))
        step(model)
    assert monitor.compute()["fc2"].stats["n"].tolist() == [32] * 5


def test_a_copy_of_an_observed_model_is_not_observed():
    model = net()
    with Monitor(model, inputs(9, 2)) as monitor:
        twin = copy.deepcopy(model)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        again = torch.load(file, weights_only=False)
        step(twin)
        step(again)
        with pytest.raises(InputError, match="none of 3 weight layers was measured"):
            monitor.compute()
        step(model, 1)
    close(monitor.compute(), by_hand(model, [1]))
    assert torch.equal(twin(inputs(1)), model(inputs(1)))


def test_backward_passes_on_several_threads():
    """Their hooks run at the same time; no sum may be lost."""
    model = net()
    with Monitor(model, inputs(9, 2)) as monitor:
        losses = [model(inputs(seed)).square().mean() for seed in range(24)]
        threads = [threading.Thread(target=loss.backward) for loss in losses]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    close(monitor.compute(), by_hand(model, range(24)))


# The compiler itself looks at .grad of tensors inside the graph.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_model():
    """Hooks are called as they are, never traced."""
    torch._dynamo.reset()
    model = net()
    with Monitor(model, inputs(9, 2)) as monitor:
        compiled = torch.compile(model, backend="eager")
        for seed in (1, 2):
            compiled(inputs(seed)).square().mean().backward()
    close(monitor.compute(), by_hand(model, [1, 2]))
