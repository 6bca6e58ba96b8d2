"""Triton's selection and resampling against a real sort and NumPy, bit for bit."""

import importlib
import math

import numpy as np
import pytest
import torch
import triton.language as tl

from fastplastic.kernels.gpu import launch
from fastplastic.kernels.gpu import runtime as _triton_runtime
from fastplastic.kernels.gpu.elements import words_of
from fastplastic.kernels.gpu.runtime import kernel
from fastplastic.kernels.law import Law
from fastplastic.kernels.philox import (
    INITIAL_VALUES,
    KEY_STEPS,
    MULTIPLIERS,
    ROUNDS,
    TIES,
    philox_key,
)
from fastplastic.kernels.reference import resample as _reference_resample
from fastplastic.kernels.reference import select as _reference_select
from fastplastic.kernels.scores import SCORES
from fastplastic.kernels.selection import Query, Selection
from fastplastic.kernels.shards import WeightShard

# NumPy says so of the interpreter of Triton 3.6.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


triton_select = importlib.import_module("fastplastic.kernels.gpu.select")
triton_histogram = importlib.import_module("fastplastic.kernels.gpu.histogram")
parameter = importlib.import_module("fastplastic.kernels.gpu.parameter_stats")
triton_resample = importlib.import_module("fastplastic.kernels.gpu.resample")


