"""What an optimizer remembers of fresh weights."""

import copy
from functools import partial

import pytest
import torch
from timm.optim import create_optimizer_v2, list_optimizers
from torch import nn, optim

import fastplastic
from fastplastic import FastPlasticError, plan, reinit_
from fastplastic.reinit import transaction as apply_module
from fastplastic.reinit.optimizer_state import OptimizerState

# Everything that keeps something for each weight in another way.
OPTIMIZERS = {
    "sgd": lambda p: optim.SGD(p, 0.1, momentum=0.9),
    "plain sgd": lambda p: optim.SGD(p, 0.1),
    "adam": lambda p: optim.Adam(p, 0.01, amsgrad=True),
    "adamw": lambda p: optim.AdamW(p, 0.01),
    "foreach": lambda p: optim.AdamW(p, 0.01, foreach=True),
    "fused": lambda p: optim.AdamW(p, 0.01, fused=True),
    "rmsprop": lambda p: optim.RMSprop(p, 0.01, momentum=0.9, centered=True),
    "adagrad": lambda p: optim.Adagrad(p, 0.01, initial_accumulator_value=0.3),
    "rprop": lambda p: optim.Rprop(p, 0.03),
    "nadam": lambda p: optim.NAdam(p, 0.01),
    "asgd": lambda p: optim.ASGD(p, 0.01),
    "lamb": lambda p: create_optimizer_v2(p, "lamb", 0.01),
    "lion": lambda p: create_optimizer_v2(p, "lion", 0.01),
    "lookahead": lambda p: create_optimizer_v2(p, "lookahead_adamw", 0.01),
    "rmsprop of tensorflow": lambda p: create_optimizer_v2(p, "rmsproptf", 0.01),
    "madgrad": lambda p: create_optimizer_v2(p, "madgrad", 0.01),
}
STARTS = {
    ("adagrad", "sum"): 0.3, ("rprop", "step_size"): 0.03,
    ("rmsprop of tensorflow", "square_avg"): 1.0,
}  # fmt: skip
COPIES = ("ax", "lookahead_slow_buff", "x0")


def trained(make, steps=7, sizes=(6, 8, 3)):
    """Return a model, its optimizer after some steps, and a plan for it."""
    torch.manual_seed(0)
    given, hidden, classes = sizes
    model = nn.Sequential(nn.Linear(given, hidden), nn.ReLU(), nn.Linear(hidden, classes))
    x, y = torch.randn(32, given), torch.randint(0, classes, (32,))
    made = plan(fastplastic.profile(model, [(x, y)]), criterion="random", ratio=0.25)
    optimizer = make(model.parameters())

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    for _ in range(steps):
        step()
    return model, optimizer, made, step


def touched(model, made):
    """Return {parameter name: bool mask of what is written}."""
    masks = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in model.named_parameters()}
    units = made.units["0"]
    masks["0.weight"][units] = True
    masks["0.bias"][units] = True
    masks["2.weight"][:, units] = True
    return masks


def state_of(optimizer, parameter):
    """Return the state of a parameter; Lookahead keeps it in the optimizer that it wraps."""
    return getattr(optimizer, "_base_optimizer", optimizer).state.get(parameter, {})


def states(model, optimizer):
    return {
        (name, key): value.clone() if isinstance(value, torch.Tensor) else value
        for name, p in model.named_parameters()
        for key, value in state_of(optimizer, p).items()
    }


def same(one, two):
    both = isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor)
    return torch.equal(one, two) if both else one == two


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_fresh_weights_have_no_past(name):
    model, optimizer, made, step = trained(OPTIMIZERS[name])
    before, masks = states(model, optimizer), touched(model, made)
    report = reinit_(model, made, optimizer=optimizer)
    weights = dict(model.named_parameters())
    of_weights = set()
    for (of, key), value in states(model, optimizer).items():
        old = before[of, key]
        if not isinstance(value, torch.Tensor) or value.shape != weights[of].shape:
            assert same(value, old), (of, key)
            continue
        mask = masks[of]
        assert torch.equal(value[~mask], old[~mask]), (of, key)
        if mask.any():
            of_weights.add(f"{of}: {key}")
            # Averages of the weights begin at the fresh ones.
            copies = key in COPIES
            start = torch.full_like(value, STARTS.get((name, key), 0.0))
            expected = weights[of].detach() if copies else start
            assert torch.equal(value[mask], expected[mask]), (of, key)
    assert of_weights or name == "plain sgd"
    found = {w.name: w for w in report.written if w.kind == "optimizer state"}
    assert set(found) == of_weights
    for label, written in found.items():
        assert written.elements == int(masks[label.split(":")[0]].sum())
    step()
    assert all(p.isfinite().all() for p in model.parameters())


# What wraps other packages is left out, and what needs second derivatives.
OTHERS = ["fused*", "bnb*", "apex*", "adahessian"]


