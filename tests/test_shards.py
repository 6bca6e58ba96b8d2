"""Parts of weights in many processes: the same bits and the same selection as the whole weights."""

import importlib
import math
from functools import cache

import numpy as np
import pytest
import torch
from helpers.ranks import Box, Twin, boxes, on_ranks, shard_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, distributed

from fastplastic.kernels import Law, WeightShard, resample_, select, selection_masks
from fastplastic.kernels.philox import INITIAL_VALUES, TIES, philox_key
from fastplastic.kernels.reference.select import philox_words

BACKENDS = ["gpu", "cpu", "reference"]
CRITERIA = ["swr", "gradient", "magnitude", "random"]
NORMAL = Law("normal", 0.1, 0.5)
NAN, INF = math.nan, math.inf

# The interpreter of Triton computes with NumPy, which warns where a GPU does not.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")


@pytest.fixture(autouse=True)
def numpy_does_not_warn():
    with np.errstate(all="ignore"):
        yield


@pytest.fixture(params=BACKENDS)
def twin(request):
    return Twin(request.param)


# Rows, uneven; more shards than rows; columns; both; a dimension behind those; one element.
CUTS = [
    ((37, 101), (4,)),
    ((5, 7, 3, 3), (8,)),
    ((37, 101), (1, 3)),
    ((5, 7, 3, 3), (2, 3)),
    ((6, 4, 3, 5), (2, 1, 3, 2)),
    ((1, 1), (2, 2)),
    ((40,), (3,)),
    ((16, 64), (4, 2)),
]


