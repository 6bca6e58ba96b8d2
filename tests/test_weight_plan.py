"""Plans of single weights: which are eligible, and which are taken."""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fastplastic
from fastplastic.errors import InputError
from fastplastic.kernels.philox import TIES, philox_key
from fastplastic.kernels.reference.select import philox_words
from fastplastic.model.weights import Weights
from fastplastic.stats import LayerStats, empty_table
from fastplastic.wiring import UnitLayer

NAN = float("nan")


@dataclass
class Layer:
    """What the planner reads of a LayerProfile."""

    name: str
    no_gradient: bool = False
    head: bool = False
    transformed: bool = False

    @property
    def stats(self) -> LayerStats:
        return LayerStats(empty_table(1))

    @property
    def wiring(self) -> UnitLayer:
        return UnitLayer(
            self.name, "linear", f"{self.name}.weight", None, 0, 1, None, ((0, 1, "relu"),),
            torch.ones(1, dtype=torch.bool), head=self.head, transformed=self.transformed,
        )  # fmt: skip


@dataclass
class Profile:
    layers: list[Layer]
    gradients: Mapping[str, Tensor] | None
    values: Mapping[str, Tensor]
    fingerprint: str = "f00d"
    weights: Weights | None = field(init=False)

    def __post_init__(self):
        self.weights = Weights(self.values)

    def __getitem__(self, name: str) -> Layer:
        return next(layer for layer in self.layers if layer.name == name)


def profile(scores: Mapping[str, list[float]], **layers: Layer) -> Profile:
    """Return a profile in which abs(w * dw) are these scores."""
    values = {f"{name}.weight": torch.tensor(own) for name, own in scores.items()}
    gradients = {name: torch.ones_like(value) for name, value in values.items()}
    return Profile([layers.get(name, Layer(name)) for name in scores], gradients, values)


def plan(source: Profile, **arguments) -> fastplastic.Plan:
    return fastplastic.plan(source, **{"granularity": "weight", **arguments})


def chosen(made: fastplastic.Plan) -> dict[str, list[int]]:
    return {name: mask.nonzero().flatten().tolist() for name, mask in made.masks.items()}


score = st.one_of(st.sampled_from([0.0, 0.5, 1.0]), st.floats(0, 10, width=32), st.just(NAN))
tensors = st.lists(st.lists(score, min_size=1, max_size=20), min_size=1, max_size=5)
shares = st.floats(0, 1, exclude_min=True)


@pytest.mark.parametrize("scope", ["global", "layer"])
@given(scores=tensors, ratio=shares, fraction=shares, seed=st.integers(0, 3))
@settings(max_examples=50, deadline=None)
def test_ratio_takes_an_exact_count_within_the_caps(scope, scores, ratio, fraction, seed):
    source = profile({f"l{i}": own for i, own in enumerate(scores)})
    eligible = {f"l{i}.weight": sum(not math.isnan(v) for v in own) for i, own in enumerate(scores)}
    total = sum(eligible.values())
    wanted = math.floor(ratio * total)
    room = sum(math.floor(fraction * size) for size in eligible.values())
    arguments = {"ratio": ratio, "scope": scope, "max_layer_fraction": fraction, "seed": seed}
    if wanted > room:
        with pytest.raises(InputError, match=f"{wanted} of {total} eligible weights.*{room}:"):
            plan(source, **arguments)
        return
    made = plan(source, **arguments)
    assert made.count == wanted == sum(made.counts.values()) and made.eligible == total
    assert made.criterion == "swr" and made.granularity == "weight" and not made.units
    for name, mask in made.masks.items():
        assert mask.dtype == torch.bool and mask.shape == source.values[name].shape
        assert 0 < made.counts[name] <= math.floor(fraction * eligible[name])
        assert not source.values[name][mask].isnan().any()
        if scope == "layer":
            assert abs(made.counts[name] - ratio * eligible[name]) <= 1 + 1e-9


