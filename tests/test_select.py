import importlib
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastplastic.kernels.cpu.elements import philox
from fastplastic.kernels.philox import TIES, philox_key
from fastplastic.kernels.reference import select as reference

# Modules with `select` and `selection_masks`; each is compared with the oracle.
TWINS = ["cpu.select"]
CRITERIA = ["swr", "gradient", "magnitude", "random"]
INF, NAN = float("inf"), float("nan")


@pytest.fixture(params=TWINS, scope="module")
def twin(request):
    return importlib.import_module(f"fastplastic.kernels.{request.param}")


def names_of(weights: list[Tensor]) -> list[str]:
    return [f"layer{i}.weight" for i in range(len(weights))]


def same(twin, weights, gradients, count, **options) -> list[Tensor]:
    """Select by a twin and by the oracle, and return the masks that both of them give."""
    names = options.pop("names", names_of(weights))
    ours = twin.select(weights, gradients, names, count, **options)
    expected = reference.select(weights, gradients, names, count, **options)
    masks = twin.selection_masks(ours, weights, gradients)
    # Thresholds may differ where they mean the same.
    for selection, module in [(ours, reference), (expected, twin), (expected, reference)]:
        others = module.selection_masks(selection, weights, gradients)
        assert all(map(torch.equal, masks, others))
    assert [mask.shape for mask in masks] == [weight.shape for weight in weights]
    counts = tuple(int(mask.sum()) for mask in masks)
    assert ours.counts == expected.counts == counts and ours.count == count == sum(counts)
    assert ours.eligible == expected.eligible
    return masks


def awkward(dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], list[Tensor]]:
    """Return weights and gradients of awkward shapes and strides."""
    torch.manual_seed(0)
    weights = [
        torch.randn(1, 1),
        torch.randn(37, 101),
        torch.zeros(0, 64),
        torch.randn(64, 33).t(),
        torch.randn(16, 8, 3, 3).to(memory_format=torch.channels_last),
        # The gradient has other strides than the weight.
        torch.randn(16, 8, 3, 3).to(memory_format=torch.channels_last),
        torch.randn(50, 40)[::2, 3:30:2],
        torch.randn(()),
    ]
    gradients = [torch.randn(weight.shape) for weight in weights]
    gradients[4] = gradients[4].to(memory_format=torch.channels_last)
    return [w.to(dtype) for w in weights], [g.to(dtype) for g in gradients]