@pytest.fixture(autouse=True)
def numpy_does_not_warn():
    """The interpreter computes with numpy, which warns of infinities where a GPU does not."""
    with np.errstate(all="ignore"):
        yield


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Fill scratch memory with -1: an element that is read but was not written shows."""

    def scratch(*arguments):
        return _triton_runtime.scratch(*arguments).fill_(-1)

    monkeypatch.setattr(triton_histogram, "scratch", scratch)


def noise(*shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(device=DEVICE, dtype=dtype)


# A weight of each way to walk: read wide or not, other dtypes, one element, strides of two and
# three dimensions, nothing, more than a block.
WEIGHTS = [
    noise(16, 64),
    noise(37, 11),
    noise(8, 32, dtype=torch.bfloat16),
    noise(5, 7, dtype=torch.float16),
    noise(6, 4, dtype=torch.float64),
    noise(1, 1),
    noise(30, 20).t(),
    noise(6, 5, 3, 3).contiguous(memory_format=torch.channels_last),
    noise(0, 64),
    noise(40, 64),
]
NAMES = [f"layer{i}.weight" for i in range(len(WEIGHTS))]
# Rounded, so that many scores are equal; some in another layout or dtype than the weight.
GRADIENTS = [noise(*w.shape).round(decimals=1).to(w.dtype) for w in WEIGHTS]
GRADIENTS[0] = GRADIENTS[0].double()
GRADIENTS[1] = GRADIENTS[1][:, :1].expand(37, 11)
TOTAL = sum(weight.numel() for weight in WEIGHTS)
CAPS = [weight.numel() // 3 for weight in WEIGHTS]


def check(count, criterion="swr", caps=None, seed=0, weights=WEIGHTS, gradients=GRADIENTS):
    names = NAMES[: len(weights)]
    arguments = (weights, gradients, names, count)
    options = {"criterion": criterion, "caps": caps, "seed": seed}
    found = triton_select.select(*arguments, **options)
    expected = _reference_select.select(*arguments, **options)
    assert found.counts == expected.counts and found.eligible == expected.eligible
    masks = triton_select.selection_masks(found, weights, gradients)
    others = _reference_select.selection_masks(expected, weights, gradients)
    for mask, other, weight in zip(masks, others, weights, strict=True):
        assert mask.shape == weight.shape and mask.dtype == torch.bool
        assert torch.equal(mask, other)
    assert sum(int(mask.sum()) for mask in masks) == count
    return found, masks


@pytest.mark.parametrize("criterion", SCORES)
@pytest.mark.parametrize("count", [0, 1, 1000, TOTAL])
def test_selection(criterion, count):
    check(count, criterion)


@pytest.mark.parametrize("criterion", ["swr", "random"])
def test_caps(criterion):
    check(sum(CAPS) - 50, criterion, CAPS)
    check(sum(CAPS), criterion, CAPS, seed=1)


def test_equal_scores_are_drawn_by_the_seed():
    zeros = [torch.zeros(16, 64, device=DEVICE), torch.zeros(9, 5, device=DEVICE)]
    drawn = [check(200, seed=seed, weights=zeros, gradients=zeros)[1][0] for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    # Without a bias to low elements.
    assert 60 < int(drawn[0].flatten()[:512].sum()) < 140


def test_nan_is_not_eligible_and_infinity_comes_last():
    w = torch.tensor([[math.nan, math.inf, -math.inf, 1e30, 0.0, -0.0, 1e-40, 2.0]], device=DEVICE)
    dw = torch.ones_like(w)
    dw[0, 3], dw[0, 7] = 1e30, math.nan
    found, masks = check(4, weights=[w], gradients=[dw])
    assert found.eligible == (6,)
    assert masks[0][0, 4:7].all() and not masks[0][0, [0, 7]].any()
    check(6, weights=[w], gradients=[dw])
    with pytest.raises(ValueError, match="count is 7, expected at most 6"):
        triton_select.select([w], [dw], ["w"], 7)


@pytest.mark.parametrize("shard", [None, WeightShard((1 << 20, 5), (1 << 19, 2))])
@pytest.mark.parametrize("number", ["key", "word", "element"])
def test_histogram_counts_what_the_query_says(number, shard):
    """The search needs the last ones only where words of 32 bits are equal."""
    w = noise(3, 700).round(decimals=0).t()
    (order,) = _reference_select._orders([(w, None, None)], "magnitude", 0, ["w"], [shard])
    key, word, _, element = order
    values = {"key": key, "word": word, "element": element}[number]
    one = int(np.argmax(key == key.max()))
    keys, words = np.array([key[one]]), np.array([word[one]])
    counted = np.ones(len(key), dtype=bool)
    if number != "key":
        counted &= key == keys[0]
    if number == "element":
        counted &= word == words[0]
    operands = [(w, None, None)]
    ties = triton_select.signed(philox_key(0, TIES, "w"))
    histogram = triton_histogram.GpuHistogram("magnitude", operands, [ties], [shard])
    for shift, bits, prefix in (
        (24, 8, 0),
        (15, 8, values[one] >> 23),
        (0, 7, values[one] >> 7),
    ):
        query = Query(number, shift, bits, np.array([prefix]), keys, words)
        own = values[counted & (values >> (shift + bits) == prefix)]
        expected = np.bincount((own >> shift) & ((1 << bits) - 1), minlength=triton_histogram.BINS)
        assert np.array_equal(histogram(query)[0].cpu(), expected)


def test_the_last_element_decides_where_key_and_word_are_equal():
    w = torch.zeros(1, 8, device=DEVICE)
    word = int(_reference_select.philox_words(philox_key(0, TIES, "w"), np.arange(8))[5])
    for element, selected in ((4, False), (5, True), (6, True)):
        chosen = Selection("magnitude", 0, ("w",), (0,), (word,), (element,), (0,), 8)
        mask = triton_select.selection_masks(chosen, [w], None)[0]
        assert mask[0, 5].item() == selected
        assert torch.equal(mask, _reference_select.selection_masks(chosen, [w], None)[0])


def test_more_tasks_than_one(monkeypatch):
    monkeypatch.setattr(launch, "element_task", lambda total: launch.HISTOGRAM_BLOCK)
    found, _ = check(700)
    assert found.count == 700


def test_nothing_to_select_from():
    assert triton_select.select([], [], [], 0).counts == ()
    empty = torch.empty(0, 4, device=DEVICE)
    assert triton_select.select([empty], [empty], ["w"], 0).count == 0
    none = triton_select.select([empty], [empty], ["w"], 0)
    assert triton_select.selection_masks(none, [empty], [empty])[0].shape == (0, 4)


def test_select_refuses_what_the_others_refuse():
    with pytest.raises(ValueError, match="criterion 'size' is unknown"):
        triton_select.select(WEIGHTS, GRADIENTS, NAMES, 1, criterion="size")
    with pytest.raises(ValueError, match="there are no gradients"):
        triton_select.select(WEIGHTS, None, NAMES, 1)


LAWS = [
    Law("normal", 0.0, 0.02),
    Law("uniform", -0.1, 0.2),
    Law("normal", 0.1, 1.0),
    Law("normal", 0.0, 30000.0),
    Law("uniform", 3.0, 0.0),
    Law("normal", 0.0, 0.02, 0.02275, 0.97725, -2.0, 2.0),
    Law("normal", 0.0, 1.0, low=-1.0, high=1.0),
    Law("uniform", 0.0, 1.0, 0.25, 0.75),
    Law("uniform", 0.0, 1.0),
    Law("normal", -0.5, 0.5),
]


def check_resample(**options):
    """All of the bits, of what is written and of what is not."""
    found, expected = ([w.clone() for w in WEIGHTS] for _ in range(2))
    triton_resample.resample_(found, NAMES, LAWS, seed=7, **options)
    _reference_resample.resample_(expected, NAMES, LAWS, seed=7, **options)
    for one, other, weight in zip(found, expected, WEIGHTS, strict=True):
        assert one.stride() == weight.stride()
        assert torch.equal(one, other)
    return found


def test_resample_everything():
    found = check_resample()
    assert found[0].std().item() == pytest.approx(0.02, rel=0.1)
    assert (found[4] == 3).all()


def test_resample_by_masks():
    masks = [noise(*weight.shape) > 0 for weight in WEIGHTS]
    masks[0] = (noise(16, 1) > 0).expand(16, 64)
    masks[2] = None
    masks[6] = (noise(1, 30) > 0).expand(20, 30)
    found = check_resample(masks=masks)
    assert torch.equal(found[0][~masks[0]], WEIGHTS[0][~masks[0]])


def test_resample_does_not_depend_on_strides():
    law = Law("normal", 0.0, 1.0)
    rows, columns = torch.empty(30, 20, device=DEVICE), torch.empty(20, 30, device=DEVICE).t()
    for weight in (rows, columns):
        triton_resample.resample_([weight], ["w"], [law])
    assert torch.equal(rows, columns)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("location", [1 + 2**-8, -1 - 3 * 2**-8, 1 + 2**-11, 3 * 2**-25, 65520.0])
def test_values_are_rounded_to_even(dtype, location):
    """Halfway between two numbers, next to 0, and where float16 overflows."""
    weight = torch.empty(1, 4, dtype=dtype, device=DEVICE)
    triton_resample.resample_([weight], ["w"], [Law("uniform", location, 0.0)])
    assert (weight == torch.tensor(location).to(weight)).all()


def test_the_ends_of_the_words_are_finite():
    """Words 0 and 2^32 - 1 are rare; a law between two probabilities next to each other is not."""
    weight = torch.empty(4, 256, device=DEVICE)
    for ends in ((0.0, 2.0**-23), (1 - 2.0**-23, 1.0)):
        law = Law("normal", 0.0, 1.0, *ends)
        triton_resample.resample_([weight], ["w"], [law])
        expected = torch.empty(4, 256)
        _reference_resample.resample_([expected], ["w"], [law])
        assert torch.equal(weight.cpu(), expected)
        assert weight.isfinite().all()


@kernel
def _words_kernel(elements_ptr, words_ptr, key: tl.int64, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    words = words_of(key, tl.load(elements_ptr + lane))
    tl.store(words_ptr + lane, words.to(tl.int64))


def philox(key, element):
    """Philox4x32-10 in Python's integers."""
    low = (1 << 32) - 1
    counter, keys = [element & low, element >> 32, 0, 0], [key & low, key >> 32]
    for _ in range(ROUNDS):
        first, second = MULTIPLIERS[0] * counter[0], MULTIPLIERS[1] * counter[2]
        counter = [
            (second >> 32) ^ counter[1] ^ keys[0], second & low,
            (first >> 32) ^ counter[3] ^ keys[1], first & low,
        ]  # fmt: skip
        keys = [(keys[0] + KEY_STEPS[0]) & low, (keys[1] + KEY_STEPS[1]) & low]
    return counter[0]