@given(scores=tensors, ratio=shares)
@settings(max_examples=50, deadline=None)
def test_global_scope_takes_the_smallest_scores(scores, ratio):
    source = profile({f"l{i}": own for i, own in enumerate(scores)})
    made = plan(source, ratio=ratio, max_layer_fraction=1.0)
    everything = sorted(v for own in scores for v in own if not math.isnan(v))
    taken = sorted(v for name, m in made.masks.items() for v in source.values[name][m].tolist())
    assert taken == torch.tensor(everything).tolist()[: made.count]


def test_the_gradient_counts_as_much_as_the_weight():
    source = profile({"a": [1.0, 2.0, 3.0, 4.0]})
    source.gradients = {"a.weight": torch.tensor([-8.0, 2.0, 0.5, -0.25])}
    # abs(w * dw): 8, 4, 1.5, 1.
    half = {"ratio": 0.5, "max_layer_fraction": 1.0}
    assert chosen(plan(source, **half)) == {"a.weight": [2, 3]}
    assert chosen(plan(source, **half, criterion="gradient")) == {"a.weight": [2, 3]}
    assert chosen(plan(source, **half, criterion="magnitude")) == {"a.weight": [0, 1]}
    source.gradients = {"a.weight": torch.tensor([0.5, -0.25, 2.0, -8.0])}
    assert chosen(plan(source, **half, criterion="gradient")) == {"a.weight": [0, 1]}


def test_threshold_takes_what_is_at_most_that_share_of_the_mean_of_its_tensor():
    source = profile({"a": [0.0, 1.0, 2.0, 9.0], "b": [10.0, 20.0, 30.0, NAN], "c": [5.0, 5.0]})
    # Means 3, 20 and 5; the NaN does not count.
    made = plan(source, threshold=0.5, max_layer_fraction=1.0)
    assert chosen(made) == {"a.weight": [0, 1], "b.weight": [0]}
    assert made.eligible == 9 and made.threshold == 0.5 and made.ratio is None
    assert plan(source, threshold=-1.0).notes == ("no weight is selected",)


def test_a_threshold_is_capped_and_the_smallest_are_taken():
    # One outlier raises the mean over everything else.
    source = profile({"a": [3.0, 1.0, 2.0, 4.0, 1e6], "b": [1.0, 1.0]})
    made = plan(source, threshold=0.5)
    assert chosen(made) == {"a.weight": [1, 2]}
    assert made.notes == (
        "a.weight: 4 of 5 weights pass the threshold, max_layer_fraction allows 2: the smallest "
        "are taken",
    )


def test_random_is_the_control():
    source = profile({"a": [0.0] * 400, "b": [float(i) for i in range(400)]})
    made = plan(source, ratio=0.25, criterion="random")
    assert made.count == 200 and 60 < made.counts["b.weight"] < 140
    other = plan(source, ratio=0.25, criterion="random", seed=1)
    assert chosen(made) != chosen(other)
    with pytest.raises(InputError, match=r"threshold 0\.1 means nothing for random weights, expec"):
        plan(source, threshold=0.1, criterion="random")


def test_ties_depend_neither_on_the_order_of_layers_nor_on_the_others():
    scores = {"a": [0.0] * 300, "b": [0.0] * 200, "c": [1.0] * 100}
    made = plan(profile(scores), ratio=0.2, seed=3)
    turned = plan(profile(dict(reversed(scores.items()))), ratio=0.2, seed=3)
    assert chosen(made) == chosen(turned) and made.counts != {"a.weight": 120}
    alone = plan(profile({"b": scores["b"]}), ratio=0.2, scope="layer", seed=3)
    among = plan(profile(scores), ratio=0.2, scope="layer", seed=3)
    assert chosen(alone)["b.weight"] == chosen(among)["b.weight"]


