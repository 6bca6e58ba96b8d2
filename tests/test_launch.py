"""Which process this is, what it reads of the data, and what becomes of errors in several."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastplastic.cli import launch
from fastplastic.cli.launch import LaunchPlace, is_first, own_gpu, place
from fastplastic.cli.outcomes import Outcome, verdict
from fastplastic.cli.page import DataDigest
from fastplastic.errors import InputError
from fastplastic.sources import Share, batches, create_model

NAMES = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
    "TORCHELASTIC_RUN_ID",
)  # fmt: skip
TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "TORCHELASTIC_RUN_ID": "none"}
HERE = {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
BY_HAND = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}


@pytest.fixture
def variables(monkeypatch):
    def set_(values):
        for name in NAMES:
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return set_


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, None),
        (TORCHRUN | HERE, LaunchPlace(5, 8, 1, 4)),
        (BY_HAND, LaunchPlace(1, 2, 1, 2)),
        # Variables of other programs, or of a job that has one process.
        ({"RANK": "1"}, None),
        ({"RANK": "1", "WORLD_SIZE": "2"}, None),
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a"}, None),
        (TORCHRUN | {"RANK": "0", "WORLD_SIZE": "1"}, None),
        (TORCHRUN | {"RANK": "high"}, None),
        (TORCHRUN | {"RANK": "8"}, None),
        (TORCHRUN | {"RANK": "-1"}, None),
    ],
)
def test_which_process_this_is(variables, values, expected):
    variables(values)
    assert place() == expected
    assert is_first() == (expected is None)


def test_the_gpu_of_a_process(variables):
    variables({})
    assert own_gpu(8) == "cuda"
    variables(TORCHRUN | HERE)
    assert own_gpu(8) == own_gpu(4) == "cuda:1"
    # That of a scheduler, which shows no other.
    assert own_gpu(1) == "cuda:0"
    with pytest.raises(InputError, match="4 processes and 2 GPUs on this machine, expected a GPU"):
        own_gpu(2)


def test_processes_that_do_not_come(variables, monkeypatch, run):
    from datetime import timedelta

    variables(BY_HAND | {"RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"})
    monkeypatch.setattr(launch, "_START", timedelta(seconds=1))
    monkeypatch.setattr(launch, "_HINT", 0.1)
    outcome = run("profile", "test_resnet")
    assert (outcome.code, outcome.output) == (2, "")
    first, second = outcome.error.splitlines()
    assert first == "fastplastic: waiting for 1 other process, as WORLD_SIZE says"
    assert "process 0 of 2: the others did not come within 1 s" in second
    assert second.endswith("unset RANK and WORLD_SIZE to work without others")


FINE, FOLLOWS = Outcome(0), Outcome(1, ("profile: process 1 failed",), follows=True)
BAD, WORSE = Outcome(3, ("a.png: gone",)), Outcome(2, ("no data",))


@pytest.mark.parametrize(
    ("outcomes", "code", "lines"),
    [
        ([FINE, FINE], 0, []),
        ([BAD, BAD, BAD], 3, ["a.png: gone"]),
        ([FOLLOWS, BAD], 3, ["process 1: a.png: gone"]),
        ([FINE, BAD, BAD], 3, ["process 1, 2: a.png: gone"]),
        ([BAD, WORSE], 3, ["a.png: gone", "process 1: no data"]),
        ([FOLLOWS, FOLLOWS], 1, ["profile: process 1 failed"]),
        ([FOLLOWS, None], 1, ["process 1 ended without a word: see what torchrun says of it"]),
        ([FINE, None], 1, ["process 1 ended without a word: see what torchrun says of it"]),
        ([BAD, None], 3, ["a.png: gone"]),
    ],
)
def test_what_is_said_of_all(outcomes, code, lines):
    whole = verdict(dict(enumerate(outcomes)))
    assert (whole.code, list(whole.lines)) == (code, lines)
    assert Outcome.read(whole.written()) == whole


@given(st.integers(0, 40), st.integers(1, 9), st.integers(1, 7))
def test_each_item_is_in_one_share(items, size, processes):
    shares = [Share(rank, processes) for rank in range(processes)]
    found = [share.batches(range(items), size) for share in shares]
    assert sorted(item for parts in found for part in parts for item in part) == list(range(items))
    whole = Share().batches(range(items), size)
    for share, parts in zip(shares, found, strict=True):
        assert parts == whole[share.rank :: processes]
        assert share.numbers(len(whole)) == [n for n in range(len(whole)) if share.has(n)]


@pytest.mark.parametrize("data", ["sample", "noise"])
def test_shares_of_data_are_its_batches(data):
    model = create_model("test_resnet", pretrained=False, img_size=32).model
    source = batches(data, model=model, batch_size=3, max_batches=5, img_size=32)
    whole, digest = list(source), DataDigest()
    list(digest.watch(source))
    digests = []
    for rank in (0, 1, 2):
        share = replace(source, share=Share(rank, 3))
        found = list(share)
        assert len(found) == len(share) and len(share.whole) == len(whole)
        for (images, labels), (other_images, other_labels) in zip(
            found, whole[rank::3], strict=True
        ):
            assert torch.equal(images, other_images) and torch.equal(labels, other_labels)
        own = DataDigest()
        list(own.watch(share))
        digests.append(own.value)
    assert len({*digests, digest.value}) == 4
