"""Weights with requires_grad=False do not learn: they are planned only if they are named."""

import dataclasses
import json

import pytest
import torch
from helpers import Net
from torch import nn
from torch.nn.functional import cross_entropy

from fastplastic import Monitor, Profile, plan, profile
from fastplastic.errors import InputError
from fastplastic.files.wiring_json import decode_layers, encode_layer


def batches():
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(8, 5, generator=generator), torch.arange(8) % 3)]


def net():
    """Two hidden layers of 4 and 6 units, and a head."""
    torch.manual_seed(0)
    return Net(
        lambda own, x: own.head(torch.relu(own.second(torch.relu(own.first(x))))),
        first=nn.Linear(5, 4),
        second=nn.Linear(4, 6),
        head=nn.Linear(6, 3),
    )


def taken(chosen):
    return {name: len(units) for name, units in chosen.units.items()}


def everything(found, **more):
    return plan(found, criterion="random", ratio=1, max_layer_fraction=1, **more)


def test_units_made_or_read_by_weights_that_do_not_learn_are_left_out():
    model = net()
    model.second.weight.requires_grad_(False)
    with pytest.raises(
        InputError, match=r"no unit to choose from.*10 hidden units are made or read"
    ):
        everything(profile(model, batches()))
    model.second.weight.requires_grad_(True)
    model.first.weight.requires_grad_(False)
    chosen = everything(profile(model, batches()))
    assert taken(chosen) == {"second": 6} and chosen.eligible == 6
    assert [note for note in chosen.notes if "4 hidden units are made or read" in note]
    assert "first" in chosen.notes[0] and "requires_grad=False" in chosen.notes[0]


def test_a_reader_that_does_not_learn_keeps_its_units():
    model = net()
    model.head.weight.requires_grad_(False)
    assert taken(everything(profile(model, batches()))) == {"first": 4}


def test_biases_that_do_not_learn_do_not_matter():
    model = net()
    model.first.bias.requires_grad_(False)
    assert taken(everything(profile(model, batches()))) == {"first": 4, "second": 6}


def test_of_a_model_that_is_frozen_as_a_whole_nothing_is_known():
    chosen = everything(profile(net().requires_grad_(False), batches()))
    assert taken(chosen) == {"first": 4, "second": 6}


def test_a_full_name_takes_them_and_a_pattern_does_not():
    model = net()
    model.first.weight.requires_grad_(False)
    found = profile(model, batches())
    assert taken(everything(found, include=["first"])) == {"first": 4}
    assert taken(everything(found, include=["*"])) == {"second": 6}


def test_only_the_units_that_are_read_by_such_a_weight_are_left_out():
    model = Net(
        lambda own, x: (lambda h: own.one(h[:, :4]) + own.two(h[:, 4:]))(own.first(x).relu()),
        first=nn.Linear(5, 6),
        one=nn.Linear(4, 3),
        two=nn.Linear(2, 3),
    )
    model.two.weight.requires_grad_(False)
    chosen = everything(profile(model, batches()))
    assert chosen.units["first"].tolist() == [0, 1, 2, 3]


def test_rows_of_a_gated_unit_all_have_to_learn():
    model = Net(
        lambda own, x: own.down(torch.nn.functional.silu(own.gate(x)) * own.up(x)),
        gate=nn.Linear(5, 4),
        up=nn.Linear(5, 4),
        down=nn.Linear(4, 3),
    )
    assert sum(taken(everything(profile(model, batches()))).values()) == 4
    for layer in (model.gate, model.up):
        layer.weight.requires_grad_(False)
        with pytest.raises(InputError, match="4 hidden units are made or read by weights"):
            everything(profile(model, batches()))
        layer.weight.requires_grad_(True)


def test_a_monitor_tells_too():
    model = net()
    model.first.weight.requires_grad_(False)
    with Monitor(model, batches()[0][0]) as monitor:
        cross_entropy(model(batches()[0][0]), batches()[0][1]).backward()
    assert taken(everything(monitor.compute())) == {"second": 6}


def test_single_weights_that_do_not_learn_are_left_out():
    model = net()
    model.first.weight.requires_grad_(False)
    found = profile(model, batches(), gradients=True)
    options = {"granularity": "weight", "criterion": "magnitude", "ratio": 0.5}
    chosen = plan(found, **options)
    assert set(chosen.masks) == {"second.weight"}
    assert any("does not learn" in note and "first.weight" in note for note in chosen.notes)
    assert set(plan(found, include=["first"], **options).masks) == {"first.weight"}
    assert set(plan(found, include=["first.weight"], **options).masks) == {"first.weight"}


def test_a_profile_file_says_it_and_older_files_load(tmp_path):
    model = net()
    model.first.weight.requires_grad_(False)
    found = profile(model, batches())
    found.save(tmp_path / "profile.safetensors")
    again = Profile.load(tmp_path / "profile.safetensors")
    assert again["first"].wiring.without_grad == ("first.weight",)
    assert taken(everything(again)) == {"second": 6}
    values = json.loads(json.dumps([encode_layer(layer.wiring) for layer in found]))
    for value in values:
        del value["without_grad"]
    assert all(layer.without_grad == () for layer in decode_layers(values))


def test_the_second_name_of_a_tied_layer_names_it():
    found = profile(net(), batches())
    first = found["first"]
    wiring = dataclasses.replace(first.wiring, tied=("twin",))
    layers = (dataclasses.replace(first, wiring=wiring), *found.layers[1:])
    found = dataclasses.replace(found, layers=layers)
    assert taken(everything(found, include=["twin"])) == {"first": 4}
    assert taken(everything(found, exclude=["twin"])) == {"second": 6}
