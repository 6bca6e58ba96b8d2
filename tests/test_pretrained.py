"""Real ImageNet weights without a hub: from a package, into timm."""

import importlib.util
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch

import fastplastic
from fastplastic.errors import FileError
from fastplastic.files import save_state_dict
from fastplastic.model import fingerprint, loss_head
from fastplastic.sources import batches, create_model

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "pretrained.py"
PULLOVER = 2
# ImageNet's cardigan, cloak, jersey, sweatshirt and trench coat.
KNITWEAR = (474, 501, 610, 841, 869)


@pytest.fixture(scope="module")
def pretrained():
    spec = importlib.util.spec_from_file_location("pretrained", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """Write the checkpoint as a user does."""
    path = tmp_path_factory.mktemp("pretrained") / "lite0.safetensors"
    subprocess.run([sys.executable, str(SCRIPT), "-o", str(path)], check=True)
    return path


def test_checkpoint_loads_into_timm_strictly(path):
    model = timm.create_model("tf_efficientnet_lite0", checkpoint_path=str(path))
    assert sum(parameter.numel() for parameter in model.parameters()) == 4_652_008
    assert create_model("tf_efficientnet_lite0", checkpoint=path).weights == f"checkpoint: {path}"


def test_every_tensor_has_its_place(pretrained):
    carried = pretrained.load_state_dict(pretrained.carried_file())
    model = timm.create_model("tf_efficientnet_lite0")
    renamed = pretrained.renamed(carried, model)
    assert len(renamed) == 247
    pairs = {
        "conv_stem.weight": "_conv_stem.weight",
        "blocks.1.0.conv_dw.weight": "_blocks.1._depthwise_conv.weight",
        "blocks.6.0.bn3.running_var": "_blocks.15._bn2.running_var",
        "classifier.bias": "_fc.bias",
    }
    for name, theirs in pairs.items():
        assert renamed[name] is carried[theirs], name


def test_other_tensors_are_refused(pretrained):
    with pytest.raises(
        FileError, match=r"^1 tensors do not match the 247 of tf_efficientnet_lite0"
    ):
        pretrained.renamed({"a": torch.ones(1)}, timm.create_model("tf_efficientnet_lite0"))


def test_existing_output_is_one_line(pretrained, path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["pretrained", "-o", str(path)])
    with pytest.raises(SystemExit) as end:
        pretrained.main()
    assert end.value.code == (
        f"{path}: exists already: choose another name, or replace it with --force"
    )


def test_the_network_sees_what_the_sample_shows(path):
    model = create_model("tf_efficientnet_lite0", checkpoint=path).model.eval()
    data = batches("sample", model=model, batch_size=80, max_batches=1)
    with torch.inference_mode():
        seen = [
            any(number in KNITWEAR for number in top.tolist())
            for images, labels in data
            for top in model(images[labels == PULLOVER]).topk(5).indices
        ]
    # By chance 2.5 % of them would.
    assert len(seen) == 8
    assert sum(seen) > len(seen) / 2


def test_profile_plan_and_reinit_of_the_real_model(path, tmp_path):
    model = create_model("tf_efficientnet_lite0", checkpoint=path).model.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    data = batches("sample", model=model, batch_size=10, max_batches=2, img_size=64)
    with loss_head(model, data.num_classes):
        profile = fastplastic.profile(model, data)
    # The head on loan was for the loss alone: the plan is for the model itself.
    profile = replace(profile, fingerprint=fingerprint(model))
    assert (profile.coverage.found, profile.coverage.measured) == (50, 50)
    assert (profile.samples, profile.totals.units) == (20, 21018)
    assert 0 < profile.totals.dormant < profile.totals.hidden_units

    head = model.get_classifier()
    plan = fastplastic.plan(profile, ratio=0.02)
    assert plan.count == int(0.02 * plan.eligible) > 100
    fastplastic.reinit_(model, plan)
    assert model.get_classifier() is head
    save_state_dict(tmp_path / "fresh.safetensors", model)
    fresh = timm.create_model(
        "tf_efficientnet_lite0", checkpoint_path=str(tmp_path / "fresh.safetensors")
    )
    changed = {name for name, value in fresh.state_dict().items() if (value != before[name]).any()}
    written = {f"{name}.weight" for name in plan.units}
    assert written <= changed
    assert "classifier.bias" not in changed
    with torch.inference_mode():
        assert fresh.eval()(torch.zeros(1, 3, 64, 64)).isfinite().all()
