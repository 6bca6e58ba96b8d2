"""What several processes do with one model in tensor parallelism: for other processes to find."""

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.functional import cross_entropy, gelu

import fastplastic
from fastplastic.errors import FastPlasticError
from fastplastic.model import local_of, part_of
from fastplastic.training import Recycler
from helpers.together import CRITERIA, hooks_of, units_of

# Of each model, how its layers are cut.
PLANS = {
    "mlp": {
        "0": ("col", {}),
        "2": ("row", {}),
        "4": ("col", {"output_layouts": Replicate()}),
    },
    # Hooks see what goes into the next layer, before it is made a DTensor.
    "functions": {
        "up": ("col", {}),
        "down": ("row", {}),
        "out": ("col", {"output_layouts": Replicate()}),
    },
    # Slices of 2, 2, 1 and no units: torch takes them as DTensors only.
    "uneven": {"0": ("col", {"use_local_output": False}), "2": ("row", {})},
    "llama": {
        "model.layers.*.self_attn.q_proj": ("col", {}),
        "model.layers.*.self_attn.k_proj": ("col", {}),
        "model.layers.*.self_attn.v_proj": ("col", {}),
        "model.layers.*.self_attn.o_proj": ("row", {}),
        "model.layers.*.mlp.gate_proj": ("col", {}),
        "model.layers.*.mlp.up_proj": ("col", {}),
        "model.layers.*.mlp.down_proj": ("row", {}),
        "lm_head": ("col", {"output_layouts": Replicate()}),
    },
}
SIZE = 4
_STYLES = {"col": ColwiseParallel, "row": RowwiseParallel}


# What goes wrong, or cannot be measured, in slices.
OTHER_PLANS = {
    # The processes have other positions of what the first layer makes.
    "positions": {
        "0": ("row", {"input_layouts": Replicate(), "output_layouts": Shard(0)}),
        "2": ("col", {"input_layouts": Shard(0)}),
        "4": ("row", {}),
    },
    # Each has a summand of the gradients of what the second layer makes.
    "sums": {
        "0": ("col", {"use_local_output": False}),
        "2": ("row", {"use_local_output": False}),
        "4": ("col", {"use_local_output": False}),
        "6": ("row", {}),
    },
    # A weight that each process has whole, between slices.
    "heads": {"0": ("col", {}), "3": ("row", {})},
    # The loss is of a slice of the outputs.
    "outputs": {"4": ("col", {}), "6": ("row", {"output_layouts": Shard(-1)})},
}
PLANS |= OTHER_PLANS


