import math
import threading

import pytest
import torch
from timm.layers import lecun_normal_, trunc_normal_, trunc_normal_tf_
from torch import nn

from fastplastic.initial.laws import Law, constant, normal, then, truncated_normal, uniform
from fastplastic.initial.recorder import record_laws
from fastplastic.kernels.reference.resample import resample_


def sample(law: Law, n: int = 20_000) -> torch.Tensor:
    values = torch.empty(n)
    resample_([values], ["weight"], [law])
    return values.double()


def moments(law: Law) -> tuple[float, float]:
    values = sample(law)
    return values.mean().item(), values.std().item()


def steps(law: Law, *chain: tuple) -> Law | None:
    for operation, *arguments in chain:
        law = then(law, operation, *arguments)
    return law


def test_the_sources_have_their_moments():
    # 20 000 numbers: the mean is known to 1 %, the standard deviation to less.
    assert moments(constant(0.25)) == (0.25, 0.0)
    assert moments(uniform(1.0, 3.0)) == pytest.approx((2, 2 / math.sqrt(12)), abs=0.02)
    assert moments(normal(-1.0, 0.5)) == pytest.approx((-1, 0.5), abs=0.02)
    # Half-normal: mean sqrt(2 / pi), variance 1 - 2 / pi.
    expected = math.sqrt(2 / math.pi), math.sqrt(1 - 2 / math.pi)
    law = truncated_normal(0.0, 1.0, 0.0, 100.0)
    assert moments(law) == pytest.approx(expected, abs=0.02)
    assert sample(law).min() >= 0 and sample(law).isfinite().all()


def test_a_truncation_far_out_stays_inside():
    # Both ends round to probability 1 here.
    values = sample(truncated_normal(0.0, 1.0, 9.0, 10.0))
    assert values.min() >= 9 and values.max() <= 10


def test_steps_are_taken_in_order():
    law = steps(constant(3.0), ("add", 1.0), ("mul", 2.0), ("div", 16.0))
    assert law == constant(0.5)
    assert sample(then(law, "clamp", -1.0, 0.25)).unique().tolist() == [0.25]


CHAINS = {
    "scaled": (uniform(0.0, 1.0), ("mul", 4.0), ("add", -1.0), ("div", 2.0)),
    "mirrored": (uniform(0.0, 1.0), ("mul", -3.0), ("add", 0.5)),
    "clamped, then mirrored": (normal(0.0, 1.0), ("clamp", -1.0, 0.5), ("mul", -2.0)),
    "clamped, then divided": (normal(0.0, 1.0), ("clamp", -1.0, 0.5), ("div", -2.0), ("add", 1.0)),
    "clamped twice": (normal(1.0, 1.0), ("clamp", 0.0, 2.0), ("add", 1.0), ("clamp", 1.5, 9.0)),
    "clamped to nothing": (normal(0.0, 1.0), ("clamp", 3.0, 9.0), ("clamp", -1.0, 1.0)),
    "by zero": (normal(0.0, 1.0), ("clamp", -1.0, math.inf), ("mul", 0.0)),
    "erfinv": (uniform(-0.5, 0.9), ("erfinv",), ("mul", 2.0)),
    "erfinv, turned": (uniform(0.9, -0.5), ("erfinv",), ("clamp", -0.2, 1.0)),
}
OPERATIONS = {
    "mul": torch.mul, "div": torch.div, "add": torch.add, "erfinv": torch.erfinv,
    "clamp": torch.clamp,
}  # fmt: skip


@pytest.mark.parametrize("name", CHAINS)
def test_a_chain_of_steps_is_the_same_as_its_law(name):
    law, *chain = CHAINS[name]
    values = sample(law)
    for operation, *arguments in chain:
        values = OPERATIONS[operation](values, *arguments)
    folded = sample(steps(law, *chain))
    # The order of the random numbers may be turned round: distributions are compared.
    shares = torch.linspace(0.01, 0.99, 21, dtype=torch.float64)
    spread = max(values.std().item(), 1e-3)
    assert torch.allclose(folded.quantile(shares), values.quantile(shares), atol=0.05 * spread)


@pytest.mark.parametrize(
    ("law", "chain"),
    [
        (normal(0.0, 1.0), [("erfinv",)]),
        (constant(0.5), [("erfinv",)]),
        (uniform(0.0, 0.5), [("clamp", 0.1, 0.2), ("erfinv",)]),
        (uniform(0.0, 3.0), [("erfinv",)]),
        (normal(0.0, 1.0), [("div", 0.0)]),
        (normal(0.0, 1.0), [("add", math.inf)]),
        (normal(0.0, 1.0), [("mul", math.nan)]),
    ],
)
def test_what_has_another_form_is_no_law(law, chain):
    assert steps(law, *chain) is None


def recorded(initialise) -> Law | None:
    """Return the law of a Linear's weight after `initialise(layer)`."""

    def build() -> nn.Module:
        layer = nn.Linear(30, 40)
        initialise(layer)
        return layer

    shape, law = record_laws(build)["weight"]
    assert shape == (40, 30)
    return law


