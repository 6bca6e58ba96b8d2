"""Bad input to `plan`, `Plan.load` and `reinit_`: one line of ours, and the model stays as it was.

How each damaged value of a plan is refused: `test_plan_file` and `test_writes`.
"""

import copy
import json
import re
from dataclasses import replace

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fastplastic import FastPlasticError, Plan, plan, profile, reinit_

NAN = float("nan")


class Net(nn.Module):
    """A convolution, a norm, a depthwise filter, a gated layer and a stream."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.dw, self.pw = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 4, 1)
        self.gate, self.up, self.down = nn.Linear(64, 6), nn.Linear(64, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.dw(torch.relu(self.bn(self.conv(x)))))
        x = torch.relu(self.pw(x)).flatten(1)
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def data() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(6, 3, 4, 4, generator=generator), torch.arange(6) % 3)]


@pytest.fixture(scope="module")
def model() -> Net:
    return net()


@pytest.fixture(scope="module")
def found(model):
    return profile(model, data())


@pytest.fixture(scope="module")
def without_gradients():
    return profile(net().requires_grad_(False), data())


def unchanged(model: nn.Module, before: dict[str, Tensor]) -> bool:
    state = model.state_dict()
    return state.keys() == before.keys() and all(
        value.dtype == before[key].dtype
        and value.contiguous()
        .view(-1)
        .view(torch.uint8)
        .equal(before[key].contiguous().view(-1).view(torch.uint8))
        for key, value in state.items()
    )


def refused(model: nn.Module, call, *parts: str) -> None:
    """Call, and see one line with these parts in this order; the model is as before."""
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(FastPlasticError, match=".*".join(map(re.escape, parts))) as caught:
        call()
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    assert unchanged(model, before)


SHARE = ("expected more than 0 and at most 1", ": for 5 % give 0.05")
FINITE = ("expected a finite number", ": `fastplastic list criteria` shows those")


# Each time: the value, what was expected, the way out.
@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"ratio": 0}, ("ratio 0 is out of range", *SHARE)),
        ({"ratio": -0.0}, ("ratio -0.0 is out of range", *SHARE)),
        ({"ratio": 1.01}, ("ratio 1.01 is out of range", *SHARE)),
        ({"ratio": NAN}, ("ratio nan is out of range", *SHARE)),
        ({"ratio": 0.1, "max_layer_fraction": 2}, ("max_layer_fraction 2 is out of range", *SHARE)),
        ({"threshold": NAN}, ("threshold nan is not usable", *FINITE)),
        ({"threshold": -(10**310)}, ("threshold -1000", "000 is not usable", *FINITE)),
        (
            {"ratio": 1},
            ("ratio 1 asks for 18 of 18 eligible units", "max_layer_fraction 0.5 allows 9",
             ": lower the ratio or raise max_layer_fraction"),
        ),
        (
            {"ratio": 0.1, "include": ["layer*"]},
            ("include pattern 'layer*' matches none of the 6 layers",
             "expected a name or a pattern such as 'layer1.*'", "; near names: "),
        ),
        (
            {"ratio": 0.1, "include": ["down"]},
            ("none of the 1 chosen layers has a hidden unit", "expected at least one",
             ": choose other layers with include and exclude"),
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_planned(model, found, arguments, parts):
    refused(model, lambda: plan(found, **arguments), *parts)


def test_everything_at_once_can_be_asked_for(found):
    made = plan(found, ratio=1, max_layer_fraction=1.0)
    hidden = {layer.name: int(layer.hidden.sum()) for layer in found if layer.hidden.any()}
    assert {name: len(units) for name, units in made.units.items()} == hidden
    assert made.count == made.eligible == 18
    model = net()
    assert reinit_(model, made).count == 18
    # All outgoing weights are zero: the bias of the last layer is left.
    assert torch.equal(model(data()[0][0]), model.down.bias.expand(6, 3))


def test_an_empty_profile(model, found):
    parts = "the profile has no layers", "expected at least one", ": profile the model again"
    refused(model, lambda: plan(replace(found, layers=()), ratio=0.1), *parts)


@pytest.mark.parametrize("criterion", ["gradient", "activation_gradient", "first_order"])
def test_a_profile_without_gradients(model, without_gradients, criterion):
    to_h = criterion == "activation_gradient"
    why = "no gradient to their activation was seen" if to_h else "no gradient reaches them"
    refused(
        model, lambda: plan(without_gradients, criterion=criterion, ratio=0.1),
        f"none of the 18 hidden units of the chosen layers has a {criterion} score",
        f"({why}), expected at least one", ": take another criterion",
    )  # fmt: skip
    assert plan(without_gradients, criterion="dormant", ratio=0.5).count == 9


def other_shape() -> nn.Module:
    model = net()
    model.down = nn.Linear(6, 4)
    return model


def other_names() -> nn.Module:
    return nn.Sequential(net())


def other_dtype() -> nn.Module:
    return net().bfloat16()


def other_parametrisation() -> nn.Module:
    model = net()
    nn.utils.parametrizations.weight_norm(model.conv)
    return model


def other_architecture() -> nn.Module:
    return timm.create_model("test_vit")


@pytest.mark.parametrize(
    "build", [other_shape, other_names, other_dtype, other_parametrisation, other_architecture]
)
def test_a_plan_for_another_architecture(tmp_path, found, build):
    made = plan(found, ratio=0.3)
    made.save(tmp_path / "plan.json")
    other = build()
    for each in (made, Plan.load(tmp_path / "plan.json")):
        refused(
            other, lambda each=each: reinit_(other, each),
            f"the plan is for the model with fingerprint {found.fingerprint[:12]}, this one has ",
            "expected the same parameter names, shapes and dtypes", ": profile and plan this model",
        )  # fmt: skip


@pytest.fixture(scope="module")
def plan_text(tmp_path_factory, found) -> str:
    """A plan that takes units of each layer that has any."""
    path = tmp_path_factory.mktemp("plans") / "plan.json"
    made = plan(found, criterion="random", ratio=0.4, scope="layer")
    assert set(made.units) == {"conv", "pw", "gate"} and set(made.wiring) - set(made.units) == {
        "dw", "up",
    }  # fmt: skip
    made.save(path)
    return path.read_text(encoding="utf-8")


def edited(text: str, change) -> bytes:
    values = json.loads(text)
    change({entry["name"]: entry for entry in values["layers"]}, values)
    return json.dumps(values).encode()


def widen(layers, values):
    """Pretend that the layer has a unit more, and take that."""
    pw = next(layer for layer in values["wiring"] if layer["name"] == "pw")
    five = {"size": 5, "runs": [[0, 0, 5, 1]]}
    pw |= {"n_units": 5, "activations": [[0, 5, "relu"]], "hidden": five, "z_sites": []}
    layers["pw"] |= {"units": [4], "scores": [0.0]}


def redirect(layers, values):
    """Let the columns of another weight be written."""
    gate = next(layer for layer in values["wiring"] if layer["name"] == "gate")
    gate["consumers"][0] |= {"name": "pw", "weight": "pw.weight"}


# What a plan says of itself, and what only the model can tell.
@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (
            lambda layers, _: layers["conv"]["units"].__setitem__(0, 8),
            ("units of layer 'conv' is 8", "expected an integer in 0..7", ": correct the file or"),
        ),
        (
            lambda layers, _: layers["conv"]["units"].__setitem__(0, -1),
            ("units of layer 'conv' is -1", "expected an integer in 0..7", ": correct the file or"),
        ),
        (
            lambda layers, _: layers["gate"]["units"].__setitem__(0, layers["gate"]["units"][1]),
            ("units of layer 'gate' is ", "expected each unit once", ": correct the file or write"),
        ),
        (
            lambda layers, _: layers["conv"].update(name="cnv"),
            ("'name' is 'cnv'", "expected a layer of 'wiring'", ": correct the file or write the"),
        ),
        (
            lambda layers, _: layers["pw"].update(name="dw"),
            ("units of layer 'dw' is ", "expected units that can be re-init", ": correct the file"),
        ),
        (widen, ("'pw.weight' has shape (4, 8, 1, 1)", "expected 5 in dim", ": plan again with")),
        (redirect, ("'pw.weight' has shape (4, 8, 1, 1)", "expected 6 in", ": plan again with")),
    ],
    ids=["beyond", "negative", "twice", "unknown layer", "not hidden", "one more", "other columns"],
)  # fmt: skip
def test_a_plan_edited_by_hand(tmp_path, model, plan_text, change, parts):
    path = tmp_path / "plan.json"
    path.write_bytes(edited(plan_text, change))
    refused(model, lambda: reinit_(model, Plan.load(path)), *parts)


ODD = (-(10**30), 10**30, -1, 0.5, 1e308, True, None)
TEXTS = (
    "", "x" * 999, "conv", "dw", "bn", "linear", "conv.weight", "pw.weight", "down.weight",
    "down.bias",
)  # fmt: skip


def leaves(node: object, path: tuple = ()):
    """Yield the path to each value that is neither an object nor a list with anything in it."""
    keys = node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
    for key in keys:
        yield from leaves(node[key], (*path, key))
    if not keys:
        yield path


@st.composite
def damaged(draw, text: str) -> bytes:
    """Return the bytes of a plan: some changed, some cut off, or values replaced by others."""
    content = bytearray(text.encode())
    kind = draw(st.sampled_from(["cut", "bytes", "anything", "deep", *["values"] * 6]))
    if kind == "cut":
        return bytes(content[: draw(st.integers(0, len(content) - 3))])
    if kind == "anything":
        return draw(st.binary(max_size=200))
    if kind == "deep":
        return b'{"kind": "fastplastic plan", "layers": ' + b"[" * draw(st.integers(1, 10**5))
    if kind == "bytes":
        for _ in range(draw(st.integers(1, 3))):
            content[draw(st.integers(0, len(content) - 1))] = draw(st.integers(32, 255))
        return bytes(content)
    values = json.loads(text)
    for _ in range(draw(st.integers(1, 2))):
        *path, last = draw(st.sampled_from([x for x in leaves(values) if len(x) > 2]))
        node = values
        for key in path:
            node = node[key]
        node[last] = draw(another(node[last]))
    return json.dumps(values).encode()


def another(value: object) -> st.SearchStrategy:
    if isinstance(value, str):
        return st.sampled_from(TEXTS)
    near = (value + 1, value - 1, 2 * value) if isinstance(value, int | float) else ("conv",)
    return st.sampled_from((*near, not value, *ODD))


@settings(max_examples=200)
@given(source=st.data())
def test_any_damage_is_refused_in_one_line_or_does_what_the_plan_says(
    tmp_path_factory, plan_text, source
):
    """Nothing is written by halves, whatever stands in the file."""
    path = tmp_path_factory.getbasetemp() / "damaged.json"
    path.write_bytes(source.draw(damaged(plan_text)))
    model = net()
    before = copy.deepcopy(model.state_dict())
    try:
        made = Plan.load(path)
        report = reinit_(model, made, outgoing=source.draw(st.sampled_from(["zero", "fresh"])))
    except FastPlasticError as error:
        assert "\n" not in str(error) and len(str(error)) < 700
        assert unchanged(model, before)
    else:
        assert report.count == made.count
        written = {entry.name for entry in report.written}
        state = model.state_dict()
        assert all(torch.equal(state[key], before[key]) for key in state.keys() - written)
