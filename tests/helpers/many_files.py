"""Checkpoints in many files, and what re-initialising them has to give."""

import copy
import json

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.fsdp import fully_shard

import fastplastic
from fastplastic.model import fingerprint
from helpers import made_plan
from helpers.written import filled, layer

INDEX = "model.safetensors.index.json"


def save_sharded(folder, state, shards=3):
    """Write a state dict to several safetensors files, with their index and a config.json."""
    folder.mkdir(exist_ok=True)
    names, listed = list(state), {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = {name: state[name].contiguous() for name in names[shard::shards]}
        save_file(part, folder / file, {"format": "pt"})
        (folder / file).chmod(0o640)
        listed |= dict.fromkeys(part, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": listed}))
    (folder / "config.json").write_text("{}")
    return folder


def read_sharded(folder):
    """Return all tensors of the files that an index lists."""
    listed = json.loads((folder / INDEX).read_text())["weight_map"]
    return {name: load_file(folder / file)[name] for name, file in listed.items()}


def contents(folder):
    """Return {path: bytes} of a folder."""
    files = (file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def same_bits(one, other):
    """Tell whether two state dicts have the same names, dtypes and bits."""
    return one.keys() == other.keys() and all(
        one[x].dtype == other[x].dtype
        and one[x].shape == other[x].shape
        and one[x].contiguous().numpy(force=True).tobytes()
        == other[x].contiguous().numpy(force=True).tobytes()
        if one[x].dtype != torch.bfloat16
        else torch.equal(one[x].view(torch.int16), other[x].view(torch.int16))
        for x in one
    )


def masks_plan(case):
    """Return a plan of single weights for the model of a case."""
    generator = torch.Generator().manual_seed(3)
    weights = [name for name in case.plan.wiring if f"{name}.weight" in case.rows]
    masks = {
        f"{name}.weight": torch.rand(
            case.model.get_submodule(name).weight.shape, generator=generator
        ) < 0.3
        for name in weights
    }  # fmt: skip
    wiring = {name: layer(case.model, name) for name in weights}
    return made_plan(
        granularity="weight", criterion="swr", masks=masks, wiring=wiring,
        fingerprint=fingerprint(case.model),
    )  # fmt: skip


def expected(model, plan, **treatment):
    """Return the state dict of a model that is loaded, re-initialised and saved."""
    model = copy.deepcopy(model)
    fastplastic.reinit_(model, plan, **treatment)
    return model.state_dict()


def on_meta(case):
    """Return the model of a case without values."""
    return copy.deepcopy(case.model).to("meta")


def trained(model, inputs, kind=torch.optim.AdamW, **options):
    """Return an optimizer that has made a step."""
    optimizer = kind(model.parameters(), lr=0.01, **options)
    model(inputs).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def save_spread(rank, folder, make):
    """In each process of a pool: save what fully_shard has spread, and its optimizer."""
    case = filled(make)
    torch.manual_seed(1)
    mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
    model = fully_shard(case.model, mesh=mesh)
    optimizer = trained(model, case.inputs)
    weights, state = get_state_dict(model, optimizer)
    save({"model": weights, "optim": state, "epoch": 3}, checkpoint_id=folder)
    return rank
