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
from fastplastic.measure.together import parts_of
from fastplastic.model import local_of, part_of


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


def test_tensor_parallelism_is_refused(mesh):
    """Its processes have no batches of their own, and see a part of each activation."""
    model = parallelize_module(mlp(), mesh, {"0": ColwiseParallel(), "3": RowwiseParallel()})
    with pytest.raises(InputError) as error:
        parts_of(model, SimpleNamespace(size=4, rank=3))
    assert str(error.value) == (
        "'0.weight' is placed as ('S(0)',) on a mesh of (4,), there are 4 processes, expected all "
        "of them to share it by fully_shard alone: profile before tensor parallelism is applied"
    )
