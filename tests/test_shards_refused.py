"""Parts of weights that do not make whole ones are refused, in the same words on every backend."""

import numpy as np
import pytest
import torch
from helpers.ranks import Twin
from torch import Tensor

from fastplastic.kernels import Law, WeightShard

NORMAL = Law("normal", 0.1, 0.5)
# The interpreter of Triton computes with NumPy, which warns where a GPU does not.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")


@pytest.fixture(params=["gpu", "cpu", "reference"])
def twin(request):
    with np.errstate(all="ignore"):
        yield Twin(request.param)


def wrong(twin, text, function="select", **changes):
    part = torch.ones(2, 3, device=twin.device)
    arguments = {"weights": [part], "gradients": [part], "names": ["w"], "count": 1}
    if function == "resample_":
        arguments = {"weights": [part], "names": ["w"], "laws": [NORMAL]}
    with pytest.raises(ValueError, match="expected") as caught:
        getattr(twin, function)(**(arguments | changes))
    assert text in str(caught.value)


def test_shards_that_do_not_fit_are_refused(twin):
    for function in ("select", "resample_"):
        for shards, text in (
            ([], "there are 0 shards for 1 weights, expected one for each"),
            (
                [WeightShard((4, 3), (3, 0))],
                "weight 0 is (2, 3) with offsets (3, 0), expected a part of the weight (4, 3)",
            ),
            (
                [WeightShard((6,), (0,))],
                "weight 0 is (2, 3) with offsets (0,), expected a part of the weight (6,)",
            ),
        ):
            wrong(twin, text, function, shards=shards)


def test_elements_that_are_missing_or_counted_twice_are_an_error(twin):
    way = "pass the shards of all processes, reduce over all of them, and counted=False to all but"
    shards = [WeightShard((4, 3), (0, 0))]
    text = f"6 elements of w are counted, expected each of its 12 once: {way}"
    wrong(twin, text, shards=shards)
    wrong(twin, text, shards=shards, reduce=lambda table: None)
    text = f"18 elements of w are counted, expected each of its 12 once: {way}"
    wrong(twin, text, shards=shards, reduce=lambda table: table.mul_(3))
    # Both of two processes hold the whole weight.
    wrong(twin, "12 elements of w are counted, expected each of its 6", reduce=lambda t: t.mul_(2))
    copies = [WeightShard((2, 3), (0, 0), counted=False)]
    wrong(twin, "0 elements of w are counted, expected each of its 6", shards=copies)


def test_a_sum_that_is_none_is_refused(twin):
    text = "reduce returned 'later', expected None or a tensor (1, "
    wrong(twin, text, reduce=lambda table: "later")
    text = "reduce returned a tensor (1,), expected None or a tensor (1, "
    wrong(twin, text, reduce=lambda table: table.sum(1))


class Distributed(Tensor):
    """Looks like a DTensor: its memory is elsewhere."""

    def to_local(self) -> Tensor:
        return self


def test_distributed_tensors_are_refused(twin):
    """Their address is 0: reading there would end the process."""
    part = torch.ones(2, 3, device=twin.device)
    other = part.as_subclass(Distributed)
    text = " 0 is a DTensor, expected a tensor of this process alone: pass its to_local(), and whe"
    wrong(twin, "weight" + text, weights=[other])
    wrong(twin, "gradient" + text, gradients=[other])
    wrong(twin, "weight" + text, "resample_", weights=[other])


@pytest.mark.parametrize(
    ("shape", "offsets", "text"),
    [
        ((4, 3), (1,), "offsets (1,) in a weight (4, 3), expected one for each dimension"),
        ((4, 3), (5, 0), "offsets (5, 0) in a weight (4, 3), expected offsets from 0 to the size"),
        ((4, 3), (0, -1), "offsets (0, -1) in a weight (4, 3), expected offsets from 0 to the s"),
    ],
)
def test_what_is_no_shard(shape, offsets, text):
    with pytest.raises(ValueError, match="expected") as caught:
        WeightShard(shape, offsets)
    assert text in str(caught.value)
