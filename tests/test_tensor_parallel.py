"""Profiles of models in tensor parallelism: the same as of one process with the whole model."""

import pytest
import torch
from helpers.processes import Pool
from helpers.slices import (
    SIZE,
    model_of,
    partly,
    parts,
    profiled,
    recycled,
    refused,
    reinitialised,
    several,
    single_weights,
    watched,
)

from fastplastic.stats import STATISTICS


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    pool = Pool(SIZE, str(tmp_path_factory.mktemp("slices") / "store"))
    yield pool
    pool.close()


def same(found, expected, case):
    """Compare what processes found with each other and with what one process found."""
    first, *others = found
    for layer, table in expected["tables"].items():
        scale = table.abs().nan_to_num(0, 0, 0).amax(1, keepdim=True) + 1e-12
        torch.testing.assert_close(
            first["tables"][layer] / scale, table / scale, rtol=0, atol=5e-6, msg=f"{case} {layer}"
        )
        counts = [row for row, what in enumerate(STATISTICS) if what.startswith("n_")]
        assert torch.equal(first["tables"][layer][counts], table[counts]), (case, layer)
        for other in others:
            assert torch.equal(other["tables"][layer], first["tables"][layer])
    assert first["plans"] == expected["plans"]
    for one in found:
        assert one["plans"] == first["plans"]
        assert one["figures"] == expected["figures"]
        assert one["coverage"] == expected["coverage"]


CASES = [
    (1, False, "mlp", 3),
    (1, False, "uneven", 2),
    (1, False, "functions", 2),
    # Two groups, each with slices of its own batches.
    (2, False, "mlp", 3),
    (2, True, "mlp", 3),
    (2, False, "llama", 2),
    (2, True, "llama", 2),
    # A group without any batch.
    (2, False, "mlp", 1),
    (2, True, "mlp", 1),
]


def test_the_profile_is_that_of_one_process(four):
    found = four.run(several, "profiled", CASES)
    for case, own in zip(CASES, zip(*found, strict=True), strict=True):
        same(own, profiled(0, *case, whole=True), case)


def test_monitors_see_what_one_sees(four):
    """Gradients of activations are those of the loss of each group."""
    cases = [(1, False, "mlp"), (2, True, "mlp"), (2, False, "mlp")]
    found = four.run(several, "watched", cases)
    for case, own in zip(cases, zip(*found, strict=True), strict=True):
        groups, fsdp, _ = case
        expected = watched(0, *case, whole=True)
        for table in expected["tables"].values():
            table[STATISTICS.index("sum_abs_g")] *= groups
            table[STATISTICS.index("sum_sq_g")] *= groups**2
        if groups == 1 or fsdp:
            same(own, expected, case)
            continue
        # Nobody makes the gradients of both groups the same.
        samples, mode, notes = own[0]["figures"]
        assert (samples, mode) == expected["figures"][:2]
        assert notes[0].startswith("gradients of weights are not measured: they differed")
        for layer, table in own[0]["tables"].items():
            assert not table[STATISTICS.index("n_dw")].any()
            counts = [STATISTICS.index(name) for name in ("n", "n_g", "n_in", "n_out")]
            assert torch.equal(table[counts], expected["tables"][layer][counts])


def test_fresh_units_are_the_same_bits(four):
    cases = [(1, False, "mlp"), (2, True, "mlp"), (2, True, "llama")]
    found = four.run(several, "reinitialised", cases)
    for case, own in zip(cases, zip(*found, strict=True), strict=True):
        expected, before = reinitialised(0, *case, whole=True), model_of(case[2]).state_dict()
        assert any(not torch.equal(value, before[name]) for name, value in expected.items())
        for name, value in expected.items():
            assert all(torch.equal(one[name], value) for one in own), (case, name)


def test_single_weights_are_the_same_bits(four):
    """Of criteria whose scores do not depend on sums over groups of processes."""
    cases = [(1, False, "swr"), (1, False, "random"), (2, True, "magnitude")]
    found = four.run(several, "single_weights", cases)
    for case, own in zip(cases, zip(*found, strict=True), strict=True):
        expected = single_weights(0, *case, whole=True)
        for one in own:
            assert one["counts"] == expected["counts"]
            for name, value in expected["weights"].items():
                assert torch.equal(one["weights"][name], value), (case, name)


