"""Weights under the names that training scripts give them."""

import pytest
import torch
from torch import nn

from fastplastic.errors import FileError
from fastplastic.files.checkpoint import load_into


def small():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("wrap", "remark"),
    [
        (lambda state: {"state_dict": state, "epoch": 3}, ""),
        (lambda state: {"model_state_dict": state, "optimizer_state_dict": {}}, ""),
        (lambda state: named("module.", state), "prefix 'module.' removed"),
        (
            lambda state: {"state_dict": named("model.", state), "pytorch-lightning_version": "2"},
            "prefix 'model.' removed",
        ),
        (
            lambda state: {**named("net.", state), "accuracy.total": torch.ones(1)},
            "prefix 'net.' removed, 1 tensor without it left out",
        ),
        (
            lambda state: {"state_dict": state_of_zeros(state), "state_dict_ema": state},
            "averaged weights, state_dict_ema",
        ),
        (
            lambda state: {**named("module.", state), "n_averaged": torch.tensor(3)},
            "prefix 'module.' removed; averaged weights",
        ),
    ],
)
def test_which_weights_were_taken_is_said(tmp_path, wrap, remark):
    model, path = small(), tmp_path / "a.pth"
    state = {name: value + 1 for name, value in model.state_dict().items()}
    torch.save(wrap(state), path)
    assert load_into(model, path).remark == remark
    assert equal(model.state_dict(), state)


def named(prefix, state):
    return {prefix + name: value for name, value in state.items()}


def state_of_zeros(state):
    return {name: torch.zeros_like(value) for name, value in state.items()}


def test_weights_of_averages_by_torch_itself(tmp_path):
    model = small()
    averaged = torch.optim.swa_utils.AveragedModel(model)
    averaged.update_parameters(model)
    torch.save(averaged.state_dict(), tmp_path / "a.pth")
    assert "averaged weights" in load_into(small(), tmp_path / "a.pth").remark


def test_weights_that_are_there_twice_are_refused(tmp_path):
    model, path = small(), tmp_path / "a.pth"
    state = model.state_dict()
    torch.save({**named("model.", state), **named("ema.", state)}, path)
    with pytest.raises(FileError) as error:
        load_into(model, path)
    assert str(error.value) == (
        f"{path}: holds the weights several times, under 'model.', 'ema.': save the one that you "
        "want by itself"
    )


def test_a_prefix_of_the_model_itself_stays(tmp_path):
    model = nn.ModuleDict({"model": small()})
    torch.save(model.state_dict(), tmp_path / "a.pth")
    assert load_into(model, tmp_path / "a.pth").remark == ""
    # Another model, of whose names only one ends alike.
    torch.save({"other.0.weight": torch.ones(1)}, tmp_path / "b.pth")
    with pytest.raises(FileError, match="does not fit the model"):
        load_into(small(), tmp_path / "b.pth")


@pytest.mark.parametrize("part", ["0", "2"])
def test_only_some_names_may_have_a_wrapper(tmp_path, part):
    """As timm reads them: a part of the model may have been wrapped by itself."""
    model = small()
    state = {name: value + 1 for name, value in model.state_dict().items()}
    torch.save({f"module.{n}" if n[0] == part else n: v for n, v in state.items()}, tmp_path / "a")
    assert load_into(model, tmp_path / "a").remark == "prefix 'module.' removed"
    assert equal(model.state_dict(), state)


def test_a_counter_of_the_model_itself_stays(tmp_path):
    model = small()
    model.register_buffer("n_averaged", torch.tensor(0))
    torch.save({**model.state_dict(), "n_averaged": torch.tensor(3)}, tmp_path / "a.pth")
    assert load_into(model, tmp_path / "a.pth").remark == ""
    assert model.n_averaged == 3


def test_other_weights_beside_names_that_fit_are_not_taken(tmp_path):
    """Files without the counters of BatchNorm fit, but for what else is in this one."""
    model = small()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = {name: value + 1 for name, value in before.items()}
    counter = state.pop("1.num_batches_tracked")
    ema = named("ema.", {**state, "1.num_batches_tracked": counter})
    torch.save({**state, **ema}, tmp_path / "a.pth")
    with pytest.raises(FileError, match=r"of 9 tensors expected, 9 unexpected .ema.0"):
        load_into(model, tmp_path / "a.pth")
    assert equal(model.state_dict(), before)


def test_a_model_without_weights_takes_none(tmp_path):
    torch.save(small().state_dict(), tmp_path / "a.pth")
    with pytest.raises(FileError, match="does not fit the model"):
        load_into(nn.Identity(), tmp_path / "a.pth")


def test_a_prefix_ends_with_a_dot_and_stands_before_more_than_half_of_the_names(tmp_path):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, bias=False))
    state = model.state_dict()
    # Of three names two; the last is tied to none, and missed.
    torch.save(named("net.", dict(list(state.items())[:2])), tmp_path / "a.pth")
    with pytest.raises(FileError, match=r"of 3 tensors expected, 1 missing .1.weight"):
        load_into(model, tmp_path / "a.pth")
    torch.save(named("net.", dict(list(state.items())[:1])), tmp_path / "b.pth")
    with pytest.raises(FileError, match=r"3 missing .*, 1 unexpected .net.0.weight"):
        load_into(model, tmp_path / "b.pth")
    torch.save(named("net", state), tmp_path / "c.pth")
    with pytest.raises(FileError, match=r"3 missing .*, 3 unexpected .net0.weight"):
        load_into(model, tmp_path / "c.pth")
