"""Models that a function of the user's makes."""

import sys

import pytest
import torch
from torch import nn

from fastplastic.errors import FileError, InputError
from fastplastic.files import save_state_dict
from fastplastic.sources import InputShape, create_model

CODE = """
import timm, torch
from torch import nn

def net(width=4, side=8):
    return nn.Sequential(
        nn.Conv2d(3, width, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(width, 5),
    )

def of_classes(num_classes=3, in_chans=3):
    return nn.Sequential(nn.Conv2d(in_chans, 4, 3), nn.Flatten(), nn.LazyLinear(num_classes))

def dense():
    return nn.Conv2d(3, 4, 3)

def of_timm():
    return timm.create_model("test_resnet", num_classes=7)

class Parts(nn.Module):
    def forward(self, x):
        return {"out": x}

class Holder:
    @staticmethod
    def net():
        return net()

def lazy():
    return nn.LazyLinear(3)

def text():
    return "a model"

def fails():
    raise KeyError("weights")

model = net()
number = 3
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Let the current folder have a module and a package, and forget them afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "nets.py").write_text(CODE)
    (tmp_path / "broken.py").write_text("import nowhere_to_be_found")
    (tmp_path / "failing.py").write_text("raise ValueError('no GPU')")
    (tmp_path / "leaving.py").write_text("raise SystemExit(3)")
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ("mine", "broken", "failing", "leaving"):
            del sys.modules[name]


def test_a_function_makes_the_model():
    before = torch.get_rng_state()
    loaded = create_model("mine.nets:net", img_size=8)
    assert torch.equal(torch.get_rng_state(), before)
    assert (loaded.weights, loaded.head) == ("as mine.nets:net makes them", "")
    assert loaded.model.num_classes == 5
    shape = InputShape.of(loaded.model, None, None, None)
    assert shape.config["input_size"] == (3, 8, 8)
    again = create_model("mine.nets:net", img_size=8).model
    assert torch.equal(again[0].weight, loaded.model[0].weight)
    other = create_model("mine.nets:net", img_size=8, seed=1).model
    assert not torch.equal(other[0].weight, loaded.model[0].weight)
    assert isinstance(create_model("mine.nets:Holder.net", img_size=8).model, nn.Sequential)


def test_arguments():
    assert create_model("mine.nets:net", model_kwargs={"width": 6}).model[0].out_channels == 6
    loaded = create_model("mine.nets:net", num_classes=9, img_size=8)
    assert loaded.model[-1].out_features == loaded.model.num_classes == 9
    assert loaded.head == "fresh, of 9 classes: that of the weights has 5"


def test_a_function_that_takes_timm_s_arguments(folder):
    (folder / "taking.py").write_text(CODE.replace("nn.LazyLinear(", "nn.Linear(144, "))
    try:
        loaded = create_model("taking:of_classes", num_classes=9, input_size=(1, 8, 8))
    finally:
        del sys.modules["taking"]
    assert loaded.model.num_classes == 9 and loaded.head == ""
    assert loaded.model[0].in_channels == 1


def test_a_model_of_timm_tells_what_it_takes():
    model = create_model("mine.nets:of_timm").model
    assert model.num_classes == 7 and "architecture" in model.pretrained_cfg


def test_a_checkpoint(tmp_path):
    model = create_model("mine.nets:net", seed=4).model
    save_state_dict(tmp_path / "a.safetensors", model)
    loaded = create_model("mine.nets:net", checkpoint=tmp_path / "a.safetensors")
    assert loaded.weights == f"checkpoint: {tmp_path / 'a.safetensors'}"
    assert torch.equal(loaded.model[0].weight, model[0].weight)
    with pytest.raises(FileError, match="does not fit the model"):
        create_model(
            "mine.nets:net", model_kwargs={"width": 8}, checkpoint=tmp_path / "a.safetensors"
        )


FORMS = "expected NAME, torchvision:NAME, hf:FOLDER, package.module:factory, hf-hub:OWNER/NAME or"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("nothing.here:net", f"no module nothing in {{}} or among what is installed: {FORMS}"),
        ("mine.other:net", f"no module mine.other in {{}} or among what is installed: {FORMS}"),
        ("torchvison:resnet18", "local-dir:FOLDER: did you mean torchvision:resnet18?"),
        ("mine.nets:nett", "mine.nets has no nett (did you mean net"),
        ("mine.nets:model", "mine.nets:model: is a Sequential, expected a function that returns a"),
        ("mine.nets:number", "mine.nets:number: is a int, expected a function that returns a mod"),
        (
            "mine.nets:text",
            "mine.nets:text: returned str, expected a torch.nn.Module: return the",
        ),
        (
            "mine.nets:fails",
            "calling it with no arguments failed (KeyError: 'weights'): correct it",
        ),
        ("mine.nets:lazy", "'weight' is not built yet, expected a built model: run one forward"),
        (
            "mine.nets:Parts",
            "mine.nets:Parts: the model returned a dict, expected logits: wrap the",
        ),
        (
            "mine.nets:dense",
            "mine.nets:dense: returns (2, 4, 222, 222) for 2 images of 3 x 224 x 224, expected "
            "logits [2, classes]; for segmentation, detection and the like use the library: fastp",
        ),
        ("broken:net", "importing broken failed (ModuleNotFoundError: No module named 'nowhere_to"),
        ("failing:net", "importing failing failed (ValueError: no GPU): correct it (FASTPLASTIC_D"),
        ("leaving:net", "importing leaving failed (SystemExit: 3): correct it"),
    ],
)
def test_what_is_wrong_with_a_function_is_said(folder, name, text):
    with pytest.raises(InputError) as error:
        create_model(name)
    assert text.format(folder) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"model_kwargs": {"fo": 1}}, "calling it with fo=1 failed (TypeError: net() got an unexp"),
        (
            {"in_chans": 1},
            "mine.nets:net does not run on images of 1 x 224 x 224 (RuntimeError: Given groups=1",
        ),
        ({"img_size": 2}, "mine.nets:net does not run on images of 3 x 2 x 2 (RuntimeError: "),
    ],
)
def test_arguments_that_do_not_suit_it(arguments, text):
    with pytest.raises(InputError) as error:
        create_model("mine.nets:net", **arguments)
    assert text in str(error.value)
