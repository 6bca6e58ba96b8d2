import math
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from fastplastic.errors import InputError
from fastplastic.planning import plan
from fastplastic.stats import STATISTICS, LayerStats, empty_table
from fastplastic.wiring import Coupling, UnitLayer


@dataclass
class Layer:
    """What the planner reads of a LayerProfile; criterion `dead` scores each unit with `scores`."""

    name: str
    scores: list[float]
    hidden: list[bool] | None = None
    coupled: tuple[Coupling, ...] = ()
    flat: list[float] | None = None
    gradients: list[float] | None = None

    @property
    def n_units(self) -> int:
        return len(self.scores)

    @property
    def wiring(self) -> UnitLayer:
        hidden = [True] * self.n_units if self.hidden is None else self.hidden
        return UnitLayer(
            self.name, "linear", f"{self.name}.weight", None, 0, self.n_units, None,
            ((0, self.n_units, "relu"),), torch.tensor(hidden, dtype=torch.bool),
            coupled=self.coupled,
        )  # fmt: skip

    @property
    def stats(self) -> LayerStats:
        table = empty_table(self.n_units)
        scores = torch.tensor(self.scores, dtype=torch.float64)
        rows = {
            # Of a single position no range is known.
            "n": 2 * (~scores.isnan()).double(),
            "min_h": torch.zeros(self.n_units),
            "max_h": scores.nan_to_num(),
            "n_flat": 2 * torch.tensor(self.flat or [0.0] * self.n_units),
            "n_dw": torch.ones(self.n_units),
            "sum_abs_dw": torch.tensor(self.gradients or [0.0] * self.n_units),
        }
        for name, values in rows.items():
            table[STATISTICS.index(name)] = values
        return LayerStats(table)


@dataclass
class Profile:
    layers: list[Layer]
    fingerprint: str = "f00d"
    by_name: dict[str, Layer] = field(init=False)

    def __post_init__(self):
        self.by_name = {layer.name: layer for layer in self.layers}

    def __getitem__(self, name: str) -> Layer:
        return self.by_name[name]


def profile(**scores: list[float]) -> Profile:
    return Profile([Layer(name, values) for name, values in scores.items()])


def chosen(made) -> dict[str, list[int]]:
    return {name: units.tolist() for name, units in made.units.items()}


NAN = float("nan")
score = st.one_of(st.sampled_from([0.0, 0.5, 1.0]), st.floats(0, 10), st.just(NAN))
layer_scores = st.lists(st.lists(score, min_size=1, max_size=12), min_size=1, max_size=6)
shares = st.floats(0, 1, exclude_min=True)


def many(layers: list[list[float]]) -> Profile:
    return Profile([Layer(f"layer{i}", scores) for i, scores in enumerate(layers)])


def known(layer: Layer) -> list[int]:
    return [unit for unit, value in enumerate(layer.scores) if not math.isnan(value)]


@pytest.mark.parametrize("scope", ["global", "layer"])
@given(layers=layer_scores, ratio=shares, fraction=shares, seed=st.integers(0, 5))
def test_ratio_selects_an_exact_count_within_the_caps(scope, layers, ratio, fraction, seed):
    source = many(layers)
    eligible = {layer.name: len(known(layer)) for layer in source.layers}
    total = sum(eligible.values())
    wanted = math.floor(ratio * total)
    room = sum(math.floor(fraction * count) for count in eligible.values())
    assume(total)
    arguments = {
        "criterion": "dead", "ratio": ratio, "scope": scope, "max_layer_fraction": fraction,
        "seed": seed,
    }  # fmt: skip
    if wanted > room:
        with pytest.raises(InputError, match=f"{wanted} of {total} .* allows {room}:"):
            plan(source, **arguments)
        return
    made = plan(source, **arguments)
    assert made.count == wanted and made.eligible == total
    for name, units in made.units.items():
        assert 0 < len(units) <= math.floor(fraction * eligible[name])
        assert units.dtype == torch.int64 and units.tolist() == sorted(set(units.tolist()))
        assert set(units.tolist()) <= set(known(source[name]))
        assert made.scores[name].tolist() == [source[name].scores[unit] for unit in units]