class Functions(nn.Module):
    """Activation functions that are no modules."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.out = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.out(gelu(self.down(self.up(x).relu())))


def model_of(name):
    """Return a model in eval mode, the same in each process."""
    torch.manual_seed(0)
    if name == "llama":
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=16,
            attn_implementation="eager",
        )  # fmt: skip
        return LlamaForCausalLM(config).eval()
    if name == "functions":
        return Functions().eval()
    if name == "heads":
        head = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Flatten())
        layers = [nn.Linear(6, 8), nn.Unflatten(1, (-1, 4)), head, nn.Linear(8, 3)]
        return nn.Sequential(*layers).eval()
    width = 5 if name == "uneven" else 12
    layers = [nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 8), nn.GELU(), nn.Linear(8, 8)]
    return nn.Sequential(*layers, nn.Tanh(), nn.Linear(8, 3)).eval()


def batches_of(name, count):
    """Return batches, each by its number."""
    draw = [torch.Generator().manual_seed(number) for number in range(count)]
    if name != "llama":
        return [(torch.randn(4, 6, generator=g), torch.arange(4) % 3) for g in draw]
    batches = []
    for g in draw:
        tokens = torch.randint(1, 20, (3, 7), generator=g)
        mask = torch.ones_like(tokens)
        mask[0, 5:] = 0
        batches.append({"input_ids": tokens, "attention_mask": mask, "labels": tokens})
    return batches


def cut(model, name, groups, fsdp=False):
    """Cut the layers of a model over tensor parallelism, in one or several groups of processes."""
    mesh = init_device_mesh("cpu", (groups, SIZE // groups), mesh_dim_names=("dp", "tp"))
    plan = {key: _STYLES[style](**options) for key, (style, options) in PLANS[name].items()}
    parallelize_module(model, mesh["tp"], plan)
    if fsdp:
        blocks = model.model.layers if name == "llama" else ()
        for block in blocks:
            fully_shard(block, mesh=mesh["dp"])
        fully_shard(model, mesh=mesh["dp"])
    return mesh


def share_of(rank, groups, batches):
    """Return the batches of the group of a process."""
    return batches[rank // (SIZE // groups) :: groups]


def profiled(rank, groups, fsdp, name, count, whole=False):
    """Return tables, plans and figures of a profile; each group has its share of the batches."""
    model, own = model_of(name), batches_of(name, count)
    if not whole:
        cut(model, name, groups, fsdp)
        own = share_of(rank, groups, own)
    hooks, state = hooks_of(model), torch.get_rng_state()
    before = {key: local_of(value).clone() for key, value in model.state_dict().items()}
    profile = fastplastic.profile(model, own)
    assert hooks_of(model) == hooks and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(local_of(x), before[key]) for key, x in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    return {
        "tables": {layer.name: layer.stats.table for layer in profile},
        "plans": {name: units_of(profile, name) for name in CRITERIA},
        "figures": (profile.samples, profile.batches, profile.mode, profile.notes),
        "coverage": profile.coverage,
    }


def reinitialised(rank, groups, fsdp, name, adjust=False, whole=False):
    """Return all parameters after units of a plan are made afresh."""
    model, own = model_of(name), batches_of(name, 2)
    if not whole:
        cut(model, name, groups, fsdp)
        own = share_of(rank, groups, own)
    plan = fastplastic.plan(fastplastic.profile(model, own), criterion="dormant", ratio=0.3)
    fastplastic.reinit_(model, plan, seed=3, **({"batches": own} if adjust else {}))
    return {
        key: value.full_tensor() if isinstance(value, DTensor) else value.clone()
        for key, value in model.state_dict().items()
    }


def whole_weights(model):
    """Return all parameters, each as one tensor."""
    return {
        name: (own.full_tensor() if isinstance(own, DTensor) else own).detach().clone()
        for name, own in model.named_parameters()
    }


def single_weights(rank, groups, fsdp, criterion, whole=False):
    """Return counts and parameters after single weights of a plan are made afresh."""
    model, own = model_of("mlp"), batches_of("mlp", 2)
    if not whole:
        cut(model, "mlp", groups, fsdp)
        own = share_of(rank, groups, own)
    profile = fastplastic.profile(model, own, gradients=True)
    plan = fastplastic.plan(profile, criterion=criterion, granularity="weight", ratio=0.2)
    fastplastic.reinit_(model, plan, seed=3)
    return {"counts": plan.counts, "weights": whole_weights(model)}


def recycled(rank, method, whole=False):
    """Train with a Recycler; return what was re-initialised in which step, and the parameters."""
    model = model_of("mlp")
    if not whole:
        cut(model, "mlp", 1)
    optimizer = torch.optim.Adam(model.parameters(), 0.01, foreach=False)
    batches = batches_of("mlp", 4)
    options = {"threshold": 0.6} if method == "redo" else {}
    recycler = Recycler(model, batches[0][0], optimizer, method, every=2, **options)
    with recycler:
        for x, y in batches:
            cross_entropy(model(x), y).backward()
            optimizer.step()
            recycler.step()
            optimizer.zero_grad()
    return {
        "log": [(reset.step, reset.counts) for reset in recycler.log],
        "weights": whole_weights(model),
    }


def in_words(function, *arguments, **options):
    """Return what a call raises."""
    try:
        function(*arguments, **options)
    except FastPlasticError as error:
        return str(error)
    return ""


def watched(rank, groups, fsdp, name, whole=False):
    """Train for two steps under a monitor; return tables, plans and figures."""
    model = model_of(name)
    mine = range(groups)
    if not whole:
        cut(model, name, groups, fsdp)
        mine = share_of(rank, groups, list(mine))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, foreach=False)
    batches = batches_of(name, 2 * groups)
    with fastplastic.Monitor(model, batches[0][0]) as monitor:
        for step in range(2):
            own = [batches[step * groups + number] for number in mine]
            x, y = (torch.cat(values) for values in zip(*own, strict=True))
            cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    profile = monitor.compute()
    return {
        "tables": {layer.name: layer.stats.table for layer in profile},
        "plans": {name: units_of(profile, name) for name in ("dormant", "random")},
        "figures": (profile.samples, profile.mode, profile.notes),
        "coverage": profile.coverage,
    }


def refused(rank):
    """Return what is said of batches and losses that are not the same in a group."""
    found = {}
    model, place = model_of("mlp"), rank % 2
    cut(model, "mlp", 2)
    batches = batches_of("mlp", 3)
    found["batches"] = in_words(fastplastic.profile, model, batches[place:])
    found["fewer"] = in_words(fastplastic.profile, model, batches[: 2 - place])
    with fastplastic.Monitor(model, batches[0][0]) as monitor:
        model(batches[place][0]).sum().backward()
    found["calls"] = in_words(monitor.compute)
    model = model_of("mlp")
    cut(model, "outputs", 2)
    loss = {"loss_fn": lambda output, _: output.square().mean()}
    found["losses"] = in_words(fastplastic.profile, model, batches, **loss)
    model = nn.Sequential(nn.Linear(6, 8), Gated(), nn.Linear(4, 3))
    parallelize_module(model, init_device_mesh("cpu", (SIZE,)), {"0": ColwiseParallel()})
    found["kinds"] = in_words(fastplastic.profile, model, batches)
    return found


def parts(rank):
    """Return which elements of weights that both cut are read here, and if they are those."""
    mesh, found = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp")), []
    for rows in (8, 7, 5, 3, 1):
        for style in (ColwiseParallel, RowwiseParallel):
            model = nn.Sequential(nn.Linear(5, rows, bias=False))
            values = torch.arange(rows * 5.0).view(rows, 5)
            model[0].weight = nn.Parameter(values.clone())
            parallelize_module(model, mesh["tp"], {"0": style()})
            fully_shard(model, mesh=mesh["dp"])
            part = part_of("0.weight", model[0].weight)
            at = tuple(
                slice(begin, begin + size)
                for begin, size in zip(part.offsets, part.sizes, strict=True)
            )
            read = torch.zeros(rows, 5)
            read[at] = part.first
            found.append((read, torch.equal(values[at], local_of(model[0].weight))))
    return found


class Gated(nn.Module):
    """One half of the units opens the other."""

    def forward(self, x):
        gate, value = x.chunk(2, -1)
        return torch.relu(gate) * value


def partly(rank, name, whole=False):
    """Return a profile where something of a layer cannot be read."""
    model = model_of(name if name == "heads" else "mlp")
    own = batches_of("mlp", 2)
    if not whole:
        cut(model, name, 2)
        own = share_of(rank, 2, own)
    profile = fastplastic.profile(model, own)
    return {
        "tables": {layer.name: layer.stats.table for layer in profile},
        "skipped": profile.coverage.skipped, "notes": profile.notes,
    }  # fmt: skip


def several(rank, what, calls):
    """Make several calls in one trip."""
    return [globals()[what](rank, *call) for call in calls]