@torch.no_grad()
def real(initialise) -> torch.Tensor:
    layer = nn.Linear(30, 40)
    initialise(layer)
    return layer.weight.double()


def scaled(layer: nn.Linear) -> None:
    nn.init.normal_(layer.weight, 1.0, 2.0)
    layer.weight.data.div_(4.0)
    with torch.no_grad():
        layer.weight.sub_(0.5).mul_(torch.tensor(2.0, device="cpu"))
        layer.weight.add_(1.0, alpha=0.25).clamp_(min=-0.5)


ELEMENTWISE = {
    "default": lambda layer: None,
    "kaiming_normal": lambda layer: nn.init.kaiming_normal_(layer.weight),
    "xavier_uniform": lambda layer: nn.init.xavier_uniform_(layer.weight, 0.5),
    "torch trunc_normal": lambda layer: nn.init.trunc_normal_(layer.weight, std=0.02),
    "torch trunc_normal, narrow": lambda layer: nn.init.trunc_normal_(layer.weight, 0.5, 1, 0, 1),
    "timm trunc_normal": lambda layer: trunc_normal_(layer.weight, std=0.02),
    "timm trunc_normal_tf": lambda layer: trunc_normal_tf_(layer.weight, std=0.02),
    "lecun_normal": lambda layer: lecun_normal_(layer.weight),
    "zeros": lambda layer: nn.init.zeros_(layer.weight),
    "new parameter": lambda layer: setattr(layer, "weight", nn.Parameter(torch.ones(40, 30))),
    "scaled": scaled,
}


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_what_initialises_a_parameter_is_recorded(name):
    law = recorded(ELEMENTWISE[name])
    assert law is not None
    drawn = sample(law, 12_000)
    torch.manual_seed(0)
    fresh = torch.cat([real(ELEMENTWISE[name]).flatten() for _ in range(10)])
    # 12 000 numbers each; quantiles also tell a clamp or a cut tail. Extremes vary the most.
    for share in (0.0, 0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.98, 1.0):
        slack = 1.0 if share in (0.0, 1.0) else 0.1
        assert abs(drawn.quantile(share) - fresh.quantile(share)) <= slack * fresh.std() + 1e-12


@torch.no_grad()
def rows_apart(layer: nn.Linear) -> None:
    layer.weight[:10].normal_()


@torch.no_grad()
def column_scale(layer: nn.Linear) -> None:
    layer.weight.mul_(torch.arange(30))


@pytest.mark.parametrize(
    "initialise",
    [
        lambda layer: nn.init.orthogonal_(layer.weight),
        lambda layer: nn.init.sparse_(layer.weight, 0.5),
        lambda layer: nn.init.eye_(layer.weight),
        lambda layer: layer.weight.data.copy_(torch.randn(40, 30)),
        lambda layer: setattr(layer, "weight", nn.Parameter(torch.randn(40, 30))),
        lambda layer: layer.weight.data.abs_(),
        rows_apart,
        column_scale,
    ],
    ids=["orthogonal", "sparse", "eye", "copy", "computed", "abs", "rows apart", "column scale"],
)
def test_what_is_not_elementwise_has_no_law(initialise):
    assert recorded(initialise) is None


def test_a_full_overwrite_starts_a_new_law():
    def initialise(layer: nn.Linear) -> None:
        nn.init.orthogonal_(layer.weight)
        nn.init.normal_(layer.weight)

    assert recorded(initialise) == normal(0.0, 1.0)


def test_a_fill_that_is_not_finite_has_no_law():
    assert recorded(lambda layer: nn.init.constant_(layer.weight, -math.inf)) is None

    def masked(layer: nn.Linear) -> None:
        torch.full((3, 3), -math.inf)
        nn.init.ones_(layer.weight)

    assert recorded(masked) == constant(1.0)


def test_dirac_has_no_law():
    def build() -> nn.Module:
        conv = nn.Conv2d(4, 4, 3)
        nn.init.dirac_(conv.weight)
        return conv

    assert record_laws(build)["weight"][1] is None


def test_recording_leaves_random_state_and_functions_alone():
    functions = nn.init.orthogonal_, nn.init.trunc_normal_, vars(nn.init).copy()
    state = torch.get_rng_state()
    recorded(ELEMENTWISE["torch trunc_normal"])
    recorded(lambda layer: torch.randn(3, device="cpu"))
    assert torch.equal(state, torch.get_rng_state())
    assert functions == (nn.init.orthogonal_, nn.init.trunc_normal_, vars(nn.init))


def test_other_threads_initialise_as_ever_meanwhile():
    weight = torch.zeros(8, 8)

    def initialise(layer: nn.Linear) -> None:
        thread = threading.Thread(target=nn.init.orthogonal_, args=(weight,))
        thread.start()
        thread.join()

    recorded(initialise)
    assert torch.allclose(weight @ weight.T, torch.eye(8), atol=1e-5)


def test_an_unseen_truncated_normal_makes_no_law_trusted(monkeypatch):
    # As if a later PyTorch skipped meta tensors in a function of another name.
    monkeypatch.setattr(nn.init, "trunc_normal_", lambda tensor, **_: tensor)
    assert recorded(ELEMENTWISE["kaiming_normal"]) is None
