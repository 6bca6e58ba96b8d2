"""Plans of single weights of models that are copied to several processes or spread over them."""

import pytest
import torch
from helpers.processes import Pool
from helpers.weight_plans import (
    REQUESTS,
    WIDTHS,
    one_fails,
    own_gradients,
    planned,
    refusals,
    wire,
    wiring,
)


@pytest.fixture(scope="module")
def pool_of(tmp_path_factory):
    """Return processes by their number, made when first needed."""
    pools = {}

    def made(size):
        if size not in pools:
            store = tmp_path_factory.mktemp("weights") / "store"
            pools[size] = Pool(size, str(store))
        return pools[size]

    yield made
    for pool in pools.values():
        pool.close()


@pytest.fixture(scope="module")
def graph():
    return wiring()


@pytest.fixture(scope="module")
def alone(graph):
    """Return the plans of one process that has the whole model, and the weights after two."""
    return planned(0, 1, "whole", graph)


def assembled(parts, places):
    """Return {name: whole tensor} of what each process holds; copies have to be equal."""
    found = {}
    for name, first in parts[0].items():
        if name not in places[0]:
            assert all(torch.equal(own[name], first) for own in parts), name
            found[name] = first
            continue
        shape, _ = places[0][name]
        whole = torch.zeros(shape, dtype=first.dtype)
        seen = torch.zeros(shape, dtype=torch.bool)
        for own, place in zip(parts, places, strict=True):
            where = place[name][1]
            assert torch.equal(whole[where][seen[where]], own[name][seen[where]]), name
            whole[where], seen[where] = own[name], True
        assert seen.all(), name
        found[name] = whole
    return found


@pytest.mark.parametrize(
    ("size", "kind"),
    [(2, "copies"), (2, "fsdp"), (4, "copies"), (4, "fsdp"), (4, "hybrid"), (4, "some")],
)
def test_the_plan_and_the_weights_after_it_are_those_of_one_process(
    pool_of, alone, graph, size, kind
):
    found = pool_of(size).run(planned, size, kind, graph)
    plans, weights, _, reports = alone
    for name in (*REQUESTS, "control"):
        own = [each[name] for each, *_ in found]
        masks = assembled([one["masks"] for one in own], [one["parts"] for one in own])
        expected = plans[name]
        assert list(masks) == list(expected["masks"])
        for tensor, mask in masks.items():
            assert torch.equal(mask, expected["masks"][tensor]), (name, tensor)
        assert all(one["says"] == expected["says"] for one in own), name
        spread = {"copies": set(), "some": {"3.weight", "3.bias"} & set(masks)}
        assert all(set(one["parts"]) == spread.get(kind, set(masks)) for one in own)
    after = assembled([own for _, own, *_ in found], [parts for *_, parts, _ in found])
    assert after.keys() == weights.keys()
    for tensor, weight in weights.items():
        assert torch.equal(after[tensor], weight), tensor
    assert all(said == reports for *_, said in found)


def test_one_process_takes_what_its_requests_ask_for(alone):
    """So that the others are compared with something."""
    says = {name: told["says"] for name, told in alone[0].items()}
    assert set(says["ratio"][0]) == {"0.weight", "3.weight"} and says["ratio"][2] == 45
    assert set(says["named"][0]) == {"0.weight", "1.weight", "3.bias"}
    assert any("max_layer_fraction allows" in note for note in says["capped"][6])
    assert says["swr"][3] == 148 and says["control"][0] == says["swr"][0]
    assert 0 < says["threshold"][2] < 148 and says["gradient"][2] > 0


@pytest.mark.parametrize(("size", "kind"), [(2, "copies"), (4, "fsdp"), (4, "some")])
def test_gradients_are_the_means_of_all(pool_of, graph, size, kind):
    found = pool_of(size).run(own_gradients, size, kind, graph)
    places = [parts for _, _, parts, _ in found]
    expected, weights, _, said = own_gradients(0, 1, "whole", graph)
    for name, gradient in assembled([own for own, *_ in found], places).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-7)
    for name, weight in assembled([own for _, own, *_ in found], places).items():
        assert torch.equal(weight, weights[name])
    assert [counts for *_, counts in found] == [said] * size


def test_who_cannot_plan_is_told_in_all(pool_of, graph, tmp_path):
    first, second, *others = pool_of(4).run(refusals, 4, str(tmp_path), graph)
    same = "expected the same in all"
    for one in (first, second, *others):
        assert one["ratio"] == (
            f"ProcessError: plan: ratio is 0.2 in process 1 and 0.1 in process 0, {same}"
        )
        differ = "seed is 1 in process 1 and 0 in process 0"
        assert one["seed"] == f"ProcessError: plan: {differ}, {same}"
        assert one["ratio out of range"].startswith("InputError: ratio 1.2 is out of range")
        assert one["caps"].startswith("InputError: ratio 0.9 asks for 135 of 150 eligible weights")
        assert one["names"].startswith("InputError: exclude pattern 'nothing' matches none")
        assert "parts, those of this process, expected whole ones: apply the plan" in one["save"]
        assert "save it without them, dataclasses.replace(profile, grad" in one["save profile"]
        assert "expected all processes that hold them: call it in each" in one["alone"]
        assert one["layers"].startswith("ProcessError: plan: the list of weights to choose from is")
    changed = "'0.weight' has changed since it was profiled"
    assert second["changed"].startswith(f"InputError: {changed}")
    for one in (first, *others):
        assert one["changed"] == "ProcessError: plan: process 1 failed: see the error there"
    assert not list(tmp_path.iterdir())


def test_what_goes_over_the_wire_does_not_grow_with_the_weights(pool_of):
    for widths in (WIDTHS, (60, 100, 90, 3)):
        own = wiring(widths)
        for sent, layers, count in pool_of(2).run(wire, 2, "fsdp", widths, "weight", own):
            assert count > 0
            numbers, tables = sent[:1], sent[1:]
            # How many are eligible, then a histogram for each digit of the scores.
            assert numbers == [layers * 8]
            assert tables[0] == layers * 2049 * 8 and set(tables[1:]) <= {layers * 2048 * 8}
            assert len(tables) <= 3


@pytest.mark.parametrize(("kind", "granularity"), [("copies", "weight"), ("fsdp", "unit")])
def test_what_all_have_needs_no_word(pool_of, graph, kind, granularity):
    for sent, _, count in pool_of(2).run(wire, 2, kind, WIDTHS, granularity, graph):
        assert not sent and count > 0


def test_none_waits_for_one_that_fails_in_the_middle(pool_of, graph):
    pool = pool_of(4)
    found = pool.run(one_fails, 4, "fails", graph)
    assert found[2][:2] == ("MemoryError: by hand", "")
    for said, after, seconds in (*found[:2], found[3]):
        assert said == "ProcessError: plan: process 2 failed: see the error there"
        # All go on.
        assert after == "" and seconds < 30
    for pipe in pool._pipes:
        pipe.send((one_fails, (4, "ends", graph)))
    for rank in (0, 1, 3):
        assert pool._pipes[rank].poll(60), rank
        done, (said, after, seconds) = pool._pipes[rank].recv()
        assert done and said.startswith("ProcessError: plan: process 2 is gone (")
        assert after.startswith("ProcessError: plan: process 2 is gone") and seconds < 30