@pytest.mark.filterwarnings("ignore:It is highly recommended to have 'opt_einsum'")
@pytest.mark.parametrize("name", list_optimizers(exclude_filters=OTHERS))
def test_fresh_state_is_that_of_timms_optimizers(name):
    """After one step without gradients and almost without a rate, state is what it begins as."""
    torch.manual_seed(0)
    model = nn.Linear(6, 4, bias=False)
    optimizer = create_optimizer_v2(model.parameters(), name, 1e-12, weight_decay=0.0)
    model.weight.grad = torch.zeros_like(model.weight)
    optimizer.step()
    for state in OptimizerState(optimizer, model).tensors(["weight"]):
        expected = model.weight.detach() if state.start is None else state.start
        # A mean that begins at 1 has moved by a tenth.
        assert ((state.tensor - expected).abs() < 0.11).all(), (state.key, state.tensor)


def test_without_the_optimizer_its_state_stays():
    model, optimizer, made, _ = trained(OPTIMIZERS["adamw"])
    before = states(model, optimizer)
    reinit_(model, made)
    after = states(model, optimizer)
    assert all(same(after[key], before[key]) for key in before)


@pytest.mark.parametrize("name", ["adamw", "lookahead"])
def test_steps_begin_anew_only_where_asked_for(name):
    model, optimizer, made, step = trained(OPTIMIZERS[name])
    reinit_(model, made, optimizer=optimizer)
    weights = dict(model.named_parameters())
    assert int(state_of(optimizer, weights["0.weight"])["step"]) == 7
    reinit_(model, made, optimizer=optimizer, reset_steps=True)
    assert int(state_of(optimizer, weights["0.weight"])["step"]) == 0
    # Nothing of it was written.
    assert int(state_of(optimizer, weights["2.bias"])["step"]) == 7
    step()


def test_an_optimizer_that_has_not_started():
    model, optimizer, made, step = trained(OPTIMIZERS["adamw"], steps=0)
    report = reinit_(model, made, optimizer=optimizer, reset_steps=True)
    assert not [w for w in report.written if w.kind == "optimizer state"]
    assert len(optimizer.state) == 0
    step()


def test_state_of_another_shape_is_left_and_named():
    # Only large weights are factored.
    make = partial(create_optimizer_v2, opt="adafactor", lr=0.01)
    model, optimizer, made, _ = trained(make, sizes=(40, 48, 36))
    before = states(model, optimizer)
    report = reinit_(model, made, optimizer=optimizer)
    after = states(model, optimizer)
    row = ("0.weight", "exp_avg_sq_row")
    assert same(after[row], before[row])
    assert "exp_avg_sq_col, exp_avg_sq_row has no element for each weight" in report.notes[-1]


@pytest.mark.parametrize("name", ["adamw", "lookahead", "rprop"])
def test_a_failure_at_any_write_leaves_the_state_as_it_was(monkeypatch, name):
    model, optimizer, made, _ = trained(OPTIMIZERS[name])
    weights, before = copy.deepcopy(model.state_dict()), states(model, optimizer)
    fill, set_step = apply_module._fill, apply_module.set_step
    calls, at = 0, 0

    def failing(write):
        def call(*arguments):
            nonlocal calls
            calls += 1
            write(*arguments)
            if calls == at:
                raise KeyboardInterrupt

        return call

    monkeypatch.setattr(apply_module, "_fill", failing(fill))
    monkeypatch.setattr(apply_module, "set_step", failing(set_step))
    reinit_(copy.deepcopy(model), made)
    without = calls
    for at in range(1, 40):
        calls = 0
        try:
            reinit_(model, made, optimizer=optimizer, reset_steps=True)
            break
        except KeyboardInterrupt:
            after = states(model, optimizer)
            assert all(same(after[key], before[key]) for key in before), at
            assert all(torch.equal(model.state_dict()[key], weights[key]) for key in weights)
    assert at > without + 3


def test_what_is_no_optimizer_of_the_model_is_refused():
    model, _, made, _ = trained(OPTIMIZERS["sgd"])
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(FastPlasticError, match=r"optimizer is a Linear, expected a torch\.optim"):
        reinit_(model, made, optimizer=nn.Linear(1, 1))
    other = optim.SGD(nn.Linear(6, 8).parameters(), 0.1)
    with pytest.raises(FastPlasticError, match="trains none of the parameters of the model"):
        reinit_(model, made, optimizer=other)
    assert all(torch.equal(model.state_dict()[key], before[key]) for key in before)


def test_parameters_that_the_optimizer_does_not_train():
    model, _, made, _ = trained(OPTIMIZERS["sgd"])
    optimizer = optim.SGD(model[0].parameters(), 0.1, momentum=0.9)
    model(torch.randn(4, 6)).sum().backward()
    optimizer.step()
    report = reinit_(model, made, optimizer=optimizer)
    found = [w.name for w in report.written if w.kind == "optimizer state"]
    assert sorted(found) == ["0.bias: momentum_buffer", "0.weight: momentum_buffer"]