@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_criterion_and_count(twin, criterion):
    weights, gradients = awkward()
    total = sum(weight.numel() for weight in weights)
    for count in (0, 1, total // 20, total - 1, total):
        same(twin, weights, gradients, count, criterion=criterion)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("criterion", ["swr", "magnitude"])
def test_dtypes(twin, dtype, criterion):
    weights, gradients = awkward(dtype)
    same(twin, weights, gradients, 3000, criterion=criterion)
    # Gradients of another dtype than the weights.
    same(twin, weights, [g.float() for g in gradients], 3000, criterion=criterion)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_number_of_a_small_dtype_is_read_right(twin, dtype):
    every = torch.arange(1 << 16).to(torch.int16).view(dtype)
    finite = int((~every.isnan()).sum())
    for count in (1, 2, 3000, finite // 2, finite - 2, finite):
        same(twin, [every], None, count, criterion="magnitude")


def test_caps_of_each_weight(twin):
    weights, gradients = awkward()
    weights[1].mul_(1e-3)
    free = same(twin, weights, gradients, 3000)
    assert int(free[1].sum()) > 1500
    caps = [1, 1500, 0, 0, 7, 200, 10_000, 1]
    masks = same(twin, weights, gradients, 2000, caps=caps)
    assert int(masks[1].sum()) == 1500
    sizes = [weight.numel() for weight in weights]
    allowed = sum(map(min, caps, sizes))
    masks = same(twin, weights, gradients, allowed, caps=caps)
    assert [int(mask.sum()) for mask in masks] == list(map(min, caps, sizes))


def test_the_smallest_scores_are_chosen(twin):
    weights = [torch.tensor([3.0, -1.0, 2.0]), torch.tensor([[-0.5], [4.0]])]
    gradients = [torch.tensor([1.0, 2.0, -1.5]), torch.tensor([[5.0], [-0.25]])]
    # Scores: 3, 2, 3 and 2.5, 1.
    masks = same(twin, weights, gradients, 3)
    assert [mask.flatten().tolist() for mask in masks] == [[False, True, False], [True, True]]
    masks = same(twin, weights, gradients, 2, caps=[3, 1])
    assert [mask.flatten().tolist() for mask in masks] == [[False, True, False], [False, True]]


def test_zeros_subnormals_and_infinities(twin):
    least = 2.0**-149
    values = torch.tensor([INF, 3 * least, -0.0, 2.0**-126, -INF, least, 0.0, -2 * least, 1.0])
    order = [2, 6, 5, 7, 1, 3, 8, 0, 4]
    for count in range(len(order) + 1):
        mask = same(twin, [values], None, count, criterion="magnitude")[0]
        if count not in (1, 8):  # zeros and infinities are ties
            assert set(mask.nonzero().flatten().tolist()) == set(order[:count])
    # A product that underflows to a subnormal number keeps its order.
    weights, gradients = torch.full((4,), 1e-22), torch.tensor([4e-22, 3e-22, 2e-22, 1e-22])
    mask = same(twin, [weights], [gradients], 2)[0]
    assert mask.tolist() == [False, False, True, True]


def test_nan_is_never_selected(twin):
    weights = [torch.tensor([NAN, 1.0, 0.0, INF, -NAN]), torch.tensor([2.0, NAN])]
    gradients = [torch.tensor([1.0, 1.0, INF, 1.0, 1.0]), torch.tensor([3.0, 1.0])]
    # 0 times infinity is NaN too.
    masks = same(twin, weights, gradients, 3)
    assert [mask.tolist() for mask in masks] == [[False, True, False, True, False], [True, False]]
    selection = twin.select(weights, gradients, ["a", "b"], 0)
    assert selection.eligible == (2, 1)


def test_ties_follow_the_seed_and_the_name(twin):
    weights = [torch.zeros(40, 50), torch.zeros(3000)]
    weights[0][0, :10] = 1.0
    base = same(twin, weights, None, 1000, criterion="magnitude", seed=1)
    again = same(twin, weights, None, 1000, criterion="magnitude", seed=1)
    other = same(twin, weights, None, 1000, criterion="magnitude", seed=2)
    renamed = same(
        twin, weights, None, 1000, criterion="magnitude", seed=1, names=["x", "layer1.weight"]
    )
    assert all(map(torch.equal, base, again))
    assert not torch.equal(base[0], other[0]) and not torch.equal(base[0], renamed[0])
    # Without regard to the place: 1990 and 3000 candidates share 1000 places.
    assert 340 < int(base[0].sum()) < 456
    assert 230 < int(base[1][:1500].sum()) / int(base[1].sum()) * 500 < 270
    # Ties between fewer elements are ordered in the same way.
    fewer = same(twin, weights, None, 500, criterion="magnitude", seed=1)
    assert all((small & ~large).sum() == 0 for small, large in zip(fewer, base, strict=True))


def test_ties_do_not_depend_on_strides(twin):
    weights = torch.zeros(30, 40, 3, 3)
    plain = same(twin, [weights], None, 500, criterion="random")[0]
    for other in (
        weights.to(memory_format=torch.channels_last),
        torch.zeros(3, 3, 40, 30).permute(3, 2, 0, 1),
        torch.zeros(30, 80, 3, 3)[:, ::2],
    ):
        assert torch.equal(same(twin, [other], None, 500, criterion="random")[0], plain)


def test_equal_words_are_ordered_by_weight_and_element(twin):
    # Two weights with one name have equal words.
    weights = [torch.zeros(30), torch.zeros(30), torch.zeros(30)]
    masks = same(twin, weights, None, 31, criterion="random", names=["a", "a", "a"])
    assert [int(mask.sum()) for mask in masks] == [11, 10, 10]
    same(twin, weights, None, 32, criterion="random", names=["a", "a", "a"], caps=[30, 10, 30])
    # Some two of 2^17 elements have equal words.
    words = reference.philox_words(philox_key(0, TIES, "a"), np.arange(1 << 17))
    order = np.argsort(words, kind="stable")
    twins = np.flatnonzero(np.diff(words[order].astype(np.int64)) == 0)
    assert len(twins) > 0
    for rank in twins:
        first, second = order[rank], order[rank + 1]
        count = int(rank) + 1
        mask = same(twin, [torch.zeros(1 << 17)], None, count, criterion="random", names=["a"])[0]
        assert mask[first] and not mask[second]


@pytest.mark.parametrize("criterion", ["swr", "random"])
def test_what_was_kept_for_the_next_pass_is_not_trusted_blindly(twin, criterion):
    torch.manual_seed(0)
    # A sample of the first elements says that all are large, or small.
    for large in (slice(0, 3000), slice(3000, None)):
        weights = [torch.rand(150_000) * 1e-3, torch.rand(300, 300)]
        weights[0][large] += 1.0
        gradients = [torch.ones_like(weight) for weight in weights]
        for caps in (None, [20_000, 100_000], [1000, 90_000]):
            same(twin, weights, gradients, 30_000, criterion=criterion, caps=caps)


@st.composite
def cases(draw):
    shapes = draw(st.lists(st.integers(0, 40), min_size=1, max_size=4))
    numbers = st.sampled_from([0.0, -0.0, 1.0, -1.0, 1.0 + 2.0**-23, 2.0**-149, 3.5, INF, NAN])
    weights = [torch.tensor(draw(st.lists(numbers, min_size=n, max_size=n))) for n in shapes]
    caps = draw(st.none() | st.tuples(*(st.integers(0, n + 1) for n in shapes)))
    return weights, caps, draw(st.floats(0, 1)), draw(st.integers(0, 9))


@settings(max_examples=150)
@given(case=cases())
def test_exactly_the_smallest_within_caps(twin, case):
    weights, caps, share, seed = case
    weights = [weight.float() for weight in weights]
    sizes = [int((~weight.isnan()).sum()) for weight in weights]
    allowed = sum(sizes if caps is None else map(min, caps, sizes))
    count = round(share * allowed)
    masks = same(twin, weights, None, count, criterion="magnitude", caps=caps, seed=seed)
    assert sum(int(mask.sum()) for mask in masks) == count
    chosen = [weight[mask].abs() for weight, mask in zip(weights, masks, strict=True)]
    left = [
        weight[~mask & ~weight.isnan()].abs() for weight, mask in zip(weights, masks, strict=True)
    ]
    largest = max((values.max() for values in chosen if len(values)), default=-INF)
    for i, values in enumerate(left):
        if len(values) and len(chosen[i]):
            assert chosen[i].max() <= values.min()
        if caps is None or len(chosen[i]) < caps[i]:
            assert not len(values) or largest <= values.min()
        assert caps is None or len(chosen[i]) <= caps[i]


def test_ten_million_elements():
    twin = importlib.import_module("fastplastic.kernels.cpu.select")
    generator = torch.Generator().manual_seed(0)
    sizes = [4_000_000, 5_999_000, 1000]
    weights = [torch.randn(size, generator=generator) for size in sizes]
    gradients = [torch.randn(size, generator=generator) for size in sizes]
    count = 500_000
    selection = twin.select(weights, gradients, names_of(weights), count, caps=[10**7, 100_000, 9])
    masks = twin.selection_masks(selection, weights, gradients)
    scores = [(w * g).abs() for w, g in zip(weights, gradients, strict=True)]
    assert [int(mask.sum()) for mask in masks] == [399_991, 100_000, 9]
    for score, mask in zip(scores, masks, strict=True):
        assert score[mask].max() < score[~mask].min()


def test_threads_do_not_change_the_result():
    twin = importlib.import_module("fastplastic.kernels.cpu.select")
    weights, gradients = awkward()
    weights.append(torch.randn(500, 300))
    gradients.append(torch.randn(500, 300))
    expected = twin.select(weights, gradients, names_of(weights), 5000)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert twin.select(weights, gradients, names_of(weights), 5000) == expected
    finally:
        torch.set_num_threads(threads)
    results = []

    def run() -> None:
        results.append(twin.select(weights, gradients, names_of(weights), 5000))

    workers = [threading.Thread(target=run) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert results == [expected] * 4


def test_parameters_with_gradients_are_not_changed(twin):
    weights, gradients = awkward()
    copies = [tensor.clone() for tensor in (*weights, *gradients)]
    parameters = [torch.nn.Parameter(weight) for weight in weights]
    same(twin, parameters, gradients, 2000)
    assert all(map(torch.equal, copies, (*weights, *gradients)))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"count": -1}, "count is -1, expected an integer that is 0 or more"),
        ({"count": 1.5}, "count is 1.5, expected an integer that is 0 or more"),
        (
            {"count": 6},
            "count is 6, expected at most 5: 5 elements have a score that is not NaN, and the caps "
            "let 5 of them be selected",
        ),
        (
            {"count": 4, "caps": [2, 1]},
            "count is 4, expected at most 3: 5 elements have a score that is not NaN, and the caps "
            "let 3 of them be selected",
        ),
        ({"caps": [2, -1]}, "caps are [2, -1], expected integers that are 0 or more"),
        ({"caps": [2]}, "there are 1 caps for 2 weights, expected one for each"),
        ({"names": ["a"]}, "there are 1 names for 2 weights, expected one for each"),
        ({"criterion": "l1"}, "criterion 'l1' is unknown, expected one of swr, gradient, magnit"),
        ({"gradients": None}, "there are no gradients, expected them for criterion 'swr'"),
        ({"gradients": [torch.ones(3)]}, "there are 1 gradients for 2 weights, expected one for e"),
        (
            {"gradients": [torch.ones(3), None]},
            "gradient 1 is missing, expected one for criterion 'swr': leave the weight out",
        ),
        (
            {"gradients": [torch.ones(3), torch.ones(4)]},
            "gradient 1 is torch.float32 (4,), expected a floating-point tensor (3,) like the wei",
        ),
        (
            {"weights": [torch.ones(3), torch.ones(3).int()]},
            "weight 1 is torch.int32, expected float32, bfloat16, float16 or float64",
        ),
    ],
)
@pytest.mark.parametrize("module", [*TWINS, "reference.select"])
def test_arguments_that_do_not_fit_are_refused(module, changes, text):
    twin = importlib.import_module(f"fastplastic.kernels.{module}")
    arguments = {
        "weights": [torch.ones(3), torch.tensor([1.0, 2.0, NAN])],
        "gradients": [torch.ones(3), torch.ones(3)],
        "names": ["a", "b"],
        "count": 2,
    } | changes
    with pytest.raises(ValueError, match="expected") as caught:
        twin.select(**arguments)
    assert text in str(caught.value)