@given(layers=layer_scores, ratio=shares)
def test_global_scope_takes_the_smallest_scores(layers, ratio):
    source = many(layers)
    assume(any(known(layer) for layer in source.layers))
    made = plan(source, criterion="dead", ratio=ratio, max_layer_fraction=1.0)
    everything = sorted(layer.scores[u] for layer in source.layers for u in known(layer))
    taken = sorted(value for scores in made.scores.values() for value in scores.tolist())
    assert taken == everything[: made.count]


@given(layers=layer_scores, ratio=shares)
def test_layer_scope_takes_the_smallest_scores_of_each_layer_in_proportion(layers, ratio):
    source = many(layers)
    assume(any(known(layer) for layer in source.layers))
    made = plan(source, criterion="dead", ratio=ratio, scope="layer", max_layer_fraction=1.0)
    for layer in source.layers:
        eligible = sorted(layer.scores[u] for u in known(layer))
        taken = sorted(made.scores.get(layer.name, torch.empty(0)).tolist())
        assert taken == eligible[: len(taken)]
        assert abs(len(taken) - ratio * len(eligible)) <= 1 + 1e-9


def test_a_layer_at_its_cap_passes_its_turn_on():
    # The quotas are 1.47, 1.47 and 29.4: one unit is left over, and the small layers are full.
    source = profile(a=[0.0] * 3, b=[0.0] * 3, c=[0.0] * 60)
    made = plan(source, criterion="dead", ratio=0.49, scope="layer")
    assert {name: len(units) for name, units in made.units.items()} == {"a": 1, "b": 1, "c": 30}


@given(
    layers=layer_scores,
    threshold=st.sampled_from([0.0, 0.25, 0.5, 1.0, 20.0]),
    fraction=shares,
)
def test_threshold_is_inclusive_and_capped(layers, threshold, fraction):
    source = many(layers)
    assume(any(known(layer) for layer in source.layers))
    made = plan(source, criterion="dead", threshold=threshold, max_layer_fraction=fraction)
    for layer in source.layers:
        passing = sorted(layer.scores[u] for u in known(layer) if layer.scores[u] <= threshold)
        cap = math.floor(fraction * len(known(layer)))
        taken = sorted(made.scores.get(layer.name, torch.empty(0)).tolist())
        assert taken == passing[:cap]
        capped = [note for note in made.notes if note.startswith(f"{layer.name}: ")]
        assert len(capped) == (len(passing) > cap)


@pytest.mark.parametrize("scope", ["global", "layer"])
@given(layers=layer_scores, seed=st.integers(0, 3), order=st.randoms(use_true_random=False))
def test_the_order_of_layers_does_not_matter(scope, layers, seed, order):
    source = many(layers)
    assume(any(known(layer) for layer in source.layers))
    shuffled = list(source.layers)
    order.shuffle(shuffled)
    arguments = {"criterion": "dead", "ratio": 0.3, "scope": scope, "max_layer_fraction": 1.0}
    one = plan(source, seed=seed, **arguments)
    two = plan(Profile(shuffled), seed=seed, **arguments)
    assert chosen(one) == chosen(two)


def test_ties_are_broken_by_the_seed_and_not_by_the_index():
    source = profile(a=[0.0] * 1000)
    picks = [chosen(plan(source, criterion="dead", ratio=0.1, seed=s))["a"] for s in range(3)]
    assert picks[0] != picks[1] != picks[2]
    assert picks[0] == chosen(plan(source, criterion="dead", ratio=0.1, seed=0))["a"]
    for pick in picks:
        # A uniform choice of 100 of 1000 has this mean to within 4 standard errors.
        assert abs(sum(pick) / len(pick) - 499.5) < 4 * 289 / 10


def test_ties_do_not_depend_on_which_other_layers_are_looked_at():
    source = profile(a=[0.0] * 40, b=[0.0] * 40, c=[1.0] * 40)
    both = plan(source, criterion="dead", threshold=0.5, max_layer_fraction=0.25)
    alone = plan(source, criterion="dead", threshold=0.5, max_layer_fraction=0.25, include=["b"])
    assert chosen(both)["b"] == chosen(alone)["b"] != chosen(both)["a"]