def test_equal_ties_of_two_tensors_do_not_depend_on_their_order():
    # The words that order ties have 32 bits: of so many elements some have the same.
    n = 200_000
    words = [
        philox_words(philox_key(0, TIES, name), np.arange(n)) for name in ("a.weight", "b.weight")
    ]
    _, *same = np.intersect1d(*words, return_indices=True)
    scores = {name: [1.0] * n for name in "ab"}
    for name, elements in zip("ab", same, strict=True):
        scores[name][elements[0]] = 0.0
    arguments = {"ratio": 1 / (2 * n), "max_layer_fraction": 1.0}
    made = plan(profile(scores), **arguments)
    turned = plan(profile(dict(reversed(scores.items()))), **arguments)
    assert made.count == 1 and chosen(made) == chosen(turned)


def test_what_makes_the_output_is_taken_by_name_only():
    source = profile({"a": [1.0] * 4, "fc": [0.0] * 4}, fc=Layer("fc", head=True))
    for include in ((), ("*",), ("a", "f*")):
        made = plan(source, ratio=0.5, include=include)
        assert set(made.masks) == {"a.weight"} and made.eligible == 4
        assert "as it makes the output (include '*' and its name" in made.notes[0]
    for include in (("fc",), ("fc.weight",)):
        made = plan(source, ratio=0.5, include=include)
        assert set(made.masks) == {"fc.weight"} and not made.notes
    with pytest.raises(InputError, match=r"no weight to choose from \(not chosen from, as it mak"):
        plan(source, ratio=0.5, include="f*")


def test_layers_without_gradient_or_of_their_own_making_are_left_out():
    layers = {"b": Layer("b", no_gradient=True), "c": Layer("c", transformed=True)}
    source = profile({name: [0.0] * 4 for name in "abcd"}, **layers)
    source.weights = Weights({k: v for k, v in source.values.items() if k != "d.weight"})
    made = plan(source, ratio=0.5)
    assert set(made.masks) == {"a.weight"} and made.eligible == 4
    assert made.notes == (
        "not chosen from, as it is transformed before use: c.weight",
        "not chosen from, as the profile does not hold it (computed, shared, or lent for the "
        "loss): d.weight",
        "not chosen from, as no gradient reaches it: b.weight",
    )
    made = plan(source, ratio=0.5, criterion="magnitude")
    assert made.eligible == 8 and "magnitude failed in all settings" in made.notes[0]


