"""After `profile`, whatever happens in it, model and random state are as before."""

import random

import numpy
import pytest
import torch
from helpers.profiled import data, net
from torch.nn.functional import cross_entropy

from fastplastic import profile
from fastplastic.errors import InputError


def state(model):
    """Everything that must be the same afterwards; tensors by value and by identity."""
    values = {}
    for name, module in model.named_modules():
        values[name, "training"] = module.training
        values[name, "attributes"] = list(vars(module))
        values[name, "sizes"] = [
            len(v) if isinstance(v, dict) else 0 for v in vars(module).values()
        ]
        for key, buffer in module._buffers.items():
            values[name, "buffer", key] = (id(buffer), buffer.numpy().tobytes())
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        values[name] = (id(parameter), parameter.detach().numpy().tobytes())
        values[name, "grad"] = (
            None if gradient is None else (id(gradient), gradient.numpy().tobytes())
        )
        values[name, "wants"] = parameter.requires_grad
        values[name, "hooks"] = (
            len(parameter._backward_hooks or {}),
            len(parameter._post_accumulate_grad_hooks or {}),
        )
    return values


def generators():
    kind, keys, *rest = numpy.random.get_state()
    return torch.get_rng_state().tolist(), random.getstate(), (kind, keys.tolist(), rest)


def lively(training):
    """A model with all there is to spoil: gradients, hooks, mixed modes, a frozen parameter."""
    model = net(training)
    cross_entropy(model(data()[0][0]), data()[0][1]).backward()
    model.head.bias.grad = None
    model.fc.bias.requires_grad_(False)
    model.drop.train(not training)
    model.conv.register_forward_hook(lambda *_: None)
    model.fc.weight.register_hook(lambda gradient: None)
    return model


def noisy(batches):
    """Draw from every generator, as loaders do."""
    for batch in batches:
        torch.rand(1), random.random(), numpy.random.rand()
        yield batch


class Stop(BaseException):
    pass


def stop(*_):
    raise Stop


def interrupt(*_):
    raise KeyboardInterrupt


def broken(batches):
    yield batches[0]
    raise Stop


def fail_in_backward(output, targets):
    output.register_hook(stop)
    return cross_entropy(output, targets)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({}, None),
        ({"gradients": True}, None),
        ({"ranks": True}, None),
        ({"loss_fn": stop}, Stop),
        ({"loss_fn": interrupt}, KeyboardInterrupt),
        ({"loss_fn": fail_in_backward}, Stop),
        ({"progress": interrupt}, KeyboardInterrupt),
        ({"batches": broken(data())}, Stop),
        ({"batches": [(torch.ones(2, 5, 8, 8), torch.ones(2))]}, RuntimeError),
        ({"batches": [data()[0], "x"]}, InputError),
    ],
)
def test_everything_is_as_before(training, options, error):
    model = lively(training)
    if "batches" in options and not isinstance(options["batches"], list):
        options = {"batches": broken(data())}
    batches = options.get("batches", noisy(data()))
    rest = {key: value for key, value in options.items() if key != "batches"}
    before, draws = state(model), generators()
    if error is None:
        profile(model, batches, **rest)
    else:
        with pytest.raises(error):
            profile(model, batches, **rest)
    assert state(model) == before
    assert generators() == draws


def test_an_optimizer_that_steps_during_backward_does_not():
    model = net()
    steps = []
    model.fc.weight.register_post_accumulate_grad_hook(lambda p: steps.append(p.data.zero_()))
    before = state(model)
    profile(model, data())
    assert not steps
    assert state(model) == before
    cross_entropy(model(data()[0][0]), data()[0][1]).backward()
    assert len(steps) == 1