def test_units_that_are_not_hidden_or_not_known_are_not_eligible():
    source = Profile([Layer("a", [0.0, 0.0, NAN, 1.0], hidden=[True, False, True, True])])
    made = plan(source, criterion="dead", ratio=1.0, max_layer_fraction=1.0)
    assert chosen(made) == {"a": [0, 3]} and made.eligible == 2


def test_large_scores_are_candidates_where_the_criterion_says_so():
    source = Profile([Layer("a", [1.0] * 4, flat=[0.25, 1.0, 0.9, 0.96])])
    made = plan(source, criterion="saturated", threshold=0.95)
    assert chosen(made) == {"a": [1, 3]}
    assert made.scores["a"].tolist() == pytest.approx([1.0, 0.96])
    made = plan(source, criterion="saturated", threshold=0.95, max_layer_fraction=0.25)
    assert chosen(made) == {"a": [1]}
    made = plan(source, criterion="frozen", ratio=0.5)
    assert chosen(made) == {"a": [1, 3]}


def coupled_profile(**arguments) -> Profile:
    coupling = Coupling("member", torch.tensor([2, 1, -1, 0]))
    lead = Layer("lead", [5.0, 6.0, 7.0, 8.0], coupled=(coupling,), **arguments)
    member = Layer("member", [0.5, NAN, 9.0], hidden=[False] * 3, flat=[1.0, 0.0, 0.0])
    return Profile([lead, member])


def test_a_unit_is_as_healthy_as_its_weakest_row():
    made = plan(coupled_profile(), criterion="dead", ratio=0.5, max_layer_fraction=1.0)
    assert chosen(made) == {"lead": [0, 3]} and made.scores["lead"].tolist() == [5.0, 0.5]
    assert made.eligible == 4 and set(made.wiring) == {"lead", "member"}
    # Large candidates: the flattest row counts.
    made = plan(coupled_profile(flat=[0.0, 0.5, 0.25, 0.0]), criterion="frozen", threshold=1.0)
    assert chosen(made) == {"lead": [3]}


def test_random_does_not_prefer_units_with_many_rows():
    coupling = tuple(Coupling("member", torch.arange(1000)) for _ in range(8))
    lead = Layer("lead", [0.0] * 1000, coupled=coupling)
    source = Profile([lead, Layer("member", [0.0] * 1000, hidden=[False] * 1000)])
    alone = Profile([Layer("lead", [0.0] * 1000)])
    one = plan(source, criterion="random", ratio=0.3)
    assert chosen(one) == chosen(plan(alone, criterion="random", ratio=0.3))


def test_only_the_wiring_that_is_needed_is_in_the_plan():
    source = profile(a=[0.0, 1.0], b=[1.0, 2.0])
    assert set(plan(source, criterion="dead", ratio=0.25).wiring) == {"a"}


def test_include_and_exclude_choose_layers():
    source = profile(**{"stem": [0.0] * 4, "layer1.a": [0.0] * 4, "layer1.b": [0.0] * 4})
    made = plan(source, criterion="dead", ratio=0.5, include=["layer1.*"])
    assert set(chosen(made)) <= {"layer1.a", "layer1.b"} and made.eligible == 8
    made = plan(source, criterion="dead", ratio=0.5, include=["*"], exclude=["*.b", "stem"])
    assert set(chosen(made)) == {"layer1.a"} and made.eligible == 4
    # One string is one pattern, not a list of letters.
    assert set(chosen(plan(source, criterion="dead", ratio=0.5, include="stem"))) == {"stem"}


def test_excluding_a_layer_spares_its_coupled_rows_too():
    source = Profile([*coupled_profile().layers, Layer("other", [1.0, 2.0])])
    made = plan(source, criterion="dead", ratio=0.5, exclude=["member"])
    assert set(chosen(made)) == {"other"} and made.eligible == 2


