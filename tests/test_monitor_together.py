"""Monitors of several processes that train one model, copied (DDP) or spread (FSDP2), over gloo."""

import pytest
import torch
from helpers.processes import Pool
from helpers.watched import EVEN, UNEVEN, dying, mixed, refused, several, trained
from torch import distributed

from fastplastic.stats import STATISTICS

# Gradients of activations are those of the loss of each process.
_SIZE = {"sum_abs_g": 1, "sum_sq_g": 2}
NOBODY = ((0, 4), (0, 4))


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    pool = Pool(2, str(tmp_path_factory.mktemp("monitors") / "store"))
    yield pool
    pool.close()


def joined(name, size=2, **options):
    """Return what one process says of the batches of all."""
    return times_size(trained(0, "", name, whole=True, **options), size)


def times_size(expected, size=2):
    for table in expected["tables"].values():
        for row, power in _SIZE.items():
            table[STATISTICS.index(row)] *= size**power
    return expected


def check(found, expected, atol=2e-6):
    """All processes say the same, and what one says of the batches of all."""
    first, *others = found
    for layer, table in expected["tables"].items():
        scale = table.abs().nan_to_num(0, 0, 0).amax(1, keepdim=True) + 1e-12
        torch.testing.assert_close(
            first["tables"][layer] / scale, table / scale, rtol=0, atol=atol, msg=layer
        )
        counts = [row for row, what in enumerate(STATISTICS) if what.startswith("n_")]
        counts = [row for row in counts if atol < 1e-3 or STATISTICS[row] != "n_flat"]
        assert torch.equal(first["tables"][layer][counts], table[counts])
    for other in others:
        for layer, table in first["tables"].items():
            assert torch.equal(other["tables"][layer], table)
        assert (other["plan"], other["figures"]) == (first["plan"], first["figures"])
    assert first["plan"] == expected["plan"]
    assert first["figures"][:3] == expected["figures"][:3]


CASES = {
    "ddp": {"kind": "ddp", "name": "cnn", "sizes": UNEVEN},
    "ddp, recomputed": {
        "kind": "ddp", "name": "block", "recompute": False,
        "options": {"static_graph": True, "gradient_as_bucket_view": True},
    },
    "ddp, recomputed in passes of their own": {"kind": "ddp", "name": "block", "recompute": True},
    # The first process never has a batch.
    "ddp, no batch": {"kind": "ddp", "name": "cnn", "sizes": NOBODY},
    "ddp, every second": {"kind": "ddp", "name": "cnn", "every": 2, "sizes": EVEN * 2},
    # Weights that one process alone has used.
    "ddp, unused": {"kind": "ddp", "name": "experts", "options": {"find_unused_parameters": True}},
    "ddp, gradients set to 0": {"kind": "ddp", "name": "cnn", "zeros": True},
    "ddp, no optimizer": {"kind": "ddp", "name": "cnn", "by_hand": True},
    "fsdp": {"kind": "fsdp", "name": "cnn", "sizes": UNEVEN},
    "fsdp, kept gathered, recomputed": {
        "kind": "fsdp", "name": "block", "recompute": False,
        "options": {"reshard_after_forward": False},
    },
    "fsdp, an empty batch": {"kind": "fsdp", "name": "cnn", "sizes": NOBODY},
}  # fmt: skip


def test_the_profile_is_that_of_the_joined_batches(two):
    found = two.run(several, list(CASES.values()))
    for number, (case, call) in enumerate(CASES.items()):
        same = call.keys() & {"sizes", "recompute", "every", "by_hand", "zeros"}
        expected = joined(call["name"], **{key: call[key] for key in same})
        try:
            check([own[number] for own in found], expected)
        except AssertionError as error:
            error.add_note(case)
            raise


