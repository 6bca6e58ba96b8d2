"""PyTorch checkpoints written anew: weights, their averages, the optimizer, and all else."""

import argparse
import io
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from timm.optim import RMSpropTF, param_groups_weight_decay
from torch import nn

from fastplastic import plan, profile, reinit_
from fastplastic.errors import FileError
from fastplastic.files import TrainingFile, load_state_dict

ARGS = argparse.Namespace(lr=0.1, opt="adamw")


class Net(nn.Module):
    """Hidden layers of the same shape, so that state can be mistaken for that of another."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.c(torch.relu(self.b(torch.relu(self.a(x)))))


def data():
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(16, 8, generator=generator), torch.arange(16) % 3)]


def trained(make=torch.optim.AdamW, **more):
    """Return a model and an optimizer that has state."""
    torch.manual_seed(0)
    model = Net()
    groups = more.pop("groups", lambda model: model.parameters())(model)
    optimizer = make(groups, lr=0.01, **more)
    for images, labels in data() * 3:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return model.eval(), optimizer


def as_in_timm(model):
    return param_groups_weight_decay(model, 0.05)


def by_name(model):
    return [{"params": list(model.named_parameters())[::-1]}]


def reset(path, content):
    """Save the content, re-initialise its weights, and return the file read again and the plan."""
    torch.save(content, path)
    model = Net().eval()
    model.load_state_dict(load_state_dict(path))
    chosen = plan(profile(model, data()), criterion="random", ratio=0.3)
    file = TrainingFile(path, model)
    reinit_(model, chosen, outgoing="fresh", copies=file.copies, optimizer=file.optimizer)
    file.save(path.with_name("new.pth"))
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path.with_name("new.pth"), weights_only=True), chosen, model, file


@pytest.mark.parametrize(
    ("make", "more"),
    [
        (torch.optim.AdamW, {}),
        (torch.optim.AdamW, {"groups": as_in_timm}),
        (torch.optim.SGD, {"momentum": 0.9, "groups": by_name}),
    ],
    ids=["one group", "as in timm", "names"],
)
def test_state_of_what_is_re_initialised_begins_anew(tmp_path, make, more):
    model, optimizer = trained(make, **more)
    content = {"state_dict": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3}
    found, chosen, _, file = reset(tmp_path / "last.pth.tar", content)
    assert file.said() == {"optimizer": "begins anew for what was re-initialised", "epoch": "kept"}
    assert found["epoch"] == 3
    assert found["optimizer"]["param_groups"] == content["optimizer"]["param_groups"]
    # Another optimizer, built in the same way, takes it and knows which weight is which.
    torch.manual_seed(0)
    other, again = trained(make, **more)
    again.load_state_dict(found["optimizer"])
    rows = chosen.units["a"]
    assert len(rows) and set(chosen.units) >= {"a", "b"}
    for key, old in optimizer.state[model.a.weight].items():
        if key == "step":
            assert again.state[other.a.weight][key] == old
            continue
        new = again.state[other.a.weight][key]
        left = [row for row in range(8) if row not in rows]
        assert (new[rows] == 0).all() and torch.equal(new[left], old[left]) and old.any()


def test_averages_are_re_initialised_alike_and_keep_the_rest(tmp_path):
    model, _ = trained()
    state = model.state_dict()
    average = {f"module.{name}": value.half() / 2 for name, value in state.items()}
    content = OrderedDict(state_dict=state, state_dict_ema=average, args=ARGS, metric=0.5)
    found, chosen, model, file = reset(tmp_path / "last.pth.tar", content)
    assert file.said() == {"state_dict": "re-initialised alike", "args": "kept", "metric": "kept"}
    assert found["args"] == ARGS and list(found) == list(content)
    # The average is what was taken.
    rows, new = chosen.units["a"], found["state_dict_ema"]["module.a.weight"]
    assert new.dtype == torch.float16 and torch.equal(new, model.a.weight.half())
    left = [row for row in range(8) if row not in rows]
    assert torch.equal(found["state_dict"]["a.weight"][rows], model.a.weight[rows])
    assert torch.equal(found["state_dict"]["a.weight"][left], state["a.weight"][left])


def test_a_bare_state_dict(tmp_path):
    model, _ = trained()
    found, _, model, file = reset(tmp_path / "bare.pth", model.state_dict())
    assert file.said() == {} and found.keys() == model.state_dict().keys()
    assert all(torch.equal(found[name], value) for name, value in model.state_dict().items())


UNKNOWN = "left out, as it is not known which state belongs to which weight"


@pytest.mark.parametrize(
    "damage",
    [
        lambda saved: saved["param_groups"][0]["params"].pop(),
        lambda saved: saved["param_groups"][0].update(params=[3, 1, 2, 0, 4, 5]),
        lambda saved: saved["param_groups"][0].update(params="all"),
        lambda saved: saved["param_groups"].append(3),
        lambda saved: saved["state"].update({99: {"exp_avg": torch.ones(8, 8)}}),
        lambda saved: saved.update(state=[]),
        lambda saved: saved["param_groups"][0].update(param_names=["x"] * 6),
    ],
)
def test_an_optimizer_of_which_it_is_not_known_is_left_out(tmp_path, damage):
    model, optimizer = trained()
    saved = optimizer.state_dict()
    damage(saved)
    content = {"state_dict": model.state_dict(), "optimizer": saved}
    found, _, _, file = reset(tmp_path / "last.pth", content)
    assert file.said() == {"optimizer": UNKNOWN} and list(found) == ["state_dict"]


def test_several_optimizers_and_weights_of_other_models(tmp_path):
    model, optimizer = trained()
    teacher = nn.Linear(3, 2).state_dict()
    content = {
        "state_dict": model.state_dict(), "model": teacher, "model_state_dict": {"name": "net"},
        "optimizer_states": [optimizer.state_dict()] * 2,
    }  # fmt: skip
    found, _, _, file = reset(tmp_path / "last.pth", content)
    assert file.said() == {
        "model": "left out, does not fit the model", "model_state_dict": "kept",
        "optimizer_states": UNKNOWN,
    }  # fmt: skip
    assert list(found) == ["state_dict", "model_state_dict"]


def test_state_that_begins_at_another_value(tmp_path):
    """timm's RMSprop has squares that begin at one."""
    model, optimizer = trained(RMSpropTF)
    content = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    found, chosen, _, _ = reset(tmp_path / "last.pth", content)
    new, rows = found["optimizer"]["state"][0]["square_avg"], chosen.units["a"]
    assert (new[rows] == 1).all() and not (new == 1).all()


def test_a_full_disk(tmp_path, monkeypatch):
    """Torch itself says only that a position in the file was not expected."""
    model, _ = trained()
    torch.save(model.state_dict(), tmp_path / "a.pth")
    file, opened = TrainingFile(tmp_path / "a.pth", model), Path.open

    class Full(io.RawIOBase):
        """Takes a few bytes."""

        left = 500

        def writable(self):
            return True

        def write(self, content):
            if self.left < len(content):
                raise OSError(28, "No space left on device")
            self.left -= len(content)
            return len(content)

    monkeypatch.setattr(
        Path, "open", lambda path, mode="r": Full() if mode == "wb" else opened(path, mode)
    )
    with pytest.raises(FileError) as error:
        file.save(tmp_path / "b.pth")
    assert str(error.value) == (
        f"{tmp_path / 'b.pth'}: cannot be written (No space left on device): choose another place"
    )
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.pth"]