class Net(nn.Module):
    """A bit of everything that is not chosen by default."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(6))
        self.a, self.b, self.c = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 3)
        self.tied = nn.Linear(16, 16)
        self.tied.weight = self.c.weight

    def forward(self, x):
        h = self.norm(self.a(x + self.position).relu())
        return self.head(self.tied(self.c(self.b(h).relu()).relu()).relu())


def net() -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    batches = [(torch.randn(8, 6), torch.randint(0, 3, (8,))) for _ in range(3)]
    return Net(), batches


def test_a_real_profile_gives_the_smallest_products_of_weight_and_mean_gradient():
    model, batches = net()
    source = fastplastic.profile(model, batches, gradients=True)
    made = plan(source, ratio=0.1)
    assert set(made.masks) <= {"a.weight", "b.weight"} and made.eligible == 96 + 256
    for x, y in batches:
        (nn.functional.cross_entropy(model(x), y) / len(batches)).backward()
    scores = torch.cat([(p.grad * p).abs().flatten() for p in (model.a.weight, model.b.weight)])
    masks = [made.masks.get(name, torch.zeros(0)).flatten() for name in ("a.weight", "b.weight")]
    taken = torch.cat(masks)
    assert made.count == taken.sum() == 35
    assert scores[taken].max() <= scores[~taken].min() * (1 + 1e-5)


def test_parameters_that_are_no_weights_of_layers_are_taken_by_their_full_name():
    model, batches = net()
    source = fastplastic.profile(model, batches, gradients=True)
    names = ["position", "norm.weight", "a.bias", "head"]
    made = plan(source, ratio=0.5, include=names, scope="layer")
    assert set(made.masks) == {"position", "norm.weight", "a.bias", "head.weight"}
    assert set(made.wiring) == {"head"}
    with pytest.raises(InputError, match="include pattern 'pos\\*' matches none of the 4 layers"):
        plan(source, ratio=0.5, include=["pos*"])
    made = plan(source, ratio=0.5, include=["position", "a"], exclude=["position"])
    assert set(made.masks) == {"a.weight"}


def test_a_parameter_without_gradient_is_left_out_also_by_name():
    model, batches = net()
    model.position.requires_grad_(False)
    source = fastplastic.profile(model, batches, gradients=True)
    made = plan(source, ratio=0.1, include=["position", "a"])
    assert made.notes == ("not chosen from, as no gradient reaches it: position",)
    assert "position" in plan(source, ratio=0.5, include=["position"], criterion="random").masks


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_weights_that_have_changed_are_refused(dtype):
    model, batches = net()
    model.to(dtype)
    batches = [(x.to(dtype), y) for x, y in batches]
    source = fastplastic.profile(model, batches, gradients=True)
    assert plan(source, ratio=0.1).count == 35
    # Past the version counter of the parameter.
    model.b.weight.data[3, 5] *= 1.5
    with pytest.raises(InputError, match=r"^'b\.weight' has changed since it was profiled, expec"):
        plan(source, ratio=0.1)


def test_without_kept_gradients_there_is_no_plan_of_weights():
    model, batches = net()
    source = fastplastic.profile(model, batches)
    with pytest.raises(InputError, match=r"holds no mean gradients.*: profile with gradients=True"):
        plan(source, ratio=0.1)
    assert source.weights is None


def test_a_saved_profile_gives_the_same_plan(tmp_path):
    model, batches = net()
    source = fastplastic.profile(model, batches, gradients=True)
    made = plan(source, ratio=0.1)
    source.save(tmp_path / "profile.safetensors")
    model.b.weight.data.zero_()
    again = plan(fastplastic.Profile.load(tmp_path / "profile.safetensors"), ratio=0.1)
    assert chosen(made) == chosen(again) and made.eligible == again.eligible
    with pytest.raises(InputError, match="has changed since it was profiled"):
        source.save(tmp_path / "other.safetensors")


def test_weights_on_two_devices_are_refused():
    source = profile({"a": [1.0] * 4, "b": [1.0] * 4})
    other = {**source.values, "b.weight": torch.ones(4, device="meta")}
    source.weights._tensors = other
    source.weights.check = lambda: None
    with pytest.raises(InputError, match=r"weights are on 2 devices \(cpu, meta\), expected one"):
        plan(source, ratio=0.1)


def test_criteria_of_the_other_granularity_are_refused():
    source = profile({"a": [1.0] * 4})
    with pytest.raises(InputError, match="'dead' is unknown for granularity 'weight', expected"):
        plan(source, ratio=0.1, criterion="dead")
    with pytest.raises(InputError, match="'swr' is unknown for granularity 'unit', expected"):
        plan(source, ratio=0.1, criterion="swr", granularity="unit")
    assert repr(plan(source, ratio=0.5)) == "Plan(swr, ratio 0.5: 2 of 4 weights in 1 tensors)"


def test_plans_and_fresh_weights_do_not_depend_on_threads():
    model, batches = net()
    source = fastplastic.profile(model, batches, gradients=True)
    made, state = [], []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            made.append(chosen(plan(source, ratio=0.2, criterion="random")))
            other = copy.deepcopy(model)
            fastplastic.reinit_(other, plan(source, ratio=0.2))
            state.append(other.state_dict())
    finally:
        torch.set_num_threads(before)
    assert made[0] == made[1] == made[2]
    for name, value in state[0].items():
        assert all(torch.equal(value, own[name]) for own in state)
