"""Models whose parameters are spread over processes: their wiring, and which part is where."""

import itertools
from types import SimpleNamespace

import pytest
import timm
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.testing._internal.distributed.fake_pg import FakeStore

from fastplastic.errors import InputError
from fastplastic.graph import build_graph
from fastplastic.model import batch_group, local_of, part_of


@pytest.fixture
def mesh():
    """The last of four processes, the others of which are not there: nothing is ever sent."""
    dist.init_process_group("fake", store=FakeStore(), rank=3, world_size=4)
    yield init_device_mesh("cpu", (4,))
    dist.destroy_process_group()


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 10), nn.BatchNorm1d(10), nn.ReLU(), nn.Linear(10, 9), nn.GELU(),
        nn.Linear(9, 3),
    )  # fmt: skip


def same_wiring(one, other):
    assert one.note is None and other.note is None
    assert [layer.name for layer in one.layers] == [layer.name for layer in other.layers]
    for mine, theirs in zip(one.layers, other.layers, strict=True):
        assert torch.equal(mine.hidden, theirs.hidden)
        assert mine.activations == theirs.activations
        assert [c.name for c in mine.consumers] == [c.name for c in theirs.consumers]
        for a, b in zip(mine.consumers, theirs.consumers, strict=True):
            assert torch.equal(a.unit_of_column, b.unit_of_column)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_a_sharded_model_is_wired_as_the_whole(mesh, name):
    model, inputs = timm.create_model(name).eval(), torch.randn(2, 3, 64, 64)
    if name == "test_vit":
        inputs = torch.randn(2, 3, 160, 160)
    whole = build_graph(model, inputs)
    seen = []
    model.register_forward_pre_hook(lambda *_: seen.append(1))
    for block in [m for m in model.modules() if type(m).__name__ in ("BasicBlock", "Block")]:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    before = [dict(module._forward_pre_hooks) for module in model.modules()]
    kept = dict(model.named_parameters())
    same_wiring(build_graph(model, inputs), whole)
    # The hooks of others run in a trace, and all is as before.
    assert len(seen) == 2
    assert [dict(module._forward_pre_hooks) for module in model.modules()] == before
    after = dict(model.named_parameters())
    assert all(after[key] is value for key, value in kept.items())
    assert all(isinstance(value, DTensor) for value in after.values())


def test_a_model_in_tensor_parallel_is_wired_as_the_whole(mesh):
    whole = build_graph(mlp().eval(), torch.randn(2, 6))
    model = parallelize_module(mlp().eval(), mesh, {"0": ColwiseParallel(), "3": RowwiseParallel()})
    same_wiring(build_graph(model, torch.randn(2, 6)), whole)


def test_tied_parameters_stay_tied(mesh):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(4, 4), nn.Linear(4, 4)
            self.down.weight = self.up.weight

        def forward(self, x):
            return self.down(self.up(x).relu())

    whole = build_graph(Tied(), torch.randn(2, 4))
    model = Tied()
    fully_shard(model, mesh=mesh)
    found = build_graph(model, torch.randn(2, 4))
    same_wiring(found, whole)
    assert [layer.tied for layer in found.layers] == [layer.tied for layer in whole.layers]


@pytest.mark.parametrize("shape", [(7, 5), (3, 4), (1, 3), (6, 1), (5, 7, 3)])
def test_which_part_is_here(shape):
    """Uneven and empty parts, over one dimension and over two; the numbers tell where they are."""
    values = torch.arange(torch.Size(shape).numel()).view(shape)
    for rank in range(4):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=4)
        try:
            mesh = init_device_mesh("cpu", (2, 2))
            for placed in itertools.product([Shard(0), Shard(1), Replicate()], repeat=2):
                # Without a process that sends: each cuts its own part out of what it has.
                spread = distribute_tensor(values, mesh, placed, src_data_rank=None)
                part = part_of("w", spread)
                at = tuple(
                    slice(begin, begin + size)
                    for begin, size in zip(part.offsets, part.sizes, strict=True)
                )
                assert torch.equal(values[at], local_of(spread))
                assert part.shape == shape and part.whole == (part.sizes == shape)
                copies = [i for i, p in enumerate(placed) if p.is_replicate()]
                assert part.first == all((rank // 2, rank % 2)[i] == 0 for i in copies)
        finally:
            dist.destroy_process_group()


def test_a_plain_tensor_is_whole():
    tensor = torch.zeros(3, 2)
    part = part_of("w", tensor)
    assert (part.shape, part.offsets, part.sizes) == ((3, 2), (0, 0), (3, 2))
    assert part.whole and part.first and local_of(tensor) is tensor


def test_sums_to_be_made_are_refused(mesh):
    partial = DTensor.from_local(torch.zeros(3, 2), mesh, [Partial()])
    with pytest.raises(InputError) as error:
        part_of("fc.weight", partial)
    assert str(error.value) == (
        f"'fc.weight' is placed as ('P(sum)',) on a mesh of ({mesh.size()},): expected a block of "
        "it in each process (Shard, Replicate): re-initialise before it is placed so"
    )


def where_it_is(model, size=4, rank=3):
    return batch_group(model, SimpleNamespace(size=size, rank=rank, share=lambda own: [own] * size))


def test_who_shares_batches(mesh):
    model = parallelize_module(mlp(), mesh, {"0": ColwiseParallel(), "3": RowwiseParallel()})
    group = where_it_is(model)
    assert (group.ranks, group.place, group.every) == ((0, 1, 2, 3), 3, ((0, 1, 2, 3),))
    sharded = mlp()
    fully_shard(sharded, mesh=mesh)
    with pytest.raises(InputError, match="process 0 shares layers with processes 3, which do not"):
        where_it_is(sharded)
    assert batch_group(mlp(), None).alone


def test_placements_that_are_not_understood_are_refused(mesh):
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    names = "as ('S(0)', 'R') on a mesh of (2, 2), there are 4 processes"
    model = mlp()
    weight = distribute_tensor(model[0].weight, square, [Shard(0), Replicate()], src_data_rank=None)
    model[0].weight = nn.Parameter(weight)
    refused = {"a mesh of two dimensions": (model, names)}
    model = mlp()
    fully_shard(model, mesh=square["dp"])
    names = "as ('S(0)',) on a mesh of (2,), there are 4 processes"
    refused["a mesh that is smaller than the world"] = (model, names)
    model = mlp()
    weight = DTensor.from_local(torch.zeros(10, 6), mesh, [Partial()])
    model[0].weight = nn.Parameter(weight)
    refused["sums to be made"] = (model, "as ('P(sum)',) on a mesh of (4,), there are 4 processes")
    for model, text in refused.values():
        with pytest.raises(InputError) as error:
            where_it_is(model)
        assert str(error.value) == (
            f"'0.weight' is placed {text}, expected all of them to share it by fully_shard, by "
            "parallelize_module on a mesh of one dimension, or by both: call this before the model "
            "is spread"
        )
    model = parallelize_module(mlp(), mesh, {"0": ColwiseParallel()})
    parallelize_module(model, square["tp"], {"3": RowwiseParallel()})
    with pytest.raises(InputError) as error:
        where_it_is(model)
    assert str(error.value) == (
        "'0.weight' is spread over processes 0, 1, 2, 3, '3.weight' over 2, 3, expected one mesh "
        "of tensor parallelism for all layers"
    )
