import math

import pytest
import timm
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fastplastic.errors import InputError
from fastplastic.initial import INITIALIZERS, Target, make_initializer
from fastplastic.initial.laws import Law, constant, uniform
from fastplastic.kernels.reference.resample import resample_
from fastplastic.wiring import UnitLayer


def target(model: nn.Module, name: str, rows=(), kind="linear", unit_dim=0, bias=False) -> Target:
    """Return the weight (or bias) `name` of a model as something to draw."""
    tensor = model.get_parameter(name)
    owner = name.rpartition(".")[0]
    weight = f"{owner}.weight".lstrip(".") if bias else name
    units = tensor.shape[0 if bias else unit_dim]
    layer = UnitLayer(
        owner, kind, weight, name if bias else None, unit_dim, units, None,
        ((0, units, "relu"),), torch.ones(units, dtype=torch.bool),
    )  # fmt: skip
    return Target(name, tensor, layer, torch.tensor(rows, dtype=torch.int64))


def drawn_from(law: Law, *shape: int, name: str = "") -> torch.Tensor:
    values = torch.empty(shape)
    resample_([values], [name], [law])
    return values


def same_moments(one: torch.Tensor, two: torch.Tensor) -> bool:
    """Compare the first four moments, to six times the error of their difference."""
    one, two = one.double().flatten(), two.double().flatten()
    scale = max(one.std(), two.std())
    if scale == 0:
        return torch.equal(one.unique(), two.unique())
    for power in range(1, 5):
        a, b = (one / scale) ** power, (two / scale) ** power
        error = (a.var() / len(a) + b.var() / len(b)).sqrt()
        if (a.mean() - b.mean()).abs() > 6 * error:
            return False
    return True


FAMILIES = [
    "resnet18",
    "vit_tiny_patch16_224",
    "convnext_atto",
    "mobilenetv3_small_050",
    "efficientnet_b0",
    "tf_efficientnet_lite0",
    "swin_tiny_patch4_window7_224",
    "densenet121",
    "mixer_s32_224",
    "regnetx_002",
    "resnext50_32x4d",
]


