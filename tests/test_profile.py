"""`profile`: what it measures, and that it changes nothing."""

import json
import math
from dataclasses import replace

import pytest
import timm
import torch
from helpers.profiled import data, net
from torch import nn
from torch.nn.functional import cross_entropy

from fastplastic import plan, profile, reinit_
from fastplastic.criteria import CRITERIA
from fastplastic.errors import InputError
from fastplastic.kernels.reference.activation_stats import activation_stats
from fastplastic.kernels.reference.gradient_stats import gradient_stats
from fastplastic.kernels.reference.parameter_stats import parameter_stats


def by_hand(model, batches):
    """The tables of `conv` and `fc`, from means over batches and a forward pass of our own."""
    tables, total = {}, {}
    for x, y in batches:
        z1 = model.bn(model.conv(x))
        h1 = z1.relu()
        z2 = model.fc(model.drop(h1.mean((2, 3))))
        h2 = nn.functional.gelu(z2)
        loss = cross_entropy(model.head(h2), y)
        weights = {name: model.get_submodule(name).weight for name in ("conv", "fc", "head")}
        g1, g2, *slopes = torch.autograd.grad(loss, [h1, h2, *weights.values()])
        for name, slope in zip(weights, slopes, strict=True):
            total[name] = total.get(name, 0) + slope / len(batches)
        for name, z, g, function in (("conv", z1, g1, "relu"), ("fc", z2, g2, "gelu")):
            new = torch.cat([activation_stats(z, 1, function), gradient_stats(g, 1)])
            tables[name] = merged(tables[name], new) if name in tables else new
    for name, reader in (("conv", "fc"), ("fc", "head")):
        rows, _ = parameter_stats([weights[name]], [total[name]])
        _, columns = parameter_stats([weights[reader]], [total[reader]])
        tables[name] = torch.cat([tables[name], rows, columns])
    return tables


def merged(one, two):
    total = one + two
    total[4], total[5] = torch.minimum(one[4], two[4]), torch.maximum(one[5], two[5])
    return total


@pytest.mark.parametrize("training", [True, False])
def test_statistics(training):
    model = net(training)
    torch.manual_seed(7)
    found = profile(model, data(3))
    torch.manual_seed(7)
    for name, table in by_hand(model, data(3)).items():
        torch.testing.assert_close(found[name].stats.table, table, rtol=1e-5, atol=1e-6)
    assert found.mode == ("train" if training else "eval")
    assert (found.samples, found.batches, found.seed) == (15, 3, 7)
    assert (found.device, found.dtype, found.backend) == ("cpu", "float32", "numba")
    assert (found.coverage.found, found.coverage.measured, found.coverage.skipped) == (3, 3, ())
    assert [layer.name for layer in found.layers] == ["conv", "fc", "head"]
    assert found["conv"].activation == "relu"
    assert found["fc"].hidden.all()
    assert not found["head"].hidden.any()
    assert found["fc"].reason is None
    assert found["head"].reason.endswith("(4)")


def test_same_seed_same_bits():
    model = net(training=True)
    tables = []
    for _ in range(2):
        torch.manual_seed(3)
        tables.append(torch.cat([x.stats.table for x in profile(model, data()).layers], 1))
    assert torch.equal(*tables)


def test_mean_gradients_are_kept_on_demand():
    model = net()
    found = profile(model, iter(data(3)), gradients=True).gradients
    assert found.keys() == dict(model.named_parameters()).keys()
    for x, y in data(3):
        (cross_entropy(model(x), y) / 3).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad)
    assert profile(model, data()).gradients is None