def test_layers_without_gradient_are_flagged_and_left_out():
    layers = [
        Layer("a", [1.0] * 4, gradients=[0.0, 2.0, 4.0, 2.0]),
        Layer("b", [1.0] * 4),
        Layer("c", [1.0] * 4, hidden=[False] * 4),
    ]
    made = plan(Profile(layers), criterion="gradient", threshold=0.1)
    assert chosen(made) == {"a": [0]} and made.eligible == 4
    assert made.notes == (
        "4 hidden units have no gradient score and are left out (no gradient reaches them): b",
    )


def test_a_plan_without_units_says_so():
    made = plan(profile(a=[1.0, 2.0]), criterion="dead", threshold=0.0)
    assert made.count == 0 and made.units == {} and "no unit is selected" in made.notes


def test_what_was_asked_for_stands_in_the_plan():
    made = plan(profile(a=[0.0] * 8), criterion="dead", ratio=0.25, scope="layer", seed=3)
    assert (made.criterion, made.ratio, made.threshold, made.scope) == ("dead", 0.25, None, "layer")
    assert (made.seed, made.granularity, made.max_layer_fraction) == (3, "unit", 0.5)
    assert made.fingerprint == "f00d" and made.masks == {}


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({}, "neither of ratio and threshold given, expected exactly one: ratio says how many"),
        ({"ratio": 0.1, "threshold": 0.1}, "both of ratio and threshold given, expected exactly"),
        ({"ratio": 0.0}, "ratio 0.0 is out of range, expected more than 0 and at most 1"),
        ({"ratio": 1.5}, "ratio 1.5 is out of range, expected more than 0 and at most 1"),
        ({"ratio": NAN}, "ratio nan is out of range"),
        ({"ratio": "5%"}, "ratio '5%' is out of range"),
        ({"threshold": NAN}, "threshold nan is not usable, expected a finite number"),
        ({"threshold": math.inf}, "threshold inf is not usable"),
        ({"ratio": 0.1, "max_layer_fraction": 0}, "max_layer_fraction 0 is out of range"),
        (
            {"ratio": 0.1, "granularity": "layer"},
            "granularity 'layer' is unknown, expected 'unit' or 'weight'",
        ),
        ({"ratio": 0.1, "scope": "model"}, "scope 'model' is unknown, expected 'layer' or 'glo"),
        ({"ratio": 0.1, "seed": 0.5}, "seed 0.5 is not usable, expected an integer"),
        (
            {"ratio": 0.1, "criterion": "deed"},
            "criterion 'deed' is unknown for granularity 'unit', expected one of dead,",
        ),
        (
            {"ratio": 0.1, "include": ["layer.1"]},
            "include pattern 'layer.1' matches none of the 3 layers, expected a name or a pattern "
            "such as 'layer1.*'; near names: layer1, layer2",
        ),
        ({"ratio": 0.1, "exclude": ["x"]}, "exclude pattern 'x' matches none of the 3 layers"),
        (
            {"ratio": 0.9},
            "ratio 0.9 asks for 7 of 8 eligible units, but max_layer_fraction 0.5 allows 4: "
            "lower the ratio or raise max_layer_fraction",
        ),
        (
            {"ratio": 0.1, "include": ["stream"]},
            "none of the 1 chosen layers has a hidden unit, expected at least one: choose other",
        ),
        (
            {"ratio": 0.1, "criterion": "gradient"},
            "none of the 8 hidden units of the chosen layers has a gradient score (no gradient "
            "reaches them), expected at least one: take another criterion, or trained weights",
        ),
    ],
)
def test_bad_arguments_are_refused(arguments, text):
    layers = [Layer("layer1", [0.0] * 4), Layer("layer2", [0.0] * 4)]
    source = Profile([*layers, Layer("stream", [0.0] * 4, hidden=[False] * 4)])
    with pytest.raises(InputError) as caught:
        plan(source, **{"criterion": "dead", **arguments})
    assert text in str(caught.value) and "\n" not in str(caught.value)


def test_an_empty_profile_is_refused():
    with pytest.raises(InputError, match=r"^the profile has no layers, expected at least one: "):
        plan(Profile([]), ratio=0.1)