def test_masks_of_other_weights_are_refused(twin):
    weights, gradients = [torch.ones(3)], [torch.ones(3)]
    selection = twin.select(weights, gradients, ["a"], 2)
    with pytest.raises(ValueError, match="there are 1 names of the selection for 2 weights"):
        twin.selection_masks(selection, weights * 2, gradients * 2)
    with pytest.raises(ValueError, match="there are no gradients, expected them for criterion"):
        twin.selection_masks(selection, weights, None)


def test_nothing_to_select_from(twin):
    selection = twin.select([], [], [], 0)
    assert selection.count == 0 and selection.eligible == ()
    assert twin.selection_masks(selection, [], []) == []
    with pytest.raises(ValueError, match="count is 1, expected at most 0: 0 elements"):
        twin.select([], [], [], 1)


def philox4x32(counter: list[int], key: list[int]) -> list[int]:
    """Return the block as in the paper, with Python's integers."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = p1 >> 32 ^ c1 ^ k0, p1 % 2**32, p0 >> 32 ^ c3 ^ k1, p0 % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [c0, c1, c2, c3]


def test_philox_gives_the_known_answers():
    # From the tests of Random123, which Salmon et al. published with the paper.
    assert philox4x32([0] * 4, [0] * 2) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    ones = 2**32 - 1
    assert philox4x32([ones] * 4, [ones] * 2) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    pi = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0]
    assert philox4x32(*pi) == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


@pytest.mark.parametrize("key", [0, 2**64 - 1, 0x299F31D0_A4093822, philox_key(3, TIES, "a")])
def test_philox_words(key):
    halves = [key % 2**32, key >> 32]
    words = reference.philox_words(key, np.arange(100))
    for element in (0, 1, 99, 2**32 - 1, 2**32, 0x85A308D3_243F6A88 >> 1):
        expected = philox4x32([element % 2**32, element >> 32, 0, 0], halves)[0]
        assert int(philox(np.uint64(key), element)) == expected
        assert element > 99 or words[element] == expected


def test_keys_depend_on_seed_purpose_and_name():
    keys = {
        philox_key(seed, purpose, name)
        for seed in (0, 1, -1, 2**80)
        for purpose in (TIES, "initial values")
        for name in ("a", "a.b", "")
    }
    assert len(keys) == 24 and all(0 <= key < 2**64 for key in keys)
    # Whatever changes here changes every selection and every fresh weight.
    assert philox_key(0, TIES, "layer1.weight") == 6385052965844982658


def test_the_host_part_loads_no_compiler():
    code = (
        "import fastplastic.kernels.philox, fastplastic.kernels.law, "
        "fastplastic.kernels.selection, fastplastic.kernels.reference.select, "
        "fastplastic.kernels.reference.resample, sys\n"
        "print(*{'numba', 'triton'} & sys.modules.keys())"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == ""