ACCUMULATED = {
    "ddp, each pass reduces": {"kind": "ddp", "name": "cnn", "split": 2},
    "ddp, the last pass reduces": {"kind": "ddp", "name": "cnn", "split": 2, "sync": False},
    "fsdp, each pass reduces": {"kind": "fsdp", "name": "cnn", "split": 2},
    "fsdp, the last pass reduces": {"kind": "fsdp", "name": "cnn", "split": 2, "sync": False},
}


def test_gradients_that_are_accumulated_are_read_as_the_optimizer_sees_them(two):
    found = two.run(several, list(ACCUMULATED.values()))
    expected = joined("cnn", split=2)
    for number in range(len(ACCUMULATED)):
        check([own[number] for own in found], expected)


def test_a_step_that_overflows_in_one_process_is_dropped_in_all(two):
    calls = [
        {"kind": kind, "name": "cnn", "scaler": 1024.0, "sizes": EVEN * 2}
        for kind in ("ddp", "fsdp")
    ]
    found = two.run(several, calls)
    expected = joined("cnn", scaler=1024.0, sizes=EVEN * 2)
    text = "{} of {} steps had gradients that are not finite under the loss scale: left out"
    samples, mode, notes, seed = expected["figures"]
    assert notes == (text.format(1, 4),)
    expected["figures"] = samples, mode, (text.format(2, 8),), seed
    for number in range(len(calls)):
        check([own[number] for own in found], expected)


def test_mixed_precision_and_one_process(two):
    found = two.run(several, [{"kind": "fsdp", "name": "block", "options": mixed(torch.bfloat16)}])
    store = distributed.HashStore()
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        narrow = trained(0, "fsdp", "block", whole=True, options=mixed(torch.bfloat16))
        plain = trained(0, "fsdp", "block", whole=True)
    finally:
        distributed.destroy_process_group()
    check([plain], trained(0, "", "block", whole=True))
    # The kernels of two batches and of one round otherwise.
    check([own[0] for own in found], times_size(narrow), atol=2e-2)


def test_what_is_refused_and_what_is_not_measured(two):
    first, second = two.run(refused)
    for name in ("wrapper", "options", "models", "apart", "apart counts", "a part"):
        assert first[name] == second[name], name
    assert first["wrapper"] == (
        "InputError: the model is wrapped in a DistributedDataParallel, expected the module "
        "inside: Monitor(model.module)"
    )
    assert first["options"] == (
        "ProcessError: Monitor(): every is 2 in process 1 and 1 in process 0, expected the same in "
        "all"
    )
    assert first["models"].startswith("ProcessError: Monitor(): the model is ")
    assert first["apart"] == [
        "gradients of weights are not measured: they differed between the processes behind their "
        "backward passes, where DistributedDataParallel or fully_shard make them the same"
    ]
    n_dw, n_in, n_g = first["apart counts"]
    assert (n_dw, n_in) == (0, 6 * 18) and n_g > 0
    assert first["alone"] == second["alone"] == 4
    assert first["a part"] == (
        "InputError: Monitor.compute() of one process alone, which has parts of the weights: "
        "expected the same call in all processes, without fastplastic.alone()"
    )
    assert first["failed"].startswith("ProcessError: Monitor.compute()")
    assert "process 1" in first["failed"] and second["failed"] == "by hand"
    assert first["again"] == second["again"] == 8


def test_four_processes_and_one_that_ends_within_compute(tmp_path):
    pool = Pool(4, str(tmp_path / "store"))
    sizes = ((2, 2, 2, 2), (2, 1, 2, 0))
    try:
        calls = [{"kind": kind, "name": "cnn", "sizes": sizes} for kind in ("ddp", "fsdp")]
        found = pool.run(several, calls)
        for number in range(2):
            check([own[number] for own in found], joined("cnn", 4, sizes=sizes))
        for pipe in pool._pipes:
            pipe.send((dying, ()))
        for rank in (0, 2, 3):
            assert pool._pipes[rank].poll(60), "waits for one that is gone"
            done, said = pool._pipes[rank].recv()
            assert done and said.startswith("ProcessError: Monitor.compute(): process 1 is"), said
    finally:
        pool.close()