@pytest.mark.parametrize(("shape", "counts"), CUTS, ids=str)
def test_shards_get_the_bits_of_the_whole_weight(twin, shape, counts):
    whole = torch.full(shape, NAN, device=twin.device)
    joined, mask = whole.clone(), (torch.rand(shape) < 0.7).to(twin.device)
    twin.resample_([whole], ["w"], [NORMAL], seed=3)
    cut = boxes(shape, *counts)
    parts = [joined[box].clone() for box in cut]
    shards = [shard_of(shape, box) for box in cut]
    for part, shard in zip(parts, shards, strict=True):
        twin.resample_([part], ["w"], [NORMAL], seed=3, shards=[shard])
    for part, box in zip(parts, cut, strict=True):
        joined[box] = part
    assert torch.equal(joined, whole)
    # Views of the weight itself, all by one call, where the mask says so.
    some = torch.zeros(shape, device=twin.device)
    views, masks = [some[box] for box in cut], [mask[box] for box in cut]
    n = len(cut)
    twin.resample_(views, ["w"] * n, [NORMAL] * n, seed=3, masks=masks, shards=shards)
    assert torch.equal(some, torch.where(mask, whole, 0.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_shards_of_other_dtypes_and_strides(twin, dtype):
    whole = torch.empty(16, 8, 3, 3, dtype=dtype, device=twin.device)
    twin.resample_([whole], ["w"], [NORMAL])
    for box in boxes(whole.shape, 3, 2):
        part = torch.empty_like(whole[box]).to(memory_format=torch.channels_last)
        twin.resample_([part], ["w"], [NORMAL], shards=[shard_of((16, 8, 3, 3), box)])
        assert torch.equal(part, whole[box])


def test_shards_differ_from_each_other(twin):
    """The mistake of drawing by local elements: every process would write the same numbers."""
    parts = [torch.empty(10, 50, device=twin.device) for _ in range(4)]
    for i, part in enumerate(parts):
        twin.resample_([part], ["w"], [NORMAL], shards=[WeightShard((40, 50), (10 * i, 0))])
    # 2000 of 2^23 numbers: some 0.2 pairs are equal.
    assert len(torch.cat(parts).unique()) > 1990
    masks = []
    zeros = torch.zeros(10, 50, device=twin.device)
    ranks = [[WeightShard((40, 50), (10 * i, 0))] for i in range(4)]
    found = on_ranks(
        twin, [[zeros]] * 4, None, ["w"], 1000, ranks, criterion="magnitude", masks=masks
    )
    assert found.counts == (1000,)
    flat = torch.stack([own[0].flatten() for own in masks]).float()
    # By chance half of two masks agree; the same masks agree everywhere.
    for i in range(4):
        for j in range(i):
            assert 0.35 < (flat[i] == flat[j]).float().mean() < 0.65


def model(device: str) -> tuple[list[Tensor], list[Tensor]]:
    """Return weights and gradients with many ties, NaN, infinities and zeros."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(37, 101), (5, 7, 3, 3), (1, 1), (40,), (16, 64), ()]
    weights = [torch.randn(shape, generator=generator).round(decimals=1) for shape in shapes]
    gradients = [torch.randn(shape, generator=generator).round(decimals=1) for shape in shapes]
    weights[0][3, :20], weights[0][30, 5:9], gradients[1][2, 3] = NAN, INF, NAN
    return [w.to(device) for w in weights], [g.to(device) for g in gradients]


# Of each weight, into how many parts its first dimensions are cut; () where all hold all of it.
MESHES = {
    "4 by rows": (4, [(4,), (4,), (4,), (4,), (4,), ()]),
    "3 by columns": (3, [(1, 3), (1, 3), (1, 3), (3,), (1, 3), ()]),
    "2 by 2": (4, [(2, 2), (2, 2), (2, 2), (4,), (2, 2), ()]),
    "2 by 3": (6, [(2, 3), (2, 3), (2, 3), (6,), (2, 3), ()]),
}


def ways_of(tensors: list[Tensor], n: int, counts) -> list[list[Box]]:
    """Return the box of each process in each weight: all of it where that is not cut."""
    pairs = zip(tensors, counts, strict=True)
    return [boxes(tuple(t.shape), *own) if own else [()] * n for t, own in pairs]


def cut_model(tensors: list[Tensor], n: int, counts) -> list[list[Tensor]]:
    """Return the parts of each process."""
    pairs = list(zip(tensors, ways_of(tensors, n, counts), strict=True))
    return [[tensor[way[rank]].clone() for tensor, way in pairs] for rank in range(n)]


def cut_shards(tensors: list[Tensor], n: int, counts) -> list[list[WeightShard]]:
    """Return the shards of each process; process 1 counts what all hold."""
    each = list(zip(tensors, ways_of(tensors, n, counts), counts, strict=True))
    return [
        [
            shard_of(tuple(tensor.shape), way[rank], counted=bool(own) or rank == 1)
            for tensor, way, own in each
        ]
        for rank in range(n)
    ]


@cache
def expected(criterion: str, n: int, count: int, caps: tuple[int, ...] | None, seed: int):
    """Return the masks of the whole weights, the first n of them, by the sort of the reference."""
    reference = Twin("reference")
    weights, gradients = (tensors[:n] for tensors in model("cpu"))
    names = [f"layer{i}" for i in range(n)]
    found = reference.select(
        weights, gradients, names, count, criterion=criterion, caps=caps, seed=seed
    )
    return found, reference.selection_masks(found, weights, gradients)


def check_mesh(twin, mesh, criterion, count, caps, seed):
    n, counts = MESHES[mesh]
    # As many weights as there are caps.
    counts = counts[: len(caps)]
    weights, gradients = (tensors[: len(caps)] for tensors in model(twin.device))
    names = [f"layer{i}" for i in range(len(caps))]
    limits = tuple(caps) if min(caps) >= 0 else None
    whole, masks = expected(criterion, len(caps), count, limits, seed)
    parts: list[list[Tensor]] = []
    found = on_ranks(
        twin, cut_model(weights, n, counts), cut_model(gradients, n, counts), names, count,
        cut_shards(weights, n, counts), criterion=criterion, caps=limits, seed=seed, masks=parts,
    )  # fmt: skip
    assert (found.counts, found.eligible) == (whole.counts, whole.eligible)
    assert sum(found.counts) == count
    for own, marked in zip(cut_model(masks, n, counts), parts, strict=True):
        assert all(torch.equal(mask, other.cpu()) for mask, other in zip(own, marked, strict=True))


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("folder", ["cpu", "reference"])
def test_every_process_selects_what_one_would(folder, mesh, criterion):
    check_mesh(Twin(folder), mesh, criterion, 2000, [-1] * 6, seed=0)
    check_mesh(Twin(folder), mesh, criterion, 1501, [1500, 100, 1, 3, 400, 1], seed=1)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_gpu_selects_what_one_would(criterion):
    # The interpreter is slow.
    check_mesh(Twin("gpu"), "2 by 2", criterion, 1501, [1500, 100], seed=1)


@st.composite
def splits(draw):
    shape = tuple(draw(st.lists(st.integers(1, 7), min_size=1, max_size=4)))
    counts = tuple(draw(st.integers(1, 3)) for _ in shape)
    numbers = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0**-149, 3.5, INF, NAN])
    size = math.prod(shape)
    values = draw(st.lists(numbers, min_size=size, max_size=size))
    weight = torch.tensor(values, dtype=torch.float32).reshape(shape)
    return weight, counts, draw(st.floats(0, 1)), draw(st.booleans()), draw(st.integers(0, 9))


@settings(max_examples=60)
@given(case=splits())
def test_any_split_selects_and_draws_the_same(case):
    weight, counts, share, capped, seed = case
    shape, cut = tuple(weight.shape), boxes(tuple(weight.shape), *counts)
    eligible = int((~weight.isnan()).sum())
    caps = [eligible // 2] if capped else None
    count = round(share * (eligible // 2 if capped else eligible))
    shards = [[shard_of(shape, box)] for box in cut]
    whole = select([weight], None, ["w"], count, criterion="magnitude", caps=caps, seed=seed)
    (mask,) = selection_masks(whole, [weight], None)
    masks: list[list[Tensor]] = []
    parts = [[weight[box].clone()] for box in cut]
    found = on_ranks(
        Twin("cpu"), parts, None, ["w"], count, shards, criterion="magnitude", caps=caps,
        seed=seed, masks=masks,
    )  # fmt: skip
    assert found.counts == whole.counts == (count,)
    assert all(torch.equal(own[0], mask[box]) for own, box in zip(masks, cut, strict=True))
    resample_([weight], ["w"], [NORMAL], seed=seed)
    for (part,), own, box in zip(parts, shards, cut, strict=True):
        resample_([part], ["w"], [NORMAL], seed=seed, shards=own)
        assert torch.equal(part, weight[box])
        numbers = torch.arange(weight.numel()).reshape(shape)[box].flatten()
        assert own[0].elements(part.shape).tolist() == numbers.tolist()


def test_a_thousand_shards_of_one_weight():
    shape, n = (1000, 512), 1000
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator).round(decimals=2)
    whole = select([weight], None, ["w"], 50_001, criterion="magnitude")
    (mask,) = selection_masks(whole, [weight], None)
    rows = list(weight.clone().split(1))
    shards = [WeightShard(shape, (i, 0)) for i in range(n)]
    shapes: list[tuple[int, ...]] = []
    masks: list[list[Tensor]] = []
    found = on_ranks(
        Twin("cpu"), [[row] for row in rows], None, ["w"], 50_001, [[s] for s in shards],
        criterion="magnitude", masks=masks, shapes=shapes,
    )  # fmt: skip
    assert found.counts == (50_001,)
    assert torch.equal(torch.cat([own[0] for own in masks]), mask)
    assert len(shapes) <= 6
    resample_([weight], ["w"], [NORMAL])
    resample_(rows, ["w"] * n, [NORMAL] * n, shards=shards)
    assert torch.equal(torch.cat(rows), weight)


def test_parts_are_read_once_and_kept(monkeypatch):
    """Who compares the count of all with a part of the scores reads that again, and keeps none."""
    histogram = importlib.import_module("fastplastic.kernels.cpu.histogram")
    calls, scan = [], histogram._scan

    def counting(*arguments):
        calls.append(arguments)
        scan(*arguments)

    monkeypatch.setattr(histogram, "_scan", counting)
    weight = torch.randn(400, 500, generator=torch.Generator().manual_seed(0))
    shards = [[WeightShard((400, 500), (100 * i, 0))] for i in range(4)]
    parts = [[part] for part in weight.split(100)]
    on_ranks(Twin("cpu"), parts, None, ["w"], 30_000, shards, criterion="magnitude")
    # A sample, then all.
    assert len(calls) == 2 * 4


def test_elements_beyond_32_bits(twin):
    """No whole weight of that size fits here: what the words of its elements say is expected."""
    shape, key, law = (3 << 20, 1 << 12), philox_key(0, INITIAL_VALUES, "w"), Law("uniform", 0, 1)
    rows = torch.empty(2, 1 << 12, device=twin.device)
    for part, offsets in ((rows, (1 << 20, 0)), (rows[:, 100:300], ((1 << 20) + 7, 100))):
        shard = WeightShard(shape, offsets)
        assert shard.first >= 1 << 32
        twin.resample_([part], ["w"], [law], shards=[shard])
        words = philox_words(key, shard.elements(part.shape)) >> np.uint32(9)
        assert part.flatten().tolist() == ((words + 0.5) * 2.0**-23).astype(np.float32).tolist()


@pytest.mark.parametrize("criterion", CRITERIA)
def test_what_is_added_up_does_not_grow_with_the_weights(twin, criterion):
    bins, keys = (256, 4) if twin.select.__module__.split(".")[-2] == "gpu" else (2048, 3)
    for rows in (4, 400):
        weights = [[torch.ones(rows, 8, device=twin.device)] * 2 for _ in range(2)]
        shards = [[WeightShard((2 * rows, 8), (rows * rank, 0))] * 2 for rank in range(2)]
        shapes: list[tuple[int, ...]] = []
        on_ranks(
            twin, weights, weights, ["a", "b"], rows * 16 + 1, shards, criterion=criterion,
            shapes=shapes,
        )  # fmt: skip
        assert shapes[0] == (2, bins + 1) and set(shapes[1:]) <= {(2, bins)}
        # Where all scores are equal the words decide, and equal words do not occur here.
        assert keys < len(shapes) <= 2 * keys


@pytest.mark.parametrize("folder", ["cpu", "reference"])
def test_equal_words_of_two_processes_are_cut_at_the_element(folder):
    twin = Twin(folder)
    words = philox_words(philox_key(0, TIES, "a"), np.arange(1 << 17))
    order = np.argsort(words, kind="stable")
    rank = int(np.flatnonzero(np.diff(words[order].astype(np.int64)) == 0)[0])
    first, second = (int(e) for e in order[rank : rank + 2])
    # Each of the two is held by another process.
    shards = [[WeightShard((1 << 17,), (0,))], [WeightShard((1 << 17,), (second,))]]
    zeros = [[torch.zeros(second)], [torch.zeros((1 << 17) - second)]]
    masks: list[list[Tensor]] = []
    on_ranks(twin, zeros, None, ["a"], rank + 1, shards, criterion="random", masks=masks)
    mask = torch.cat([own[0] for own in masks])
    assert mask[first] and not mask[second]
    assert int(mask.sum()) == rank + 1


def test_one_process_without_a_single_element(twin):
    weight = torch.arange(12.0, device=twin.device).reshape(4, 3)
    shards = [[WeightShard((4, 3), (0, 0))], [WeightShard((4, 3), (4, 0))]]
    masks: list[list[Tensor]] = []
    # As fully_shard leaves it: no rows, or no dimensions at all.
    for empty in (weight[:0], weight.new_empty(0)):
        masks.clear()
        on_ranks(
            twin, [[weight], [empty]], None, ["w"], 5, shards, criterion="magnitude", masks=masks
        )
        assert masks[0][0].flatten().nonzero().flatten().tolist() == [0, 1, 2, 3, 4]
        assert masks[1][0].shape == empty.shape
        twin.resample_([empty], ["w"], [NORMAL], shards=shards[1])


def test_all_reduce_is_such_a_sum():
    weight = torch.arange(12.0)
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        found = select(
            [weight], None, ["w"], 5, criterion="magnitude", reduce=distributed.all_reduce
        )
    finally:
        distributed.destroy_process_group()
    assert found == select([weight], None, ["w"], 5, criterion="magnitude")


@pytest.mark.parametrize("returned", [False, True])
def test_a_sum_may_be_returned(twin, returned):
    weight = torch.arange(12.0, device=twin.device)
    calls = []

    def reduce(table):
        calls.append(table.device.type)
        return table.clone() if returned else None

    found = twin.select([weight], None, ["w"], 5, criterion="magnitude", reduce=reduce)
    alone = twin.select([weight], None, ["w"], 5, criterion="magnitude")
    assert twin.selection_masks(found, [weight], None)[0].tolist() == [True] * 5 + [False] * 7
    assert found.counts == alone.counts and set(calls) == {twin.device}


def test_a_shard_is_what_its_numbers_are():
    assert WeightShard(torch.Size([4, 3]), [2, 0]) == WeightShard((4, 3), (2, 0))
    assert hash(WeightShard((4, 3), (2, 0))) != hash(WeightShard((4, 3), (1, 0)))