@pytest.mark.parametrize("name", FAMILIES)
def test_default_is_the_law_of_a_fresh_timm_model(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10)
    default = make_initializer("default", model)
    compared = 0
    for key, parameter in model.named_parameters():
        if parameter.dim() < 2 or parameter.numel() < 500:
            continue
        rows = range(min(len(parameter), 1 + 20_000 // parameter[0].numel()))
        law = default(target(model, key, tuple(rows)))
        drawn = drawn_from(law, len(rows), *parameter.shape[1:], name=key)
        assert same_moments(drawn, parameter.detach()), (key, law)
        compared += 1
    assert compared > 15 and default.notes() == ()


def test_default_gives_biases_of_a_timm_model_too():
    model = timm.create_model("vit_tiny_patch16_224", num_classes=10)
    default = make_initializer("default", model)
    assert default(target(model, "blocks.0.mlp.fc1.bias", bias=True)) == constant(0.0)
    model = timm.create_model("mixer_s32_224")
    law = default = make_initializer("default", model)(
        target(model, "blocks.0.mlp_tokens.fc1.bias", bias=True)
    )
    fresh = torch.cat([b.mlp_tokens.fc1.bias.detach() for b in model.blocks])
    assert same_moments(drawn_from(law, 2000), fresh)


def test_default_finds_timm_models_inside_another_one():
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.student = timm.create_model("mobilenetv3_small_050", num_classes=0)
            self.backbone = timm.create_model("resnet18", num_classes=0)
            self.head = nn.Linear(512, 3)

    model = Wrapper()
    default = make_initializer("default", model)
    for name, fan_out in {"backbone.layer1.0.conv1": 64 * 9, "student.conv_stem": 16 * 9}.items():
        law = default(target(model, f"{name}.weight"))
        assert law.kind == "normal"
        assert (law.location, law.scale) == pytest.approx((0.0, math.sqrt(2 / fan_out)))
    bound = 1 / math.sqrt(512)
    assert default(target(model, "head.weight")) == uniform(-bound, bound)
    assert default.notes() == (
        "1 parameters are not in a fresh timm model: PyTorch's default law is used for them",
    )


def test_default_falls_back_where_the_shape_differs():
    model = timm.create_model("resnet18", in_chans=1)
    default = make_initializer("default", model)
    law = default(target(model, "conv1.weight"))
    assert law == uniform(-1 / 7, 1 / 7)
    assert "of another shape in a fresh timm model" in default.notes()[0]


@pytest.mark.parametrize("architecture", ["no_such_model", "hf-hub:someone/something"])
def test_default_falls_back_where_timm_cannot_build(architecture):
    model = timm.create_model("resnet18")
    model.pretrained_cfg = {"architecture": architecture}
    default = make_initializer("default", model)
    bound = 1 / math.sqrt(64 * 9)
    assert default(target(model, "layer1.0.conv1.weight")) == uniform(-bound, bound)
    assert default.notes() == (
        f"no fresh {architecture} could be made (InputError): PyTorch's default law is used",
    )


@pytest.mark.parametrize(
    ("module", "unit_dim", "kind"),
    [
        (nn.Linear(37, 500), 0, "linear"),
        (nn.Conv2d(12, 500, 3, groups=4), 0, "conv"),
        (nn.ConvTranspose2d(40, 30, 3), 1, "conv transpose"),
        (Conv1D(300, 70), 1, "conv1d"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_default_without_timm_is_what_reset_parameters_does(module, unit_dim, kind):
    model = nn.Sequential(module)
    for name, parameter in model.named_parameters():
        at = target(model, name, kind=kind, unit_dim=unit_dim, bias=name.endswith("bias"))
        law = make_initializer("default", model)(at)
        drawn = drawn_from(law, 1000, 20, name=name)
        assert same_moments(drawn, parameter.detach())
        assert parameter.abs().max() <= 2 * drawn.abs().max()


def test_default_of_an_attention_projection():
    model = nn.Sequential(nn.MultiheadAttention(64, 4))
    default = make_initializer("default", model)
    law = default(target(model, "0.in_proj_weight"))
    weight = model[0].in_proj_weight.detach()
    assert same_moments(drawn_from(law, 200, 64), weight)
    layer = target(model, "0.in_proj_weight").layer
    bias = Target("0.in_proj_bias", model[0].in_proj_bias, layer, torch.arange(3))
    object.__setattr__(layer, "bias", "0.in_proj_bias")
    assert default(bias) == constant(0.0)


def test_kaiming_uniform_uses_the_incoming_weights_of_one_unit():
    model = nn.Sequential(nn.Conv2d(12, 8, 3, groups=4), nn.ConvTranspose2d(40, 30, 3))
    kaiming = make_initializer("kaiming_uniform", model)
    bound = math.sqrt(6 / (3 * 9))
    assert kaiming(target(model, "0.weight")) == uniform(-bound, bound)
    bound = math.sqrt(6 / (40 * 9))
    assert kaiming(target(model, "1.weight", unit_dim=1)) == uniform(-bound, bound)
    assert kaiming(target(model, "0.bias", bias=True)) == constant(0.0)


@pytest.mark.parametrize("unit_dim", [0, 1])
def test_empirical_is_normal_like_the_live_rows(unit_dim):
    model = nn.Sequential(nn.Linear(40, 40))
    rows = [3, 5, 6]
    live = [row for row in range(40) if row not in rows]
    with torch.no_grad():
        model[0].weight.normal_(0.5, 2.0).index_fill_(unit_dim, torch.tensor(rows), 1e6)
    values = model[0].weight.detach().double().index_select(unit_dim, torch.tensor(live))
    at = target(model, "0.weight", rows, unit_dim=unit_dim)
    law = make_initializer("empirical", model)(at)
    assert law.kind == "normal"
    expected = values.mean().item(), values.std().item()
    assert (law.location, law.scale) == pytest.approx(expected, rel=1e-2)
    bias = make_initializer("empirical", model)(target(model, "0.bias", rows, bias=True))
    assert bias == constant(0.0)


def test_empirical_without_live_rows_is_the_default_law():
    model = nn.Sequential(nn.Linear(4, 3))
    empirical = make_initializer("empirical", model)
    assert empirical(target(model, "0.weight", (0, 1, 2))) == uniform(-0.5, 0.5)
    assert empirical.notes() == ("0.weight: nothing live to imitate, default law",)


def test_empirical_refuses_rows_that_are_not_finite():
    model = nn.Sequential(nn.Linear(4, 3))
    with torch.no_grad():
        model[0].weight[1, 1] = torch.nan
    empirical = make_initializer("empirical", model)
    with pytest.raises(
        InputError, match=r"^'0\.weight' has live weights that are not finite, expected"
    ):
        empirical(target(model, "0.weight", (0,)))
    assert empirical(target(model, "0.weight", (1,))).scale > 0


def test_an_unknown_initializer_is_refused():
    with pytest.raises(InputError) as caught:
        make_initializer("fresh", nn.Linear(1, 1))
    assert str(caught.value) == (
        "init 'fresh' is unknown, expected one of default, kaiming_uniform, kaiming_normal, "
        "xavier_uniform, trunc_normal, empirical"
    )
    assert set(INITIALIZERS) == {
        "default", "kaiming_uniform", "kaiming_normal", "xavier_uniform", "trunc_normal",
        "empirical",
    }  # fmt: skip


TORCH = {
    "kaiming_uniform": lambda w: nn.init.kaiming_uniform_(w, nonlinearity="relu"),
    "kaiming_normal": lambda w: nn.init.kaiming_normal_(w, nonlinearity="relu"),
    "xavier_uniform": nn.init.xavier_uniform_,
    "trunc_normal": lambda w: nn.init.trunc_normal_(w, std=0.02),
}


@pytest.mark.parametrize("name", TORCH)
@pytest.mark.parametrize(
    ("layer", "kind"),
    [
        (nn.Linear(120, 400), "linear"),
        (nn.Conv2d(60, 90, 3), "conv"),
        (nn.Conv2d(60, 90, 3, groups=3), "conv"),
    ],
    ids=["linear", "conv", "grouped conv"],
)
def test_laws_are_those_of_torch(name, layer, kind):
    torch.manual_seed(0)
    model = nn.Sequential(layer)
    initializer = make_initializer(name, model)
    law = initializer(target(model, "0.weight", kind=kind))
    expected = TORCH[name](torch.empty_like(layer.weight))
    assert same_moments(drawn_from(law, *layer.weight.shape), expected.detach())
    assert initializer(target(model, "0.bias", kind=kind, bias=True)) == constant(0.0)
    assert initializer.notes() == ()


def test_the_second_matrix_of_lora_begins_at_zero() -> None:
    class Pair(nn.Module):
        """As PEFT names them."""

        def __init__(self) -> None:
            super().__init__()
            self.lora_A = nn.ModuleDict({"default": nn.Linear(4, 2, bias=False)})
            self.lora_B = nn.ModuleDict({"default": nn.Linear(2, 4, bias=False)})

    model = Pair()
    default = make_initializer("default", model)
    laws = [
        default(Target(name, weight, None, mask=torch.ones_like(weight, dtype=torch.bool)))
        for name, weight in model.named_parameters()
        if "lora_B" in name
    ]
    assert laws == [constant(0.0)]