def test_half_precision_gradients_add_up_in_float32():
    """1 + 1/512, 300 times: in bfloat16 the sum would stop growing at 256."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False)).bfloat16()
    batch = (torch.ones(1, 1).bfloat16(), torch.zeros(1))
    found = profile(
        model, [batch] * 300, loss_fn=lambda output, _: output.sum(), gradients=True
    ).gradients  # fmt: skip
    assert found["0.weight"].dtype == torch.float32
    assert found["0.weight"].item() == 1


def test_generator_is_read_once_and_completely():
    seen = []

    def batches():
        for number, batch in enumerate(data(4)):
            seen.append(number)
            yield batch

    done = []
    assert profile(net(), batches(), progress=done.append).batches == 4
    assert seen == [0, 1, 2, 3]
    assert done == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (nn.Identity(), "the model has no parameters, expected weight layers: nothing to profile"),
        (nn.Sequential(nn.BatchNorm2d(3), nn.Flatten()).eval(), "no linear or convolution layer"),
    ],
)
def test_nothing_to_measure_is_an_error(model, text):
    with pytest.raises(InputError, match=text):
        profile(model, data(), loss_fn=lambda output, _: output.sum())


def test_batch_with_a_loss_that_is_not_finite():
    model = net()
    good, bad = data(2)
    bad = (bad[0].index_fill(0, torch.tensor([1]), math.nan), bad[1])
    found = profile(model, [good, bad], gradients=True)
    alone = profile(model, [good], gradients=True)
    assert "the loss of 1 of 2 batches is not finite: no gradients of them" in found.notes
    for name, gradient in found.gradients.items():
        torch.testing.assert_close(gradient, alone.gradients[name])
    # What was finite in its activations counts, the rest is counted.
    stats = found["conv"].stats
    assert stats["n_nonfinite_h"].tolist() == [36] * 8
    assert stats["n"].tolist() == [9 * 36] * 8
    assert any(
        "activations are NaN or infinite and left out, in 3 layers" in n for n in found.notes
    )
    assert stats.table.isfinite().all()


def test_nan_in_one_unit_stays_there():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    model[0].weight.data[1] = math.nan
    model[2].weight.data[:, 1] = 0
    found = profile(model, [(torch.randn(6, 3), torch.zeros(6).long())])
    assert found["0"].stats["n_nonfinite_h"].tolist() == [0, 6, 0, 0]
    assert found["0"].stats["n"].tolist() == [6, 0, 6, 6]
    scores = found.score("dormant")["0"]
    assert scores.isnan().tolist() == [False, True, False, False]
    assert found["0"].to_dict()["mean_abs_activation"] > 0


def test_layer_of_nothing_but_nan_is_measured_and_neither_dead_nor_frozen():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    found = profile(model, [(torch.full((6, 3), math.nan), torch.zeros(6).long())])
    assert found.coverage.measured == 2
    assert found["0"].stats["n_nonfinite_h"].tolist() == [6] * 4
    assert not (found["0"].dead | found["0"].frozen | found["0"].dormant).any()
    assert found["0"].to_dict()["saturated_fraction"] is None


def test_frozen_model_has_no_gradients():
    model = net().requires_grad_(False)
    found = profile(model, data())
    assert found["fc"].stats["n"].tolist() == [10] * 6
    assert all(layer.no_gradient for layer in found.layers)
    text = "the loss depends on no parameter with requires_grad: there are no gradients"
    assert text in found.notes


def test_profile_under_no_grad_still_has_gradients():
    with torch.no_grad():
        assert not profile(net(), data())["fc"].no_gradient


def test_layers_behind_a_norm_that_starts_at_zero_are_flagged():
    model = timm.create_model("test_resnet", num_classes=4).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
    nn.init.zeros_(model.layer1[0].bn2.weight)
    x = torch.randn(2, 3, 32, 32)
    found = profile(model, [(x, torch.tensor([0, 1]))])
    cut = [layer.name for layer in found.layers if layer.no_gradient]
    assert cut == ["layer1.0.conv1", "layer1.0.conv2"]
    assert found.score("gradient")["layer1.0.conv2"].isnan().all()
    assert not found.score("gradient")["layer2.0.conv1"].isnan().any()
    assert any("no gradient reached 2 layers (layer1.0.conv1, " in note for note in found.notes)


def test_planted_dead_units_of_a_resnet_are_found_and_no_others():
    torch.manual_seed(0)
    # In train mode each norm centres its channels: random weights alone leave no unit dead.
    model = timm.create_model("resnet18", num_classes=4, zero_init_last=False).train()
    with torch.no_grad():
        model.layer1[0].bn1.weight[[1, 5, 20, 21, 63]] = 0
        model.layer1[0].bn1.bias[[1, 5, 20, 21, 63]] = -1
    x = torch.randn(6, 3, 96, 96)
    found = profile(model, [(x, torch.arange(6) % 4)])
    dead = {x.name: torch.nonzero(x.dead).flatten().tolist() for x in found.layers}
    assert dead.pop("layer1.0.conv1") == [1, 5, 20, 21, 63]
    assert not any(dead.values())
    assert torch.equal(found["layer1.0.conv1"].dead, found["layer1.0.conv1"].frozen)
    assert found["layer1.0.conv1"].dormant_score[[1, 5, 20, 21, 63]].tolist() == [0] * 5
    assert (found.coverage.found, found.coverage.measured) == (21, 21)


def test_planted_frozen_units_of_a_vit_are_found_and_no_others():
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=4, img_size=64, depth=3).eval()
    with torch.no_grad():
        model.blocks[2].mlp.fc1.weight[:7] = 0
        model.blocks[2].mlp.fc1.bias[:7] = -30
    found = profile(model, [(torch.randn(3, 3, 64, 64), torch.arange(3))])
    frozen = {x.name: torch.nonzero(x.frozen).flatten().tolist() for x in found.layers}
    assert frozen.pop("blocks.2.mlp.fc1") == list(range(7))
    assert not any(frozen.values())
    # 768 units, not 17 tokens; every one seen at 17 tokens of 3 images.
    assert found["blocks.2.mlp.fc1"].n_units == 768
    assert found["blocks.2.mlp.fc1"].stats["n"].tolist() == [51] * 768
    assert found.totals.frozen == 7


def test_dead_needs_two_positions():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    batch = (torch.randn(1, 3), torch.zeros(1).long())
    assert not profile(model, [batch])["0"].dead.any()
    assert profile(model, [batch] * 2)["0"].dead.all()


def test_layer_numbers():
    model = net()
    with torch.no_grad():
        model.bn.weight[2] = 0
        model.bn.bias[2] = -1
    found = profile(model, data())
    layer = found["conv"]
    stats = layer.stats
    mean = stats["sum_abs_h"] / stats["n"]
    torch.testing.assert_close(layer.dormant_score, mean / (mean.mean() + 1e-9))
    torch.testing.assert_close(layer.saturated_fraction, stats["n_flat"] / stats["n"])
    assert layer.dead.tolist() == [unit == 2 for unit in range(8)] == layer.frozen.tolist()
    assert layer.dormant.tolist() == (layer.dormant_score <= 0.025).tolist()
    assert (layer.kind, layer.n_units) == ("conv", 8)
    assert [consumer.name for consumer in layer.consumers] == ["fc"]
    assert found["fc"].dead.dtype == torch.bool
    assert set(found.score("gradient")) == {"conv", "fc", "head"}
    assert torch.equal(found.score("random")["fc"], found.score("random", seed=0)["fc"])
    assert not torch.equal(found.score("random")["fc"], found.score("random", seed=1)["fc"])


def test_json_schema():
    found = profile(net(), data())
    value = found.to_dict(model="net", weights="random", data="noise")
    assert list(value) == [
        "schema_version", "fastplastic_version", "model", "weights", "data", "device", "dtype",
        "mode", "samples", "seed", "coverage", "notes", "totals", "layers",
    ]  # fmt: skip
    assert list(value["coverage"]) == ["found", "measured", "skipped"]
    assert list(value["totals"]) == [
        "layers", "units", "hidden_units", "dead", "frozen", "dormant",
    ]  # fmt: skip
    assert list(value["layers"][0]) == [
        "name", "kind", "activation", "units", "hidden", "dead", "frozen", "dormant",
        "saturated_fraction", "mean_abs_activation", "mean_abs_gradient",
    ]  # fmt: skip
    assert value["schema_version"] == 1
    assert (value["model"], value["weights"], value["data"]) == ("net", "random", "noise")
    assert value["totals"] | {"dead": 0, "frozen": 0, "dormant": 0} == {
        "layers": 3, "units": 18, "hidden_units": 14, "dead": 0, "frozen": 0, "dormant": 0,
    }  # fmt: skip
    assert json.loads(json.dumps(value, allow_nan=False)) == value
    stats = found["conv"].stats
    mean = (stats["sum_abs_h"].sum() / stats["n"].sum()).item()
    assert value["layers"][0]["mean_abs_activation"] == mean


def test_json_of_what_is_unknown_is_null():
    found = profile(net().requires_grad_(False), data())
    layer = found.to_dict()["layers"][0]
    assert layer["mean_abs_gradient"] is None
    skipped = replace(found, coverage=replace(found.coverage, skipped=(("x", "why"),)))
    assert skipped.to_dict()["coverage"]["skipped"] == [{"name": "x", "reason": "why"}]
    json.dumps(skipped.to_dict(), allow_nan=False)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda p: p["cnv"], "no layer 'cnv' among 3: did you mean conv"),
        (lambda p: p["zzz"], "no layer 'zzz' among 3, expected one such as conv, fc"),
        (lambda p: p.score("dormnt"), f"no criterion 'dormnt' among {len(CRITERIA)}: did"),
    ],
)  # fmt: skip
def test_unknown_names(call, text):
    with pytest.raises(InputError) as error:
        call(profile(net(), data(1)))
    assert text in str(error.value)


def test_results_print_in_a_line():
    found = profile(net(), data(1))
    assert [layer.name for layer in found] == [layer.name for layer in found.layers]
    assert len(found) == 3
    totals, layer = found.totals, found["fc"]
    assert repr(found) == (
        f"Profile(3 layers, {totals.units} units: {totals.hidden_units} hidden, "
        f"{totals.dead} dead, {totals.frozen} frozen, {totals.dormant} dormant; "
        f"{found.samples} samples, eval)"
    )
    start = f"LayerProfile('fc': linear, {layer.activation}, {layer.n_units} units, "
    assert repr(layer).startswith(start) and "\n" not in repr(layer)
    chosen = plan(found, criterion="random", ratio=0.25)
    expected = f"Plan(random, ratio 0.25: {chosen.count} of {chosen.eligible} units in "
    assert repr(chosen).startswith(expected)
    report = repr(reinit_(net(), chosen))
    assert report.startswith(f"ReinitReport({chosen.count} units in ") and len(report) < 200


def test_forward_only_measures_the_same_activations():
    model, batches = net().eval(), data()
    whole, forward = profile(model, batches), profile(model, batches, backward=False)
    for layer in whole:
        rows = ("n", "sum_h", "sum_abs_h", "sum_sq_h", "min_h", "max_h", "n_flat")
        for row in rows:
            assert torch.equal(layer.stats[row], forward[layer.name].stats[row]), row
    assert forward.notes == ("measured forward only: gradient scores are unknown",)
    assert forward.score("gradient")["conv"].isnan().all()
    assert torch.equal(forward.score("dormant")["conv"], whole.score("dormant")["conv"])
    one, other = (plan(x, criterion="dormant", ratio=0.2) for x in (whole, forward))
    assert all(torch.equal(one.units[name], other.units[name]) for name in one.units)
    with pytest.raises(InputError, match="gradients=True without backward"):
        profile(model, batches, backward=False, gradients=True)


def test_forward_only_needs_no_loss():
    model = net().eval()
    labels = [(x, None) for x, _ in data()]
    assert profile(model, labels, backward=False).totals.units > 0
