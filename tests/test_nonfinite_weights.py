"""Weights that are NaN or infinite: named, not planned, and written only if that is asked for."""

import pytest
import timm
import torch
from helpers import Net
from safetensors.torch import save_file
from torch import nn

from fastplastic import plan, profile, reinit_
from fastplastic.errors import InputError
from fastplastic.model import nonfinite_tensors

OPTIONS = ("--img-size", "32", "--num-classes", "10", "-b", "4", "--batches", "2")
TAKEN = ("--ratio", "0.2", "--criterion", "random")
FROM = ("--checkpoint", "bad.safetensors")


def batches():
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(8, 5, generator=generator), torch.arange(8) % 3)]


def net():
    torch.manual_seed(0)
    return Net(
        lambda own, x: own.head(own.second(own.first(x).relu()).relu()),
        first=nn.Linear(5, 8),
        second=nn.Linear(8, 8),
        head=nn.Linear(8, 3),
    )


def write_bad_checkpoint(name="layer4.0.conv1.weight"):
    state = timm.create_model("test_resnet", num_classes=10).state_dict()
    state[name][0] = torch.nan
    save_file(state, "bad.safetensors")


def test_masks_of_infinity_are_no_damage():
    model = net()
    model.register_buffer("mask", torch.full((3, 3), -torch.inf).triu(1))
    model.register_buffer("running_mean", torch.zeros(2))
    assert nonfinite_tensors(model) == ()
    model.mask[0, 0] = torch.nan
    model.running_mean[0] = torch.inf
    model.first.bias.data[1] = -torch.inf
    assert nonfinite_tensors(model) == ("first.bias", "mask", "running_mean")


def test_units_of_layers_with_nan_are_not_planned():
    model = net()
    model.second.weight.data[3, 2] = torch.nan
    found = profile(model, batches())
    with pytest.raises(InputError, match=r"no unit to choose from.*16 hidden units are left out"):
        plan(found, ratio=0.5)
    model = net()
    model.first.weight.data[3, 2] = torch.nan
    model.second.weight.data[:, 3] = 0
    with pytest.raises(InputError, match=r"NaN or infinity was seen in their layers"):
        plan(profile(model, batches()), ratio=0.5, criterion="random")


def test_layers_that_it_does_not_reach_are_planned():
    model = Net(
        lambda own, x: own.head(own.first(x).relu()) + own.other_head(own.other(x).relu()),
        first=nn.Linear(5, 8),
        head=nn.Linear(8, 3),
        other=nn.Linear(5, 6),
        other_head=nn.Linear(6, 3),
    )
    model.first.weight.data[0] = torch.inf
    chosen = plan(profile(model, batches()), ratio=1, max_layer_fraction=1)
    assert set(chosen.units) == {"other"} and chosen.eligible == 6
    note = next(note for note in chosen.notes if "NaN or infinity" in note)
    assert note.startswith("8 hidden units are left out") and note.endswith(": first")


def test_plan_names_the_tensors(run):
    write_bad_checkpoint()
    outcome = run("plan", "test_resnet", *OPTIONS, *TAKEN, *FROM)
    assert "NaN or infinity in 1 tensors: layer4.0.conv1.weight" in outcome.error
    assert "layer4.0.conv1 " not in outcome.output.partition("note")[0]


def test_reinit_refuses_without_force(run, tmp_path):
    write_bad_checkpoint("layer4.0.conv1.weight")
    arguments = ("reinit", "test_resnet", *OPTIONS, *TAKEN, *FROM, "-o", "new.safetensors")
    outcome = run(*arguments)
    assert outcome.code == 3
    assert len(outcome.error.splitlines()) == 1
    assert "layer4.0.conv1.weight; expected finite weights" in outcome.error
    assert "--force" in outcome.error and not (tmp_path / "new.safetensors").exists()
    outcome = run(*arguments, "--force")
    assert outcome.code == 0, outcome.error
    assert "fastplastic: warning: " in outcome.error
    assert "not finite before, not finite after" in outcome.output
    assert (tmp_path / "new.safetensors").exists()


@pytest.mark.parametrize("option", ["compensate", "recalibrate"])
def test_what_is_measured_to_be_nan_is_not_written(option):
    model = Net(
        lambda own, x: own.head(own.norm(own.first(x)).relu()),
        first=nn.Linear(5, 8),
        norm=nn.BatchNorm1d(8),
        head=nn.Linear(8, 3),
    ).eval()
    chosen = plan(profile(model, batches()), ratio=0.5, criterion="random")
    unit = int(chosen.units["first"][0])
    if option == "compensate":
        model.head.weight.data[0, unit] = torch.nan
    spoiled = [(torch.full((8, 5), torch.inf), batches()[0][1])] if option == "recalibrate" else []
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(InputError, match="is NaN or infinite over the batches"):
        reinit_(model, chosen, batches=spoiled or batches(), **{option: True})
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)
