"""A re-initialised checkpoint has the dtypes of the one that it was made from."""

import pytest
import timm
import torch
from helpers.program import MODEL, SMALL
from safetensors.torch import load_file, save_file

OPTIONS = [option for option in SMALL if option != "--no-pretrained"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays(run, tmp_path, dtype):
    state = timm.create_model(MODEL).state_dict()
    state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}
    # Some training scripts keep their norms in float32.
    state["bn1.weight"] = state["bn1.weight"].float()
    save_file(state, tmp_path / "half.safetensors")
    more = ("--checkpoint", "half.safetensors", "--ratio", "0.2", "-o", "fresh.safetensors")
    assert run("reinit", *OPTIONS, *more).code == 0
    fresh = load_file(tmp_path / "fresh.safetensors")
    assert {k: v.dtype for k, v in fresh.items()} == {k: v.dtype for k, v in state.items()}
    changed = [k for k in state if not torch.equal(state[k], fresh[k])]
    assert 0 < len(changed) < len(state)
