"""Conditions that make a check fail: how they are read, and what they say of profiles."""

import re
from dataclasses import replace

import pytest
from helpers.compared import a_layer, a_profile
from hypothesis import assume, given
from hypothesis import strategies as st

from fastplastic.comparison import METRICS, Gate, check_gates, parse_gates
from fastplastic.errors import InputError
from fastplastic.files import figures_of


@pytest.mark.parametrize(
    ("expression", "gate"),
    [
        ("dead>0.05", Gate("", "dead", ">", 0.05)),
        ("dead>5%", Gate("", "dead", ">", 0.05)),
        # In binary 0.7 / 100 is a little less.
        ("dead>0.7%", Gate("", "dead", ">", 0.007)),
        (" dormant >= .1 % ", Gate("", "dormant", ">=", 0.001)),
        ("frozen<=1", Gate("", "frozen", "<=", 1.0)),
        ("layer4.*:dormant>0.3", Gate("", "dormant", ">", 0.3, "layer4.*")),
        ("layer[!4].* : saturated<1e-3", Gate("", "saturated", "<", 0.001, "layer[!4].*")),
        ("a:b:dead>0", Gate("", "dead", ">", 0.0, "a:b")),
        ("change:dead>-0.02", Gate("", "dead", ">", -0.02, None, True)),
        ("change:*:dead>2%", Gate("", "dead", ">", 0.02, "*", True)),
        ("[c]hange:dead>2%", Gate("", "dead", ">", 0.02, "[c]hange")),
        ("mean_abs_gradient<1e-9", Gate("", "mean_abs_gradient", "<", 1e-9)),
        ("mean_abs_activation>250", Gate("", "mean_abs_activation", ">", 250.0)),
        ("change:mean_abs_activation<-3", Gate("", "mean_abs_activation", "<", -3.0, None, True)),
    ],
)
def test_gates_are_read(expression, gate):
    assert parse_gates([expression]) == (replace(gate, expression=expression),)


GRAMMAR = (
    "expected [change:][PATTERN:]METRIC>NUMBER, or >=, <, <=, with METRIC one of dead, frozen, "
    "dormant, saturated, mean_abs_activation, mean_abs_gradient, for example 'dead>0.05' or "
    "'layer4.*:dormant>30%'"
)


@pytest.mark.parametrize(
    ("expression", "why"),
    [
        ("", ""),
        ("dead", ""),
        ("dead=0.05", ""),
        ("dead==0.05", ""),
        ("dead>", ""),
        (">0.05", ""),
        ("layer4.*:>0.05", ""),
        ("dead>0.05>1", ""),
        ("0.05<dead", "no metric '0' among 6"),
        ("ded>0.05", "no metric 'ded' among 6: did you mean dead?; "),
        ("weight>1", "no metric 'weight' among 6, expected one such as dead, frozen, dormant; "),
        ("dead>5", "'5' is not a share in 0..1, as in 0.05 or 5%; "),
        ("dead>101%", "'101%' is not a share in 0..1, as in 0.05 or 5%; "),
        ("dead>-0.1", "'-0.1' is not a share in 0..1, as in 0.05 or 5%; "),
        ("dead>nan", "'nan' is not a share in 0..1, as in 0.05 or 5%; "),
        ("dead>0,05", "'0,05' is not a share in 0..1, as in 0.05 or 5%; "),
        ("dead>\u0665", "'\u0665' is not a share in 0..1, as in 0.05 or 5%; "),
        ("change:dead>-2", "'-2' is not a share in -1..1, as in 0.05 or 5%; "),
        ("mean_abs_gradient>5%", "'5%' is not a number from 0 on; "),
        ("mean_abs_gradient>-1", "'-1' is not a number from 0 on; "),
        ("mean_abs_gradient>1e999", "'1e999' is not a number from 0 on; "),
        ("change:mean_abs_gradient>inf", "'inf' is not a number; "),
    ],
)
def test_what_is_no_gate(expression, why):
    with pytest.raises(InputError) as caught:
        parse_gates(["dead>0.5", expression])
    text = str(caught.value)
    if expression == "0.05<dead":
        assert text == f"--fail-if '0.05<dead': {GRAMMAR}"
    else:
        assert text == f"--fail-if {expression!r}: {why}{GRAMMAR}"


def test_no_change_of_one_profile():
    with pytest.raises(InputError) as caught:
        parse_gates(["change:dead>0.1"], change=False)
    assert str(caught.value) == (
        "--fail-if 'change:dead>0.1': there is one profile only: use fastplastic compare"
    )


@given(st.text(max_size=30) | st.from_regex(r"(change:)?(\S+:)?\w+[<>]=?\S+%?", fullmatch=True))
def test_any_text_is_a_gate_or_refused(text):
    try:
        (gate,) = parse_gates([text])
    except InputError as error:
        assert str(error).startswith("--fail-if ") and "\n" not in str(error)
    else:
        assert gate.metric in METRICS and abs(gate.bound) < float("inf")


@given(
    st.booleans(),
    st.none() | st.from_regex(r"[a-z0-9_.*?\[\]!-]+", fullmatch=True),
    st.sampled_from(METRICS),
    st.sampled_from([">", ">=", "<", "<="]),
    st.floats(0, 1),
)
def test_every_gate_comes_back(change, pattern, metric, operator, bound):
    assume(re.fullmatch(r"[0-9.]+(e-[0-9]{1,2})?", repr(bound)))
    text = f"{'change:' * change}{f'{pattern}:' if pattern else ''}{metric}{operator}{bound!r}"
    assert parse_gates([text]) == (Gate(text, metric, operator, bound, pattern, change),)


