"""Recyclers of several processes that train one model: the same choice, the same bits."""

import pytest
import torch
from helpers.processes import Pool
from helpers.recycled import METHODS, each, gone_on, net, recycled, refused


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    pool = Pool(2, str(tmp_path_factory.mktemp("recyclers") / "store"))
    yield pool
    pool.close()


def same(one, other):
    """The same bits, in nested values."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key, value in one.items():
            same(value, other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for value, own in zip(one, other, strict=True):
            same(value, own)
    else:
        assert one == other


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_each_process_chooses_what_one_does_of_the_joined_batches(two, kind):
    for method, first, second in zip(METHODS, *two.run(each, kind, list(METHODS)), strict=True):
        if (kind, method) == ("fsdp", "swr"):
            # What was chosen last, of the parts that each has.
            last = [own["recycler"].pop("last") for own in (first, second)]
            assert [name for name, mask in last[0].items() if mask.shape == last[1][name].shape]
        same(first, second)
        alone = recycled(0, "", method, whole=True)
        assert first["resets"] and first["skipped"] == alone["skipped"], method
        if method != "positions":
            assert first["resets"] == alone["resets"], method
            assert first["overlaps"] == alone["overlaps"], method
            for name, value in alone["model"].items():
                torch.testing.assert_close(first["model"][name], value, rtol=1e-3, atol=1e-4)
        # What is in sync got the fresh values, and was not trained.
        assert any(
            not torch.equal(first["target"][n], value) for n, value in net().state_dict().items()
        )


def test_going_on_from_a_state_gives_the_same_bits(two):
    first, second = two.run(gone_on)
    same(first, second)
    straight, continued = first
    assert straight["resets"] and straight["resets"] == continued["resets"]
    same(straight["model"], continued["model"])
    same(straight["recycler"], continued["recycler"])


def test_what_differs_is_named_in_all(two):
    first, second = two.run(refused)
    for name in ("wrapper", "seed", "option", "gradients"):
        assert first[name] == second[name], name
    assert first["wrapper"] == (
        "InputError: the model is wrapped in a DistributedDataParallel, expected the module "
        "inside: Recycler(model.module)"
    )
    assert first["seed"] == (
        "ProcessError: Recycler(): the seed is 1 in process 1 and 0 in process 0, expected the "
        "same in all"
    )
    assert first["option"] == (
        "ProcessError: Recycler(): every is 3 in process 1 and 2 in process 0, expected the same "
        "in all"
    )
    assert first["gradients"].startswith("InputError: the gradients have a norm of ")
    assert "in process 1" in first["gradients"] and "alone()" in first["gradients"]
    assert second["failed"] == "by hand"
    assert first["failed"] == (
        "ProcessError: step 1 of the Recycler: process 1 failed: see the error there"
    )
    assert first["alone"] == second["alone"] == ""
