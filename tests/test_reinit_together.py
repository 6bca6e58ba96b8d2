"""Models that several processes re-initialise together, copied or spread, over gloo."""

import functools

import pytest
import torch
from helpers.processes import Pool
from helpers.reinit_together import (
    alone_with_parts,
    differing,
    ending,
    failing,
    measured,
    plan_of,
    slice_of,
    written,
)


@pytest.fixture(scope="module")
def pools(tmp_path_factory):
    """Give processes by their number, made when first needed."""
    made = {}

    def pool_of(size, *, last=False):
        if size not in made:
            made[size] = Pool(size, str(tmp_path_factory.mktemp("reinit") / "store"))
        return made.pop(size) if last else made[size]

    yield pool_of
    for pool in made.values():
        pool.close()


@pytest.fixture(scope="module")
def plans():
    """Give the plan of a model by its name."""
    return functools.cache(plan_of)


ZERO = {}
SMALL = {"outgoing": "small", "init": "empirical"}
FRESH = {"outgoing": "fresh", "init": "xavier_uniform"}
KEEP = {"outgoing": "keep", "seed": 5}


@pytest.mark.parametrize(
    ("size", "kind", "name", "options"),
    [
        (2, "copies", "mlp", SMALL),
        (2, "fsdp", "mlp", SMALL),
        (2, "mixed", "vit", SMALL),
        (2, "tensor", "mlp", SMALL),
        # Uneven parts, some without any element.
        (4, "fsdp", "mlp", KEEP),
        (4, "fsdp", "grouped", SMALL),
        (4, "fsdp", "grouped", FRESH),
        (4, "fsdp", "vit", ZERO),
        (4, "fsdp", "resnet18", ZERO),
        (4, "fsdp", "gpt2", SMALL),
        (4, "copies", "gpt2", ZERO),
        (4, "hybrid", "grouped", SMALL),
        (4, "tensor", "mlp", SMALL),
        (4, "both", "mlp", SMALL),
    ],
)  # fmt: skip
def test_all_is_as_of_one_process(pools, plans, size, kind, name, options):
    for differs, changed in pools(size).run(written, size, kind, name, plans(name), options):
        assert differs == [] and changed > 2


@pytest.mark.parametrize("kind", ["copies", "fsdp"])
@pytest.mark.parametrize(("name", "count"), [("grouped", 5), ("mlp", 2)])
def test_batches_are_those_of_all(pools, plans, kind, name, count):
    """Also where the share of a process is smaller, or nothing."""
    expected, _, alone = measured(0, 1, "copies", name, plans(name), count)
    found = pools(4).run(measured, 4, kind, name, plans(name), count)
    for state, parts, report in found:
        for key, values in state.items():
            whole = slice_of(expected[key], parts[key])
            torch.testing.assert_close(values, whole, rtol=1e-5, atol=1e-6)
        assert report == found[0][2]
    losses = ("loss_before", "loss_after")
    for key, value in alone.items():
        assert found[0][2][key] == (pytest.approx(value, rel=1e-5) if key in losses else value)


@pytest.mark.parametrize("kind", ["copies", "fsdp"])
@pytest.mark.parametrize("error", [ValueError("by hand"), KeyboardInterrupt()])
def test_one_fails_and_nothing_is_written(pools, plans, kind, error):
    found = pools(4).run(failing, 4, kind, plans("mlp"), 1, error)
    text = "ProcessError: reinit_: process 1 failed: see the error there"
    own = f"{type(error).__name__}: {error}"
    assert [said for said, _, _ in found] == [text, own, text, text]
    # Nothing is changed, and all go on.
    assert [rest for _, *rest in found] == [[True, ""]] * 4


def test_what_differs_is_named(pools, plans):
    found = pools(4).run(differing, 4, plans("mlp"), plan_of("mlp", seed=3))
    for rank, (seed, plan, outgoing, optimizer, wrong, model) in enumerate(found):
        start = "ProcessError: reinit_: "
        assert seed == f"{start}seed is 1 in process 3 and 0 in process 0, expected the same in all"
        assert plan.startswith(f"{start}the plan is ") and "in process 3 and" in plan
        assert outgoing.startswith(f"{start}outgoing is keep in process 3 and zero in process 0")
        assert optimizer.startswith(f"{start}optimizer is given (AdamW) in process 3 and None in")
        assert wrong.startswith(f"{start}outgoing is nothing in process 3"), rank
        assert model.startswith(f"{start}the model is ") and "in process 1 and" in model


def test_one_alone_does_not_guess_what_others_hold(pools, plans):
    for small, batches, parallel in pools(2).run(alone_with_parts, 2, plans("mlp")):
        assert small == (
            "InputError: '3.weight' is cut over processes, and one alone does not know what the "
            "others hold: call this in all of them, not in `with alone()`"
        )
        assert batches.startswith(
            "InputError: '0.weight' is cut over processes, and one alone cannot run the model"
        )
        assert parallel == (
            "InputError: '0.weight' is placed as ('S(0)',), and with tensor parallelism each "
            "process sees a part of what it is multiplied with: leave out recalibrate, and pass "
            "mean activations as compensate"
        )


def test_one_that_ends_leaves_the_weights_of_the_others(pools, plans):
    pool = pools(4, last=True)
    try:
        for pipe in pool._pipes:
            pipe.send((ending, (4, plans("mlp"))))
        for rank in (0, 1, 3):
            assert pool._pipes[rank].poll(60), rank
            done, (said, kept, seconds) = pool._pipes[rank].recv()
            assert done and said.startswith("ProcessError: reinit_: process 2 is gone"), said
            assert kept and seconds < 30
    finally:
        pool.close()
