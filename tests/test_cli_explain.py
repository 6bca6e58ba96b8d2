"""`fastplastic explain`: the wiring of a layer in words."""

import json

import torch
from helpers.program import refused
from torch import nn

from fastplastic.cli.explain import explanation
from fastplastic.cli.wiring_words import Neighbour, wiring_words
from fastplastic.graph import build_graph
from fastplastic.wiring import Consumer, Coupling, Norm, UnitGraph, UnitLayer


def explained(model, example, name):
    graph = build_graph(model.eval(), example)
    facts: dict[str, list[str]] = {}
    for label, text in explanation(graph[name], graph):
        facts.setdefault(label, []).append(text)
    return facts


def test_a_hidden_layer_and_a_stream(run):
    model = ("test_resnet", "--no-pretrained", "--img-size", "32")
    hidden = run("explain", *model, "layer2.0.conv1")
    assert hidden.code == 0 and hidden.error == ""
    words = " ".join(hidden.output.split())
    assert "norm layer2.0.bn1" in words
    assert "activation relu, measured at the output of layer2.0.bn1" in words
    assert "read by layer2.0.conv2 (all units)" in words
    assert "can be reset 48 of 48 units" in words and "not reset" not in words
    stream = json.loads(run("explain", *model, "layer2.0.conv2", "--json").output)
    assert stream["layer"] == "layer2.0.conv2"
    assert stream["not_reset"] == ["48 units: summed into a residual stream"]
    assert stream["reads"] == ["layer2.0.conv1 (all units)"]
    assert stream["read_by"] == ["48 units by no columns of their own"]
    head = json.loads(run("explain", *model, "fc", "--json").output)
    assert head["head"] == ["it makes the output of the network"]
    assert head["reads"] == ["no unit of its own: the input, a stream, or units that are mixed"]


def test_bad_input(run):
    refused(run("explain", "test_resnet", "--no-pretrained", "layer2"), 2, "no layer 'layer2'")
    refused(run("explain", "test_resnet"), 2, "Missing argument 'LAYER'")
    refused(run("explain", "no_such_model", "fc"), 2, "no_such_model")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = self.down(nn.functional.silu(self.gate(x)) * self.up(x))
        return self.head(torch.relu(x))


def test_gated_units_name_the_layer_that_they_go_with():
    lead, member = (explained(Net(), torch.randn(2, 4), name) for name in ("gate", "up"))
    both = {"gate": lead, "up": member}
    (first,) = [name for name, facts in both.items() if facts["can be reset"] == ["6 of 6 units"]]
    (second,) = set(both) - {first}
    assert both[first]["together with"] == [f"{second}: their rows make one unit"]
    assert both[second]["together with"] == [f"{first}: their rows make one unit"]
    assert both[second]["not reset"] == [f"6 units: re-initialised together with {first}"]
    assert both[first]["read by"] == ["down (all units)"]
    assert both[second]["read by"] == ["6 units by no columns of their own"]
    facts = explained(Net(), torch.randn(2, 4), "down")
    assert facts["reads"] == [f"{first} (all units)"]
    assert facts["activation"] == ["relu, measured at the output of down"]


def test_what_is_unknown_and_what_is_tied():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
            self.two.weight = self.one.weight

        def forward(self, x):
            h = self.one(x)
            return self.two(h * h.sigmoid())

    facts = explained(Odd(), torch.randn(2, 4), "one")
    assert facts["tied"] == ["the same weight is that of two"]
    assert facts["can be reset"] == ["0 of 4 units"]


def test_a_model_that_cannot_be_traced_says_so():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Linear(4, 4)

        def forward(self, x):
            return self.one(x) if float(x.sum()) > 0 else self.one(-x)

    assert "note" in explained(Branch(), torch.randn(2, 4), "one")


def a_layer(name, **more):
    return UnitLayer(
        name=name, kind="linear", weight=f"{name}.weight", bias=None, unit_dim=1, n_units=4,
        norm=None, activations=((0, 4, "relu"),), hidden=torch.tensor([True, False, False, False]),
        **more,
    )  # fmt: skip


LEAD = a_layer(
    "lead",
    coupled=(Coupling("alias", torch.tensor([0, 1, -1, -1])),),
    consumers=(Consumer("other", "other.weight", 1, 1, torch.tensor([0, 0, -1, 2])),),
    norms=(Norm("bn", torch.arange(4)),), reasons={"query": 2, "key": 1}, unknown={"odd": 3},
    without_grad=("lead.weight",), head=True, transformed=True,
)  # fmt: skip
MEMBER, READER = a_layer("member", tied=("alias",)), a_layer("reader", tied=("other",))
ALONE = a_layer("alone", coupled=(Coupling("member", torch.arange(4)),))
LAYERS = (LEAD, MEMBER, READER, ALONE)


def test_what_reads_what_is_found_under_every_name_of_a_layer():
    lead, member, reader, alone = (wiring_words(layer, LAYERS) for layer in LAYERS)
    assert lead.readers == (Neighbour("other", "2 of 4 units"),) and not lead.sources
    assert reader.sources == (Neighbour("lead", "2 of 4 units"),) and not reader.readers
    assert lead.together == (Neighbour("member"),) and not reader.together
    assert member.together == (Neighbour("lead"), Neighbour("alone"))
    assert lead.otherwise == "1 units by no columns of their own"
    assert alone.otherwise == "what reads the rows that they are made with"
    assert lead.reasons == ("2 units: query", "1 units: key")


def test_what_else_is_to_be_known():
    assert wiring_words(LEAD, LAYERS).remarks == (
        ("norm", "bn"), ("unknown", "activation function of 3 units: odd"),
        ("note", "its weight does not learn: lead.weight"),
        ("head", "it makes the output of the network"),
        ("note", "its weight is changed before it is used"),
    )  # fmt: skip
    assert wiring_words(READER, LAYERS).remarks == ()


def test_layers_are_found_by_every_name_and_those_left_out_say_why(run, monkeypatch):
    graph = UnitGraph(LAYERS, (("odd", "it was never called"),), "it was not traced")
    monkeypatch.setattr("fastplastic.cli.explain._graph", lambda options: graph)
    found = json.loads(run("explain", "m", "other", "--json").output)
    assert found == {
        "layer": "reader", "tied": ["the same weight is that of other"], "activation": ["relu"],
        "read_by": ["4 units by no columns of their own"], "reads": ["lead (2 of 4 units)"],
        "can_be_reset": ["1 of 4 units"], "note": ["it was not traced"],
    }  # fmt: skip
    first = run("explain", "m", "lead").output.splitlines()[0]
    assert first.split(maxsplit=1)[1].rstrip() == (
        "lead: linear with 4 units, one for each index of dimension 1 of lead.weight, without a "
        "bias"
    )
    assert run("explain", "m", "odd").output == "odd is not measured: it was never called\n"


def test_random_weights_do_as_well(run):
    """No hub is asked for weights that change nothing, and files are looked for before all else."""
    assert run("explain", "test_resnet", "--img-size", "32", "fc").error == ""
    refused(run("explain", "none", "fc", "--checkpoint", "a.pth"), 3, "--checkpoint a.pth: no such")
