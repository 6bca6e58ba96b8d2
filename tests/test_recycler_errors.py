"""What a Recycler refuses, and what it says then."""

import copy
import warnings

import pytest
import torch
from helpers.recycling import batch, network, train
from torch import nn
from torch.nn.functional import cross_entropy

from fastplastic import Recycler
from fastplastic.errors import InputError


def test_two_on_one_model() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    first = Recycler(model, torch.randn(2, 8), optimizer, "redo")
    with pytest.raises(InputError, match=r"a Recycler .redo. acts on this model already: detach"):
        Recycler(model, torch.randn(2, 8), optimizer, "cbp")
    first.detach()
    with Recycler(model, torch.randn(2, 8), optimizer, "cbp"), pytest.raises(InputError):
        first.attach()
    first.attach()


def test_an_optimizer_of_another_model() -> None:
    optimizer = torch.optim.SGD(network().parameters(), 0.1)
    with pytest.raises(InputError, match="trains none of the parameters of the model"):
        Recycler(network(), torch.randn(2, 8), optimizer)


def test_a_model_that_has_changed_since() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    recycler = Recycler(model, torch.randn(2, 8), optimizer, "random", ratio=0.2, every=5)
    train(model, optimizer, recycler, range(3))
    model.add_module("5", nn.Linear(3, 3))
    optimizer.add_param_group({"params": model[5].parameters()})
    with pytest.raises(InputError, match="other parameters than when the Recycler began"):
        train(model, optimizer, recycler, range(3, 5))


def test_gradients_that_are_gone() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    recycler = Recycler(model, torch.randn(2, 8), optimizer, "grama", every=1)
    images, labels = batch(0)
    cross_entropy(model(images), labels).backward()
    optimizer.step()
    optimizer.zero_grad()
    with pytest.raises(InputError, match=r"call step.. right behind optimizer.step.., before zero"):
        recycler.step()


def test_layers_that_do_not_learn_are_left_alone() -> None:
    model = network()
    model[0].requires_grad_(False)
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), 1e-2)
    recycler = Recycler(model, torch.randn(2, 8), optimizer, "grama", every=5, threshold=0.9)
    train(model, optimizer, recycler, range(20))
    assert recycler.log and all(set(reset.units) == {"2"} for reset in recycler.log)


def test_weights_of_another_optimizer_are_left_alone() -> None:
    model = network()
    optimizer = torch.optim.SGD(model[2:].parameters(), 0.1)
    recycler = Recycler(model, torch.randn(2, 8), optimizer, "random", ratio=0.5, every=2)
    before = copy.deepcopy(model[0].state_dict())
    train(model, optimizer, recycler, range(10))
    assert recycler.log and all(set(reset.units) == {"2"} for reset in recycler.log)
    assert all(torch.equal(before[name], value) for name, value in model[0].state_dict().items())


@pytest.mark.parametrize("trained", [4, 0])
def test_no_unit_is_made_and_read_by_what_the_optimizer_trains(trained: int) -> None:
    model = network()
    optimizer = torch.optim.SGD(model[trained].parameters(), 0.1)
    with pytest.raises(InputError, match=r"no unit is made and read by weights that learn .requir"):
        Recycler(model, torch.randn(2, 8), optimizer, "redo")


def test_an_example_of_another_form_is_told_of() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for method in ("redo", "swr"):
        with pytest.raises(InputError, match=r"does not run on example_inputs: .*2x9 and 8x16"):
            Recycler(model, torch.randn(2, 9), optimizer, method)


def test_why_a_model_cannot_be_traced_is_told() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = network()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layers(x if x.sum() > 0 else -x)

    model = Branching()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(InputError, match=r"re-initialised: the model could not be traced .*data-d"):
        Recycler(model, torch.randn(2, 8), optimizer)
    # Single weights need no wiring.
    Recycler(model, torch.randn(2, 8), optimizer, "swr").detach()


def test_choices_that_come_to_nothing_are_told_of_once() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    recycler = Recycler(model, torch.randn(2, 8), optimizer, "redo", criterion="phi", every=2)
    with pytest.warns(UserWarning, match="nothing was re-initialised 3 times in a row: ") as seen:
        train(model, optimizer, recycler, range(20))
    assert len(seen) == 1 and list(recycler.skipped.values()) == [10]


def test_an_optimizer_that_is_no_longer_used_is_told_of() -> None:
    model = network()
    old = torch.optim.SGD(model.parameters(), 0.1)
    recycler = Recycler(model, torch.randn(2, 8), old, "random", every=5)
    new = torch.optim.SGD(model.parameters(), 0.1)
    train(model, new, recycler, range(99))
    with pytest.warns(UserWarning, match="100 times in a row: .* without a step of the optimizer"):
        train(model, new, recycler, range(1))