BEFORE = figures_of(a_profile(a_layer("stem", 10), a_layer("a.conv", 20, dead=1, dormant=4)))
AFTER = figures_of(
    a_profile(
        a_layer("stem", 10, dead=1), a_layer("a.conv", 20, dead=3, dormant=2),
        a_layer("a.fc", 30, dead=6, saturated_fraction=0.9), a_layer("odd", 40, dead=None),
    )
)  # fmt: skip


def result(expression, *profiles):
    (found,) = check_gates(parse_gates([expression]), profiles or (BEFORE, AFTER))
    return found


@pytest.mark.parametrize(
    ("expression", "passed"),
    [
        ("dead>0.16", False),
        ("dead>0.1666", False),
        ("dead>=16.6%", False),
        ("dead<0.1", True),
        ("dead<0.17", False),
        ("frozen>=0", False),
        ("frozen>0", True),
        ("stem:dead>10%", True),
        ("stem:dead>=10%", False),
        ("stem:dead<10%", True),
        ("stem:dead<=10%", False),
        ("*:dead>0.2", True),
        ("*:dead>=0.2", False),
        ("a.*:saturated>0.8", False),
        ("a.c*:saturated>0.8", True),
        ("change:stem:dead>0.1", True),
        ("change:stem:dead>=0.1", False),
        ("change:a.conv:dormant<-0.05", False),
        ("change:a.conv:dormant<-0.1", True),
        ("change:a.conv:dead>10%", True),
        ("change:frozen>0", True),
        ("mean_abs_activation>0.2", False),
        ("mean_abs_activation>0.25", True),
    ],
)
def test_gates_pass_and_fail(expression, passed):
    assert result(expression).passed == passed


def test_a_gate_is_about_the_last_profile():
    assert result("dormant>0.1", AFTER, BEFORE).passed is False
    assert result("dormant>0.1", BEFORE, AFTER).passed is True


def test_what_a_gate_on_the_model_says():
    found = result("dead>0.1")
    assert found.values == ((None, 10 / 60),) and found.left_out == ("odd",)
    assert found.reason == "dead>0.1: dead is 16.67 % over all units"
    assert found.gap == "dead>0.1: dead is not known of 1 layer, left out: odd"
    assert found.to_dict() == {
        "expression": "dead>0.1", "passed": False,
        "values": [{"layer": None, "value": 10 / 60}], "left_out": ["odd"],
    }  # fmt: skip
    change = result("change:dormant>0.5")
    assert change.reason == "change:dormant>0.5: the change of dormant is -11.33 % over all units"
    assert change.gap == ""


def test_what_a_gate_on_layers_says():
    found = result("*:dead>=0.15")
    assert found.values == (("a.fc", 0.2), ("a.conv", 0.15), ("stem", 0.1))
    assert found.reason == "*:dead>=0.15: dead in 2 of 3 layers: a.fc 20 %, a.conv 15 %"
    assert found.left_out == ("odd",)
    below = result("*:dead<0.01")
    assert [name for name, _ in below.values] == ["stem", "a.conv", "a.fc"]
    assert below.reason == "*:dead<0.01: dead is 10 % at worst of 3 layers, in stem"
    change = result("change:*:dead>0.09")
    assert change.values == (("stem", 0.1), ("a.conv", 0.1))
    assert change.reason == (
        "change:*:dead>0.09: the change of dead in 2 of 2 layers: stem +10 %, a.conv +10 %"
    )


def test_of_many_layers_the_worst_are_named():
    many = figures_of(a_profile(*(a_layer(f"l{number}", 10, dead=number) for number in range(9))))
    assert result("*:dead>0.1", many).reason == (
        "*:dead>0.1: dead in 7 of 9 layers: l8 80 %, l7 70 %, l6 60 %, l5 50 %, l4 40 % and 2 more"
    )


@pytest.mark.parametrize(
    ("expression", "why"),
    [
        ("steem:dead>0", "no layer like 'steem' among 4: did you mean stem?"),
        ("b.*:dead>0", "no layer like 'b.*' among 4, expected one such as stem, a.conv, a.fc"),
        (
            "change:a.fc:dead>0",
            "no layer in both profiles like 'a.fc' among 2: did you mean a.conv?",
        ),
        (
            "odd:dead>0",
            "dead is not known of any layer that it is about (odd): take another metric or pattern",
        ),
    ],
)
def test_a_gate_that_is_about_nothing_is_an_error(expression, why):
    with pytest.raises(InputError) as caught:
        result(expression)
    assert str(caught.value) == f"--fail-if {expression!r}: {why}"


@pytest.mark.parametrize("expression", ["dead<1", "change:dead<1"])
def test_a_figure_that_is_not_known_at_all(expression):
    unknown = figures_of(a_profile(a_layer("a", dead=None), a_layer("b", dead=None)))
    for profiles in ((unknown, unknown), (BEFORE, unknown)):
        with pytest.raises(InputError, match=r"dead is not known of any layer .* \(a, b\): take"):
            result(expression, *profiles)


def test_a_column_of_the_report_names_its_metric():
    (gate,) = parse_gates(["conv*:sat>90%"])
    assert (gate.metric, gate.pattern, gate.bound) == ("saturated", "conv*", 0.9)
