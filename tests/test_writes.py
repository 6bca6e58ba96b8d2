"""What `reinit_` refuses before it writes anything."""

from dataclasses import replace

import pytest
import torch
from helpers import plan_of_units
from helpers.written import Case, consumer, identical, layer, mlp, norm, snapshot, swiglu
from torch import nn

from fastplastic.errors import FileError, FingerprintError, InputError
from fastplastic.model import fingerprint
from fastplastic.reinit import reinit_
from fastplastic.wiring import Coupling, Norm


def refused(made: Case, error: type[Exception], text: str, **arguments) -> None:
    before = snapshot(made.model)
    with pytest.raises(error) as caught:
        reinit_(made.model, made.plan, **arguments)
    assert text in str(caught.value) and "\n" not in str(caught.value)
    assert identical(before, snapshot(made.model))


def edited(made: Case, name: str = "0", **fields) -> Case:
    """Return the case with a layer of the plan's wiring changed, as by hand."""
    wiring = {**made.plan.wiring, name: replace(made.plan.wiring[name], **fields)}
    return replace(made, plan=replace(made.plan, wiring=wiring))


def with_units(made: Case, name: str, units: object) -> Case:
    index = torch.tensor(units)
    return replace(made, plan=replace(made.plan, units={**made.plan.units, name: index}))


def test_unknown_choices_are_refused():
    refused(mlp(), InputError, "outgoing 'half' is unknown, expected one of zero, small, fresh,",
            outgoing="half")  # fmt: skip
    refused(mlp(), InputError, "seed 0.5 is not usable, expected an integer", seed=0.5)
    refused(mlp(), InputError, "init 'ones' is unknown, expected one of default,", init="ones")
    made = mlp()
    request = replace(made.plan.request, granularity="layer")
    made = replace(made, plan=replace(made.plan, request=request))
    refused(made, InputError, "granularity 'layer' is unknown, expected 'unit' or 'weight'")


def test_a_plan_for_another_model_is_refused():
    made = replace(mlp(), model=nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 4)))
    refused(made, FingerprintError, "expected the same parameter names, shapes and dtypes: ")


@pytest.mark.parametrize(
    ("units", "text"),
    [
        ([1, 8], "units of '0' name 8, expected 0..7: correct the plan"),
        ([-1, 2], "units of '0' name -1, expected 0..7: correct the plan"),
        ([2, 2], "units of '0' are named twice, expected once"),
        ([0.5], "units of '0' are not a list of int64 indices"),
        ([[1]], "units of '0' are not a list of int64 indices"),
    ],
)
def test_bad_units_are_refused(units, text):
    refused(with_units(mlp(), "0", units), FileError, text)


def test_units_that_are_not_hidden_are_never_written():
    made = with_units(swiglu(), "up", [1])
    refused(made, FileError, "units of 'up' are not hidden, expected units that only consumers")
    made = edited(mlp(), hidden=torch.arange(8) != 4)
    refused(made, FileError, "units of '0' are not hidden")


def test_unknown_layers_are_refused():
    made = with_units(mlp(), "7", [1])
    refused(made, FileError, "layer '7' is not in the plan's wiring: plan again")
    made = edited(swiglu(), "gate", coupled=(Coupling("gone", torch.arange(8)),))
    refused(made, FileError, "layer 'gone' is not in the plan's wiring")


INT32 = torch.arange(8, dtype=torch.int32)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"weight": "9.weight"}, "the plan writes to '9.weight', which is no parameter or buffer"),
        ({"weight": "0.bias"}, "'0.bias' has shape (8,), expected 8 in dimension 0"),
        ({"bias": "2.bias"}, "'2.bias' has shape (3,), expected (8,)"),
        ({"unit_dim": 1}, "'0.weight' has shape (8, 5), expected 8 in dimension 1"),
        ({"unit_dim": 2}, "'0.weight' has shape (8, 5), expected 8 in dimension 2"),
        ({"n_units": 4}, "units of '0' name 4, expected 0..3"),
        ({"n_units": 9}, "units of '0' are not hidden"),
        ({"norms": (norm("9", 8),)}, "norm '9' is not in the model: plan again"),
        ({"norms": (norm("2", 8),)}, "'2.weight' has shape (3, 8), expected (8,)"),
        (
            {"norms": (Norm("2", torch.arange(9)),)},
            "channels of '2' name 8, expected -1..7: correct the plan",
        ),
        ({"coupled": (Coupling("0", torch.arange(3)),)}, "3 rows of '0' are coupled to '0', exp"),
        ({"coupled": (Coupling("0", torch.arange(8) + 6),)}, "rows of '0' name 10, expected 0..7"),
        ({"consumers": (consumer("9", torch.arange(8)),)}, "writes to '9.weight', which is no"),
        (
            {"consumers": (consumer("2", torch.arange(7)),)},
            "'2.weight' has shape (3, 8), expected 7 in dimension 1",
        ),
        (
            {"consumers": (consumer("2", torch.arange(8) + 1),)},
            "columns of '2.weight' name 8, expected -1..7",
        ),
        (
            {"consumers": (consumer("2", torch.arange(8), groups=3),)},
            "8 columns of '2.weight' do not form 3 groups",
        ),
        (
            {"consumers": (consumer("2", torch.arange(8).repeat(2), groups=2),)},
            "3 rows of '2.weight' do not form 2 groups",
        ),
        ({"consumers": (consumer("2", INT32),)}, "columns of '2.weight' are not a list of int64"),
    ],
)
def test_wiring_that_does_not_fit_is_refused(fields, text):
    refused(edited(mlp(), **fields), FileError, text)


def test_transformed_weights_are_refused():
    made = edited(mlp(), transformed=True)
    refused(made, InputError, "the weight of '0' is transformed before use")
    made = mlp()
    nn.utils.parametrizations.weight_norm(made.model[2])
    made = replace(made, plan=replace(made.plan, fingerprint=fingerprint(made.model)))
    refused(made, FileError, "'2.weight', which is no parameter or buffer of the model (computed")


@pytest.mark.parametrize("tie", ["same", "transposed"])
def test_shared_weights_are_refused(tie):
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 8))
    shared = model[3].weight
    model[2].weight = shared if tie == "same" else nn.Parameter(shared.data.t())
    first = layer(model, "0", consumers=(consumer("2", torch.arange(8)),))
    made = replace(mlp(), model=model, plan=plan_of_units(model, [first], {"0": [1]}))
    refused(made, InputError, "'2.weight' shares its values with '3.weight', expected a tensor of")


def test_models_without_values_are_refused():
    made = mlp()
    with pytest.raises(InputError, match=r"^'0\.weight' is on the meta device, expected real val"):
        reinit_(made.model.to("meta"), made.plan)
    lazy = nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.Linear(8, 3))
    with pytest.raises(InputError, match=r"^'0\.weight' is not built yet, expected a built model"):
        reinit_(lazy, made.plan)


def test_integer_weights_are_refused():
    made = mlp()
    weight = nn.Parameter(torch.ones(3, 8, dtype=torch.int8), requires_grad=False)
    made.model[2].weight = weight
    made = replace(made, plan=replace(made.plan, fingerprint=fingerprint(made.model)))
    refused(made, InputError, "'2.weight' has dtype torch.int8, expected a floating-point dtype")