@pytest.mark.parametrize("method", ["redo", "swr"])
def test_recyclers_choose_what_one_chooses(four, method):
    expected = recycled(0, method, whole=True)
    assert expected["log"]
    for one in four.run(recycled, method):
        assert one["log"] == expected["log"]
        for name, value in expected["weights"].items():
            torch.testing.assert_close(one["weights"][name], value, rtol=0, atol=1e-6)


def test_what_both_cut_is_read_once(four):
    """FSDP2 cuts what tensor parallelism has cut, down to nothing in some processes."""
    for each in zip(*four.run(parts), strict=True):
        assert all(same for _, same in each)
        assert torch.equal(sum(read for read, _ in each), torch.ones_like(each[0][0]))


def test_what_processes_do_not_have_alike_is_refused(four):
    first, *others = four.run(refused)
    assert all(other == first for other in others)
    shard = "shard the data over {} of processes, not over single ones"
    for name, number in (("batches", 1), ("fewer", 2)):
        assert first[name] == (
            f"processes 0 and 1 have different batches in round {number}, expected the same in "
            f"those that share layers by tensor parallelism: {shard.format('2 groups')}"
        )
    assert first["calls"] == (
        "processes 0 and 1 called the model with different batches, expected the same in those "
        f"that share layers by tensor parallelism: {shard.format('groups')}"
    )
    assert first["losses"].startswith("the losses of processes 0 and 1, which share batches, add ")
    assert first["losses"].endswith(
        "expected the same: gather what the loss is of (output_layouts=Replicate()), and seed "
        "dropout alike in them"
    )
    assert first["kinds"] == (
        "the units of '0' are of several kinds (relu; identity, not hidden), and 4 processes have "
        "a slice each, which they treat alike: that is not what the whole model computes, expected "
        "a layer of its own for each kind, or one that is not cut"
    )


APART = (
    "its values differ between processes that share batches (as 0 and 1), expected the same or a "
    "slice of channels in each: with sequence parallelism, or random numbers of other seeds, they "
    "see others"
)
SUMMANDS = (
    "gradients of 1 layer ({}) are not measured: each process of those that share batches has a "
    "summand of them, or sees other positions (tensor parallelism)"
)


WHOLE = (
    "the gradient of 2.0.bias and 1 more is not measured: those that share batches have a summand "
    "each, which nobody adds up (a whole parameter among slices): an optimizer would make them "
    "differ"
)
ACTIVATIONS = ("n", "n_zero", "n_flat", "_h", "_g")


@pytest.mark.parametrize(
    ("name", "layer", "rows", "skipped", "notes"),
    [
        ("positions", "0", ACTIVATIONS, (("0", APART),), (SUMMANDS.format("0"),)),
        ("sums", "2", ("_g",), (), (SUMMANDS.format("2"),)),
        ("heads", "2.0", (*ACTIVATIONS, "_dw"), (("2.0", APART),), (SUMMANDS.format("2.0"), WHOLE)),
    ],
)
def test_what_is_not_known_is_not_measured(four, name, layer, rows, skipped, notes):
    """And all else is as of the whole model."""
    first, *others = four.run(partly, name)
    expected = partly(0, name, whole=True)["tables"]
    assert all(one["skipped"] == skipped for one in (first, *others))
    assert all(one["notes"] == first["notes"] for one in others)
    assert set(notes) <= set(first["notes"])
    for own, table in expected.items():
        assert all(torch.equal(one["tables"][own], first["tables"][own]) for one in others)
        for row, what in enumerate(STATISTICS):
            found = first["tables"][own][row]
            if own == layer and (what in rows or what[-2:] in rows or what[-3:] in rows):
                assert not found[found.isfinite()].any(), (own, what)
            elif not (name == "heads" and what.endswith("dw_out")):
                torch.testing.assert_close(found, table[row], rtol=1e-4, atol=1e-6, msg=what)
