"""What several processes do with one model: functions that another process can find."""

import os
from unittest.mock import patch

import timm
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import fastplastic
from fastplastic.errors import FastPlasticError
from fastplastic.measure import run

CRITERIA = ("dormant", "gradient", "first_order", "random")


def model_of(name):
    """Return a model in eval mode, the same in each process; every branch of it counts."""
    torch.manual_seed(0)
    if name == "mlp":
        layers = [nn.Linear(6, 10), nn.BatchNorm1d(10), nn.ReLU(), nn.Linear(10, 9), nn.GELU()]
        return nn.Sequential(*layers, nn.Linear(9, 3)).eval()
    model = timm.create_model(name, num_classes=3).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.rand_like(parameter) + 0.01)
    return model


def batches_of(name, count):
    """Return batches, each by its number."""
    shape = {"mlp": (6,), "test_vit": (3, 160, 160)}.get(name, (3, 64, 64))
    draw = [torch.Generator().manual_seed(number) for number in range(count)]
    return [(torch.randn(4, *shape, generator=g), torch.arange(4) % 3) for g in draw]


def spread(model, size, kind):
    """Spread the parameters of a model over all processes, or over half of them, with copies."""
    shape = (size,) if kind == "fsdp" else (2, size // 2)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("copies", "parts")[-len(shape) :])
    for module in [m for m in model.modules() if type(m).__name__ in ("BasicBlock", "Block")]:
        fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)


def hooks_of(model):
    """Return the hooks of all modules and parameters, in their order."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    modules = [
        [list(getattr(module, kind).values()) for kind in kinds] for module in model.modules()
    ]
    of_parameters = ("_backward_hooks", "_post_accumulate_grad_hooks")
    return modules, [
        [list((getattr(parameter, kind, None) or {}).values()) for kind in of_parameters]
        for parameter in model.parameters()
    ]


def profiled(rank, size, kind, name, count, **options):
    """Return the tables, plans and figures of a profile; each process has its share of batches."""
    model = model_of(name)
    if kind in ("fsdp", "hybrid"):
        spread(model, size, kind)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    own, hooks, state = batches_of(name, count)[rank::size], hooks_of(model), torch.get_rng_state()
    profile = fastplastic.profile(model, own, **options)
    assert hooks_of(model) == hooks and torch.equal(torch.get_rng_state(), state)
    for key, value in model.state_dict().items():
        assert torch.equal(getattr(value, "_local_tensor", value),
                           getattr(before[key], "_local_tensor", before[key]))  # fmt: skip
    assert all(parameter.grad is None for parameter in model.parameters())
    return {
        "tables": {layer.name: layer.stats.table for layer in profile},
        "plans": {name: units_of(profile, name) for name in CRITERIA},
        "figures": (profile.samples, profile.batches, profile.mode, profile.notes),
    }


def without_gradients(rank, size, kind):
    """Return plans by what is seen in forward passes alone, and figures."""
    model = model_of("test_resnet")
    if kind in ("fsdp", "hybrid"):
        spread(model, size, kind)
    batches = batches_of("test_resnet", 3)[rank::size]
    profile = fastplastic.profile(model, batches, backward=False)
    sums = {layer.name: layer.stats["sum_abs_w"] for layer in profile}
    return units_of(profile, "dormant"), (profile.samples, profile.batches), sums


def units_of(profile, criterion):
    plan = fastplastic.plan(profile, criterion=criterion, ratio=0.3)
    return {name: units.tolist() for name, units in plan.units.items()}


def refused(rank, size, kind, name, count, **options):
    """Return the text of the error."""
    try:
        profiled(rank, size, kind, name, count, **options)
    except FastPlasticError as error:
        return str(error)
    return ""


def different_models(rank, size):
    name = "mlp" if rank else "test_resnet"
    try:
        fastplastic.profile(model_of(name), batches_of(name, 1))
    except FastPlasticError as error:
        return str(error)
    return ""


def one_fails(rank, size):
    """Let the loss of one process fail in its second batch; all go on with the next profile."""
    model, batches = model_of("mlp"), batches_of("mlp", 3)
    seen = []

    def bad(output, targets):
        if rank == 1 and seen:
            raise ValueError("by hand")
        seen.append(1)
        return output.sum()

    said = ""
    try:
        fastplastic.profile(model, batches, loss_fn=bad)
    except (FastPlasticError, ValueError) as error:
        said = str(error)
    return said, fastplastic.profile(model, batches).batches


def no_loss_is_finite(rank, size, kind):
    """Return whether any weight has a gradient where no loss is a number."""
    model = model_of("mlp")
    if kind == "fsdp":
        spread(model, size, kind)
    profile = fastplastic.profile(
        model, batches_of("mlp", 2), loss_fn=lambda output, _: output.sum() * float("nan")
    )
    rows = ("n_dw", "n_nonfinite_dw")
    return [any(bool(layer.stats[row].any()) for row in rows) for layer in profile]


class EitherOrder(nn.Module):
    """Two layers of one size, whose order the caller chooses."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.out = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x, turned=False):
        first, second = (self.two, self.one) if turned else (self.one, self.two)
        return self.out(second(first(x).relu()).relu())


def other_trace(rank):
    """Return what is said of another trace in one process, and of one that fails there."""
    torch.manual_seed(0)
    model, batches = EitherOrder().eval(), batches_of("mlp", 2)
    x = batches[0][0]
    examples = {"x": x, "turned": rank == 1}
    said = [said_of(lambda: fastplastic.profile(model, batches, example_inputs=examples))]
    with patch.object(run, "build_graph", broken if rank == 1 else run.build_graph):
        try:
            said.append(said_of(lambda: fastplastic.profile(model, batches)))
        except ZeroDivisionError as error:
            said.append(str(error))
    return [*said, said_of(lambda: fastplastic.profile(model, batches))]


def broken(*_):
    """Fail to trace a model."""
    raise ZeroDivisionError("by hand")


def failing_batch(rank):
    """Let the second batch of one process fail, and the process end, while the other waits."""
    model = model_of("mlp")
    spread(model, 2, "fsdp")
    batches = batches_of("mlp", 3)
    if rank == 1:
        batches[1] = (torch.randn(4, 5), batches[1][1])
    try:
        fastplastic.profile(model, batches)
    except Exception as error:
        if rank == 1:
            # Before it ends: it has not waited for the other.
            print(f"own error: {type(error).__name__}", flush=True)
            os._exit(1)
        return str(error)


def wrapped(rank):
    """Return what is said of a model in DistributedDataParallel, and of copies that differ."""
    model, batches = model_of("mlp"), batches_of("mlp", 2)
    plan = fastplastic.plan(fastplastic.profile(model, batches), ratio=0.2)
    ddp = nn.parallel.DistributedDataParallel(model_of("mlp"))
    said = [
        said_of(lambda: fastplastic.profile(ddp, batches)),
        said_of(lambda: fastplastic.reinit_(ddp, plan)),
    ]
    with torch.no_grad():
        model[0].weight[0, 0] += rank == 1
    return [*said, said_of(lambda: fastplastic.profile(model, batches))]


def said_of(call):
    """Return what a call raises, in words."""
    try:
        call()
    except FastPlasticError as error:
        return str(error)
    return ""
