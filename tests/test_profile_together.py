"""Profiles that several processes make of one model, copied or spread (FSDP2), over gloo."""

import pytest
import torch
from helpers.processes import Pool
from helpers.together import (
    different_models,
    failing_batch,
    no_loss_is_finite,
    one_fails,
    other_trace,
    profiled,
    refused,
    without_gradients,
    wrapped,
)

from fastplastic.stats import STATISTICS


@pytest.fixture(scope="module")
def pool_of(tmp_path_factory):
    """Return processes by their number, made when first needed."""
    pools = {}

    def made(size):
        if size not in pools:
            store = tmp_path_factory.mktemp("together") / "store"
            pools[size] = Pool(size, str(store))
        return pools[size]

    yield made
    for pool in pools.values():
        pool.close()


@pytest.mark.parametrize(
    ("size", "kind", "name", "count"),
    [
        (2, "fsdp", "mlp", 5),
        (4, "copies", "mlp", 5),
        (4, "fsdp", "test_resnet", 6),
        # Processes without any batch.
        (4, "copies", "mlp", 1),
        (4, "fsdp", "mlp", 1),
        # Two copies, each spread over half of the processes.
        (4, "hybrid", "mlp", 5),
    ],
)
def test_the_profile_is_that_of_one_process(pool_of, size, kind, name, count):
    expected = profiled(0, 1, "whole", name, count)
    first, *others = pool_of(size).run(profiled, size, kind, name, count)
    for layer, table in expected["tables"].items():
        scale = table.abs().nan_to_num(0, 0, 0).amax(1, keepdim=True) + 1e-12
        torch.testing.assert_close(
            first["tables"][layer] / scale, table / scale, rtol=0, atol=2e-6, msg=layer
        )
        counts = [row for row, what in enumerate(STATISTICS) if what.startswith("n_")]
        assert torch.equal(first["tables"][layer][counts], table[counts])
        for other in others:
            assert torch.equal(other["tables"][layer], first["tables"][layer])
    assert first["plans"] == expected["plans"]
    assert all(other["plans"] == first["plans"] for other in others)
    for one in (first, *others):
        assert one["figures"] == expected["figures"]


@pytest.mark.parametrize("kind", ["copies", "fsdp"])
def test_forward_alone(pool_of, kind):
    expected = without_gradients(0, 1, "whole")
    for found in pool_of(4).run(without_gradients, 4, kind):
        assert found[:2] == expected[:2]
        # What was gathered for the forward pass is not read in the place of parts.
        for layer, sums in expected[2].items():
            torch.testing.assert_close(found[2][layer], sums, rtol=1e-5, atol=1e-6)


def test_no_batch_in_any_is_an_error_in_all(pool_of):
    text = "there are no batches, expected at least one: check the data"
    assert pool_of(4).run(refused, 4, "copies", "mlp", 0) == [text] * 4


def test_different_models_are_named(pool_of):
    texts = set(pool_of(4).run(different_models, 4))
    assert len(texts) == 1
    text = texts.pop()
    assert text.startswith("profile: the model is ") and "in process 1 and" in text


def test_who_fails_is_named_in_the_others(pool_of):
    found = pool_of(4).run(one_fails, 4)
    text = "profile: process 1 failed: see the error there"
    assert [said for said, _ in found] == [text, "by hand", text, text]
    assert [batches for _, batches in found] == [12] * 4


@pytest.mark.parametrize("kind", ["copies", "fsdp"])
def test_without_any_finite_loss_there_are_no_gradients(pool_of, kind):
    assert pool_of(4).run(no_loss_is_finite, 4, kind) == [[False] * 3] * 4


def test_who_fails_in_the_middle_of_a_model_in_parts_waits_for_nobody(tmp_path, capfd):
    """The other is told when it ends: until then it waits for what torch sends."""
    pool = Pool(2, str(tmp_path / "store"))
    try:
        for pipe in pool._pipes:
            pipe.send((failing_batch, ()))
        assert pool._pipes[0].poll(30), "the other waits on"
        done, said = pool._pipes[0].recv()
        assert done and "Connection closed by peer" in said
        assert "own error: RuntimeError" in capfd.readouterr().out
    finally:
        pool.close()


def test_wrappers_and_copies_that_differ_are_refused(pool_of):
    for first, second, differ in pool_of(2).run(wrapped):
        for said, what in ((first, "profile"), (second, "reinit_")):
            assert said == (
                "the model is wrapped in a DistributedDataParallel, expected the module inside: "
                f"{what}(model.module)"
            )
        assert differ.startswith("profile: the weights that all have whole is ")
        assert " in process 1 and " in differ


def test_other_traces_are_named(pool_of):
    """Columns of one layer would be added to those of another."""
    for rank, (order, broken, then) in enumerate(pool_of(2).run(other_trace)):
        assert order.startswith("profile: the trace with example_inputs is ")
        assert " in process 1 and " in order
        assert broken == (
            "by hand" if rank == 1 else "profile: process 1 failed: see the error there"
        )
        assert then == ""
