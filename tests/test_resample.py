import importlib
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from fastplastic.kernels.law import Law
from fastplastic.kernels.reference import resample as reference

# Modules with `resample_`; each gives the same bits as the oracle.
TWINS = ["cpu.resample"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
INF = math.inf
NORMAL, UNIFORM = Law("normal", 0.0, 1.0), Law("uniform", 0.0, 1.0)
LAWS = [
    NORMAL,
    Law("uniform", -1.0, 2.0),
    # Truncated, and cut off above that.
    Law("normal", 0.5, 0.02, 0.0227, 1.0, 0.49, INF),
    Law("normal", 1.0, -3e-4, 0.1, 0.9, 0.9997, 1.0002),
    Law("uniform", 0.25, 0.0),
    # Subnormal in float16, infinite in float16, probabilities that round to 1.
    Law("uniform", -1e-6, 2e-6),
    Law("normal", 0.0, 1e5),
    Law("normal", 0.0, 1.0, 1 - 1e-9, 1.0),
]


@pytest.fixture(params=TWINS, scope="module")
def twin(request):
    return importlib.import_module(f"fastplastic.kernels.{request.param}")


@pytest.fixture(params=[*TWINS, "reference.resample"], scope="module")
def any_twin(request):
    return importlib.import_module(f"fastplastic.kernels.{request.param}")


def awkward(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Return weights of awkward shapes and strides that hold NaN."""
    weights = [
        torch.empty(1, 1, dtype=dtype),
        torch.empty(37, 101, dtype=dtype),
        torch.empty(0, 64, dtype=dtype),
        torch.empty(64, 33, dtype=dtype).t(),
        torch.empty(16, 8, 3, 3, dtype=dtype, memory_format=torch.channels_last),
        torch.empty(50, 40, dtype=dtype)[::2, 3:30:2],
        torch.empty(24, dtype=dtype)[::3],
        torch.empty((), dtype=dtype),
    ]
    return [weight.fill_(math.nan) for weight in weights]


def names_of(weights: list[Tensor]) -> list[str]:
    return [f"layer{i}.weight" for i in range(len(weights))]


def bits(weights: list[Tensor]) -> list[Tensor]:
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return [weight.contiguous().view(kinds[weight.itemsize]) for weight in weights]


def identical(one: list[Tensor], two: list[Tensor]) -> bool:
    return all(map(torch.equal, bits(one), bits(two)))


def draw(twin, law: Law, *shape: int, name: str = "weight", seed: int = 0) -> Tensor:
    weight = torch.full(shape, math.nan)
    twin.resample_([weight], [name], [law], seed=seed)
    return weight


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("law", LAWS, ids=str)
def test_the_bits_of_every_law(twin, dtype, law):
    weights, expected = awkward(dtype), awkward(dtype)
    laws = [law] * len(weights)
    twin.resample_(weights, names_of(weights), laws, seed=3)
    reference.resample_(expected, names_of(weights), laws, seed=3)
    assert identical(weights, expected)
    assert not any(weight.isnan().any() for weight in weights)


def test_the_bits_of_many_elements(twin):
    for law in LAWS[:3]:
        assert identical([draw(twin, law, 300_000)], [draw(reference, law, 300_000)])


def test_dtypes_round_the_same_number(any_twin):
    single = draw(any_twin, NORMAL, 5000)
    for dtype in DTYPES:
        other = torch.empty(5000, dtype=dtype)
        any_twin.resample_([other], ["weight"], [NORMAL])
        assert torch.equal(other, single.to(dtype))


def test_an_element_depends_on_nothing_else(any_twin):
    shape = (30, 40, 3, 3)
    plain = draw(any_twin, NORMAL, *shape)
    # Not on strides.
    for other in (
        torch.empty(shape).to(memory_format=torch.channels_last),
        torch.empty(3, 3, 40, 30).permute(3, 2, 0, 1),
        torch.empty(30, 80, 3, 3)[:, ::2],
    ):
        any_twin.resample_([other], ["weight"], [NORMAL])
        assert torch.equal(other, plain)
    # Not on the other weights of the call.
    weights = [torch.empty(7, 5), torch.empty(shape), torch.empty(3)]
    any_twin.resample_(weights, ["a", "weight", "b"], [UNIFORM, NORMAL, UNIFORM])
    assert torch.equal(weights[1], plain)
    # Not on which others are written.
    some = torch.zeros(shape)
    mask = torch.rand(shape) < 0.3
    any_twin.resample_([some], ["weight"], [NORMAL], masks=[mask])
    assert torch.equal(some, torch.where(mask, plain, 0.0))


def test_seed_and_name_give_other_numbers(any_twin):
    base = draw(any_twin, NORMAL, 1000)
    assert torch.equal(base, draw(any_twin, NORMAL, 1000))
    for other in (draw(any_twin, NORMAL, 1000, seed=1), draw(any_twin, NORMAL, 1000, name="bias")):
        assert (other == base).sum() < 5 and abs(
            torch.corrcoef(torch.stack([base, other]))[0, 1]
        ) < 0.15
    assert len(base.unique()) == 1000


def test_the_global_random_state_is_neither_read_nor_changed(any_twin):
    torch.manual_seed(1)
    state = torch.get_rng_state(), np.random.get_state()[1].copy()
    one = draw(any_twin, NORMAL, 100)
    assert torch.equal(state[0], torch.get_rng_state())
    assert (state[1] == np.random.get_state()[1]).all()
    torch.manual_seed(2)
    assert torch.equal(one, draw(any_twin, NORMAL, 100))


def masks_of(weights: list[Tensor]) -> list[Tensor | None]:
    """Return row masks, column masks, masks of single elements, and none."""
    torch.manual_seed(0)
    masks: list[Tensor | None] = [torch.rand(weight.shape) < 0.4 for weight in weights]
    masks[1] = (torch.rand(37, 1) < 0.4).expand(37, 101)
    masks[3] = (torch.rand(1, 64) < 0.4).expand(33, 64)
    masks[4] = (torch.rand(16, 1, 1, 1) < 0.4).expand(16, 8, 3, 3)
    masks[6] = None
    return masks


@pytest.mark.parametrize("dtype", DTYPES)
def test_only_the_masked_elements_are_written(twin, dtype):
    weights, expected = awkward(dtype), awkward(dtype)
    masks = masks_of(weights)
    laws = LAWS[: len(weights)]
    twin.resample_(weights, names_of(weights), laws, masks=masks)
    reference.resample_(expected, names_of(weights), laws, masks=masks)
    assert identical(weights, expected)
    for weight, mask in zip(weights, masks, strict=True):
        assert torch.equal(
            ~weight.isnan(), torch.ones_like(weight).bool() if mask is None else mask
        )


def test_a_gap_between_the_elements_of_a_view_is_not_written(any_twin):
    base = torch.zeros(40, 50)
    any_twin.resample_([base[::2, 10:40:3]], ["weight"], [Law("uniform", 1.0, 1.0)])
    inside = torch.zeros(40, 50, dtype=torch.bool)
    inside[::2, 10:40:3] = True
    assert torch.equal(base != 0, inside)


def phi(x: float) -> float:
    return math.erfc(-x / math.sqrt(2)) / 2


def cdf(law: Law, values: Tensor) -> Tensor:
    """Return the distribution function of a law that is not clamped."""
    z = (values - law.location) / law.scale
    p = z if law.kind == "uniform" else torch.special.ndtr(z)
    return ((p - law.p_low) / (law.p_high - law.p_low)).clamp(0, 1)


@pytest.mark.parametrize(
    "law",
    [
        NORMAL,
        UNIFORM,
        Law("uniform", -0.3, 0.2),
        Law("normal", 3.0, 0.5),
        Law("normal", 0.0, 0.02, phi(-2), phi(2)),
        Law("normal", 0.0, 1.0, phi(1), 1.0),
        Law("normal", 0.0, 1.0, 0.0, phi(-2)),
    ],
    ids=str,
)
def test_the_distribution_is_that_of_the_law(any_twin, law):
    n = 400_000
    p = cdf(law, draw(any_twin, law, n).double()).sort().values
    steps = torch.arange(n + 1) / n
    distance = torch.maximum(steps[1:] - p, p - steps[:-1]).max()
    # Kolmogorov and Smirnov: a right generator exceeds this one time in 5000, or never.
    assert distance * math.sqrt(n) < 2.15
    assert p.min() < 2e-5 and p.max() > 1 - 2e-5


def test_moments_of_the_normal_law(any_twin):
    values = draw(any_twin, NORMAL, 1_000_000).double()
    error = 1e-3
    assert abs(values.mean()) < 4 * error
    assert abs(values.var() - 1) < 4 * math.sqrt(2) * error
    assert abs((values**3).mean()) < 4 * math.sqrt(15) * error
    assert abs((values**4).mean() - 3) < 4 * math.sqrt(96) * error
    # Neighbours do not know of each other.
    assert abs((values[1:] * values[:-1]).mean()) < 4 * error


def test_the_quantile_of_the_normal_law_is_right():
    words = (np.arange(0, 2**23, 31, dtype=np.uint32) << 9) | 5
    values = reference._values(NORMAL, words)
    p = (torch.arange(0, 2**23, 31, dtype=torch.float64) + 0.5) * 2.0**-23
    assert (torch.from_numpy(values) - torch.special.ndtri(p)).abs().max() < 2e-6
    # Also where the probability is so near to an end that float32 has no number between them.
    ends = reference._values(Law("normal", 0.0, 1.0, 1 - 1e-9, 1.0), words)
    assert ((ends > 5) & (ends < 7)).all()


def test_values_stay_within_the_law(any_twin):
    law = Law("normal", 0.0, 1.0, low=-0.5, high=0.25)
    values = draw(any_twin, law, 10_000)
    assert values.min() == -0.5 and values.max() == 0.25
    assert 0.28 < (values == -0.5).double().mean() < 0.34


def test_a_constant_is_exact(any_twin):
    for value in (0.0, -0.1, 3e38):
        assert draw(any_twin, Law("uniform", value, 0.0), 100).unique().tolist() == [
            torch.tensor(value).item()
        ]


def test_parameters_are_written_and_know_it(any_twin):
    weight = torch.nn.Parameter(torch.zeros(3, 4))
    square = (weight * weight).sum()
    any_twin.resample_([weight], ["weight"], [NORMAL])
    assert (weight != 0).all() and weight.requires_grad and weight.grad_fn is None
    # The graph was made with other values.
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.backward()


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"names": []}, "there are 0 names for 1 weights, expected one for each"),
        ({"laws": []}, "there are 0 laws for 1 weights, expected one for each"),
        ({"masks": []}, "there are 0 masks for 1 weights, expected one for each"),
        (
            {"masks": [torch.ones(3, 1, dtype=torch.bool)]},
            "mask 0 is torch.bool (3, 1), expected torch.bool (3, 4) like the weight: expand it",
        ),
        ({"masks": [torch.ones(3, 4)]}, "mask 0 is torch.float32 (3, 4), expected torch.bool"),
        (
            {"weights": [torch.ones(3, 1).expand(3, 4)]},
            "weight 0 is expanded, expected elements of its own: clone it",
        ),
        (
            {"weights": [torch.ones(3, 4).long()]},
            "weight 0 is torch.int64, expected float32, bfloat16, float16 or float64",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_refused(any_twin, changes, text):
    arguments = {"weights": [torch.ones(3, 4)], "names": ["a"], "laws": [NORMAL]} | changes
    with pytest.raises(ValueError, match="expected") as caught:
        any_twin.resample_(**arguments)
    assert text in str(caught.value)
    assert (arguments["weights"][0] == 1).all()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("cauchy", 0.0, 1.0), "law 'cauchy' is unknown, expected 'uniform' or 'normal'"),
        (("normal", math.nan, 1.0), "the law has location nan and scale 1.0, expected finite num"),
        (("normal", 0.0, INF), "the law has location 0.0 and scale inf, expected finite numbers"),
        (("normal", 0.0, 1.0, 0.5, 0.4), "between probabilities 0.5 and 0.4, expected 0 <= p_low"),
        (("normal", 0.0, 1.0, -0.1, 0.4), "between probabilities -0.1 and 0.4, expected 0 <= p"),
        (
            ("normal", 0.0, 1.0, 0.0, 1.0, 2.0, 1.0),
            "lies between 2.0 and 1.0, expected low <= high",
        ),
    ],
)
def test_what_is_no_law(arguments, text):
    with pytest.raises(ValueError, match="expected") as caught:
        Law(*arguments)
    assert text in str(caught.value)