def test_words_of_elements_beyond_32_bits():
    elements = [0, 1, 2**31, 2**32 - 1, 2**32, 2**40 + 5, 7, 2**52]
    key = philox_key(3, INITIAL_VALUES, "w")
    found = torch.zeros(8, dtype=torch.int64, device=DEVICE)
    source = torch.tensor(elements, device=DEVICE)
    _words_kernel[(1,)](source, found, triton_select.signed(key), BLOCK=8)
    assert found.tolist() == [philox(key, element) for element in elements]


def test_resample_refuses_what_the_others_refuse():
    with pytest.raises(ValueError, match="weight 0 is expanded"):
        triton_resample.resample_([torch.ones(1, 3).expand(2, 3)], ["w"], LAWS[:1])
    assert triton_resample.resample_([], [], []) is None


def test_tensors_on_several_devices_are_refused():
    """Kernels take addresses from a table: they would read whatever is there."""
    w, elsewhere = noise(4, 4), torch.empty(4, 4, device="meta")
    message = "a tensor is on meta, expected the device of the first weight"
    with pytest.raises(ValueError, match=message):
        triton_select.select([w], [elsewhere], ["w"], 1)
    with pytest.raises(ValueError, match=message):
        triton_resample.resample_([w], ["w"], LAWS[:1], masks=[elsewhere.bool()])
    with pytest.raises(ValueError, match=message):
        parameter.parameter_stats([w], [elsewhere])


def test_autograd_sees_that_weights_changed():
    w = noise(4, 4).requires_grad_()
    loss = (w * w).sum()
    triton_resample.resample_([w], ["w"], LAWS[:1])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
