"""Processes that agree with each other, over gloo."""

import pytest
import torch
from helpers.meeting import by_itself, dying, dying_within, failing, meeting, sums, waiting
from helpers.processes import Pool

from fastplastic.processes import all_processes


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    pool = Pool(3, str(tmp_path_factory.mktemp("processes") / "store"))
    yield pool
    pool.close()


def test_tables_are_added_up(three):
    results = three.run(sums)
    expected = torch.arange(6, dtype=torch.float64).view(2, 3) / 3
    for rank, (table, least, place) in enumerate(results):
        torch.testing.assert_close(table, expected * 6)
        assert torch.equal(table, results[0][0])
        assert least.tolist() == [3, 0] and place == (rank, 3)


def test_all_agree(three):
    results = three.run(meeting, ["profile"] * 3, [{"seed": "1", "model": "ab"}] * 3)
    assert results == [("", "")] * 3


@pytest.mark.parametrize(
    ("steps", "facts", "text"),
    [
        (["plan", "plan", "compute"], [{}] * 3,
         "process 2 is at 'compute', process 0 at 'plan', expected the same calls in the same "
         "order in all processes"),
        (["plan"] * 3, [{"seed": "1"}, {"seed": "2"}, {"seed": "1"}],
         "seed is 2 in process 1 and 1 in process 0, expected the same in all"),
        (["plan"] * 3, [{"seed": "1"}, {"seed": "1"}, {}],
         "seed is None in process 2 and 1 in process 0, expected the same in all"),
    ],
)  # fmt: skip
def test_what_differs_is_named_in_all_and_they_go_on(three, steps, facts, text):
    results = three.run(meeting, steps, facts)
    assert [first for first, _ in results] == [f"{step}: {text}" for step in steps]
    assert [second for _, second in results] == ["", "", ""]


def test_one_that_is_gone_or_late_is_named(tmp_path):
    pool = Pool(3, str(tmp_path / "store"))
    try:
        for late, text in ((True, "did not come within 4 s"), (False, "is gone")):
            for pipe in pool._pipes:
                pipe.send((dying, (late,)))
            done, said = pool._pipes[0].recv()
            assert done and said.startswith(f"profile: process 1 {text}"), said
            done, said = pool._pipes[2].recv()
            assert done and "profile: process" in said, said
            if late:
                pool._pipes[1].recv()
    finally:
        pool.close()


@pytest.mark.parametrize("who", [0, 1])
def test_who_fails_is_named_in_the_others(three, who):
    found = three.run(failing, who)
    for rank, (first, second, third) in enumerate(found):
        own = rank == who
        text = f"process {who} failed: see the error there"
        assert first == ("ZeroDivisionError('by hand')" if own else f"work: {text}")
        assert second == ("ZeroDivisionError('at the end')" if own else f"more: {text}")
        assert third == ""


def test_one_that_dies_among_tables_is_named(tmp_path):
    pool = Pool(4, str(tmp_path / "store"))
    try:
        for pipe in pool._pipes:
            pipe.send((dying_within, ()))
        for rank in (0, 2, 3):
            done, said = pool._pipes[rank].recv()
            assert done and said.startswith("work: process 1 is gone (Connection closed"), said
    finally:
        pool.close()


def test_who_waits_long_says_for_whom(three):
    text = "work: waiting for process {}, which has to call it too"
    assert three.run(waiting) == [[text.format(2)], [text.format(0)], []]


def test_one_that_works_by_itself_waits_for_nobody(three):
    assert three.run(by_itself) == [None] * 3


def test_one_process_needs_nobody():
    assert all_processes() is None