def test_gradients_that_are_accumulated_are_no_reason_to_warn() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    recycler = Recycler(model, torch.randn(2, 8), optimizer, "random", ratio=0.2, every=1000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for call in range(260):
            images, labels = batch(call)
            cross_entropy(model(images), labels).backward()
            if call % 2:
                optimizer.step()
                optimizer.zero_grad()
            recycler.step()
    assert list(recycler.skipped.values()) == [130]


def test_layers_that_begin_to_learn_later_are_reset_then() -> None:
    model = network()
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    recycler = Recycler(model, torch.randn(2, 8), optimizer, "random", ratio=0.5, every=5)
    train(model, optimizer, recycler, range(5))
    model[0].requires_grad_(True)
    train(model, optimizer, recycler, range(5, 10))
    assert [set(reset.units) for reset in recycler.log] == [{"2"}, {"0", "2"}]


def test_step_before_that_of_the_optimizer_is_told_of() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    recycler = Recycler(model, torch.randn(2, 8), optimizer, "random", every=2, ratio=0.2)
    with pytest.warns(UserWarning, match=r"called between optimizer.step.. and recycler.step.."):
        for step in range(4):
            images, labels = batch(step)
            optimizer.zero_grad()
            cross_entropy(model(images), labels).backward()
            recycler.step()
            optimizer.step()


def test_gradients_that_were_set_to_zero() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    recycler = Recycler(model, torch.randn(2, 8), optimizer, "grama", every=1)
    for step in range(2):
        images, labels = batch(step)
        cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        recycler.step()
    (why,) = recycler.skipped
    assert "all are 0: call step() right behind optimizer.step(), before zero_grad()" in why


def test_a_model_without_such_units() -> None:
    model = nn.Sequential(nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(InputError, match="no unit that can be re-initialised"):
        Recycler(model, torch.randn(2, 8), optimizer)


@pytest.mark.parametrize(
    ("method", "options", "text"),
    [
        ("redoo", {}, "method 'redoo' is unknown, expected one of redo, .*: did you mean 'redo'"),
        ("redo", {"evry": 3}, "option 'evry' is unknown, .*: did you mean 'every'"),
        ("redo", {"every": 0}, "every is 0, expected an integer of at least 1"),
        ("redo", {"every": 1.5}, "every is 1.5, expected an integer"),
        ("redo", {"criterion": "dorment"}, "criterion 'dorment' is unknown for granularity 'unit'"),
        ("redo", {"granularity": "filter"}, "granularity 'filter' is unknown"),
        ("redo", {"ratio": 0.1, "threshold": 0.1}, "threshold and ratio given of threshold, ratio"),
        ("custom", {}, "nothing given of threshold, ratio and rate, expected exactly one"),
        ("redo", {"compensate": True}, "compensate needs the moving average of the activations"),
        ("cbp", {"rate": 1e-3, "window": 5}, "window 5 is more than every 1"),
        ("cbp", {"rate": 0.0}, "rate is 0.0, expected more than 0 and at most 1"),
        ("cbp", {"decay": 1.0}, "decay is 1.0, expected at least 0 and less than 1"),
        ("cbp", {"batches": lambda: []}, "batches with a rate"),
        ("swr", {"rate": 0.1}, "rate and compensate are for units, found granularity 'weight'"),
        ("redo", {"outgoing": "gone"}, "outgoing 'gone' is unknown, expected one of zero"),
        ("redo", {"init": "he"}, "init 'he' is unknown"),
        ("redo", {"include": ["layer9"]}, "include pattern 'layer9' matches none"),
        ("custom", {"ratio": 2.0}, "ratio 2.0 is out of range"),
        ("custom", {"ratio": 0.1, "criterion": "swr"}, "or give granularity='weight'"),
        ("redo", {"window": 5}, "window 5 without a rate"),
        ("redo", {"start_step": 10, "end_step": 5}, "end_step 5 is not behind start_step 10"),
        ("random", {"ratio": 0.5, "max_layer_fraction": 0.01}, "leaves 0 units, ratio 0.5 of 28"),
        ("redo", {"batches": [1]}, "batches is a list, expected a function"),
        ("redo", {"sync": [None]}, "sync: copy 0 is a NoneType, expected a copy of the model"),
    ],
)
def test_what_cannot_be_done(method: str, options: dict, text: str) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(InputError, match=text):
        Recycler(model, torch.randn(2, 8), optimizer, method, **options)


def test_a_state_of_another_recycler() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    recycler = Recycler(model, torch.randn(2, 8), optimizer, "redo", every=5)
    state = recycler.state_dict()
    with pytest.raises(InputError, match="the state has version None, expected 1"):
        recycler.load_state_dict({})
    with pytest.raises(InputError, match="saved with method every 7, this one has 5"):
        recycler.load_state_dict(state | {"method": state["method"] | {"every": 7}})
    with pytest.raises(InputError, match="saved with sizes 0 99, this one has 16"):
        recycler.load_state_dict(state | {"sizes": {"0": 99, "2": 12}})
    with pytest.raises(InputError, match="saved with seed 5, this one has 0"):
        recycler.load_state_dict(state | {"seed": 5})
