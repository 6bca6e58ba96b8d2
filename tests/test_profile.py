"""`profile`: what it measures, and that it changes nothing."""

import json
import math
import random
from dataclasses import fields, is_dataclass, replace
from typing import NamedTuple

import numpy
import pytest
import safetensors.torch
import timm
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy

from fastplastic import LayerProfile, Profile, plan, profile, reinit_
from fastplastic.criteria import CRITERIA
from fastplastic.errors import FileError, InputError
from fastplastic.kernels.reference.activation_stats import activation_stats
from fastplastic.kernels.reference.gradient_stats import gradient_stats
from fastplastic.kernels.reference.parameter_stats import parameter_stats
from fastplastic.model.weights import Weights
from fastplastic.stats import STATISTICS


class Net(nn.Module):
    """Convolution, norm, in-place activation function, dropout; a buffer that is replaced."""

    def __init__(self, classes=4):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.bn = nn.BatchNorm2d(8)
        self.act = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.3)
        self.fc = nn.Linear(8, 6)
        self.head = nn.Linear(6, classes)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def forward(self, x):
        self.calls = self.calls + 1
        self.scratch += 1
        h = self.drop(self.act(self.bn(self.conv(x))).mean((2, 3)))
        return self.head(torch.nn.functional.gelu(self.fc(h)))


def net(training=False, **options):
    torch.manual_seed(0)
    model = Net(**options).train(training)
    model.bn.running_mean.normal_()
    return model


def data(batches=2, size=5, classes=4):
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(size, 3, 8, 8, generator=generator),
            torch.randint(0, classes, (size,), generator=generator),
        )
        for _ in range(batches)
    ]


def state(model):
    """Everything that must be the same afterwards; tensors by value and by identity."""
    values = {}
    for name, module in model.named_modules():
        values[name, "training"] = module.training
        values[name, "attributes"] = list(vars(module))
        values[name, "sizes"] = [
            len(v) if isinstance(v, dict) else 0 for v in vars(module).values()
        ]
        for key, buffer in module._buffers.items():
            values[name, "buffer", key] = (id(buffer), buffer.numpy().tobytes())
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        values[name] = (id(parameter), parameter.detach().numpy().tobytes())
        values[name, "grad"] = (
            None if gradient is None else (id(gradient), gradient.numpy().tobytes())
        )
        values[name, "wants"] = parameter.requires_grad
        values[name, "hooks"] = (
            len(parameter._backward_hooks or {}),
            len(parameter._post_accumulate_grad_hooks or {}),
        )
    return values


def generators():
    kind, keys, *rest = numpy.random.get_state()
    return torch.get_rng_state().tolist(), random.getstate(), (kind, keys.tolist(), rest)


def lively(training):
    """A model with all there is to spoil: gradients, hooks, mixed modes, a frozen parameter."""
    model = net(training)
    cross_entropy(model(data()[0][0]), data()[0][1]).backward()
    model.head.bias.grad = None
    model.fc.bias.requires_grad_(False)
    model.drop.train(not training)
    model.conv.register_forward_hook(lambda *_: None)
    model.fc.weight.register_hook(lambda gradient: None)
    return model


def noisy(batches):
    """Draw from every generator, as loaders do."""
    for batch in batches:
        torch.rand(1), random.random(), numpy.random.rand()
        yield batch


class Stop(BaseException):
    pass


def stop(*_):
    raise Stop


def interrupt(*_):
    raise KeyboardInterrupt


def broken(batches):
    yield batches[0]
    raise Stop


def fail_in_backward(output, targets):
    output.register_hook(stop)
    return cross_entropy(output, targets)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({}, None),
        ({"gradients": True}, None),
        ({"ranks": True}, None),
        ({"loss_fn": stop}, Stop),
        ({"loss_fn": interrupt}, KeyboardInterrupt),
        ({"loss_fn": fail_in_backward}, Stop),
        ({"progress": interrupt}, KeyboardInterrupt),
        ({"batches": broken(data())}, Stop),
        ({"batches": [(torch.ones(2, 5, 8, 8), torch.ones(2))]}, RuntimeError),
        ({"batches": [data()[0], "x"]}, InputError),
    ],
)
def test_everything_is_as_before(training, options, error):
    model = lively(training)
    if "batches" in options and not isinstance(options["batches"], list):
        options = {"batches": broken(data())}
    batches = options.get("batches", noisy(data()))
    rest = {key: value for key, value in options.items() if key != "batches"}
    before, draws = state(model), generators()
    if error is None:
        profile(model, batches, **rest)
    else:
        with pytest.raises(error):
            profile(model, batches, **rest)
    assert state(model) == before
    assert generators() == draws


def test_an_optimizer_that_steps_during_backward_does_not():
    model = net()
    steps = []
    model.fc.weight.register_post_accumulate_grad_hook(lambda p: steps.append(p.data.zero_()))
    before = state(model)
    profile(model, data())
    assert not steps
    assert state(model) == before
    cross_entropy(model(data()[0][0]), data()[0][1]).backward()
    assert len(steps) == 1


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


def two_inputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 4)
            self.head = nn.Linear(4, 2)

        def forward(self, left, right):
            return self.head((self.fc(left) + right).relu())

    torch.manual_seed(0)
    return Two()


@pytest.mark.parametrize(
    "kind", [tuple, list, lambda pair: dict(zip(["left", "right"], pair, strict=True))]
)
def test_several_inputs(kind):
    inputs = kind((torch.randn(6, 3), torch.randn(6, 4)))
    found = profile(two_inputs(), [(inputs, torch.tensor([0, 1] * 3))])
    assert found.samples == 6
    assert found["head"].stats["n"].tolist() == [6, 6]


def test_example_inputs_are_traced_instead():
    class Picky(Net):
        def forward(self, x):
            assert len(x) != 2
            return super().forward(x)

    model = Picky().eval()
    assert not profile(model, data())["fc"].hidden.any()
    assert profile(model, data(), example_inputs=torch.ones(3, 3, 8, 8))["fc"].hidden.all()


def bert(**options):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=12, num_labels=3, **options,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config).eval()


def tokens(labels=True):
    batch = {
        "input_ids": torch.arange(40).reshape(4, 10),
        "attention_mask": (torch.arange(10) < torch.tensor([[10], [7], [3], [1]])).long(),
    }
    return batch | ({"labels": torch.tensor([0, 1, 2, 0])} if labels else {})


def test_hugging_face_mapping_uses_the_models_loss():
    model = bert()
    with torch.no_grad():
        dense = model.bert.encoder.layer[1].intermediate.dense
        dense.weight[4:7] = 0
        dense.bias[4:7] = -30
    found = profile(model, [tokens()] * 2, gradients=True)
    name = "bert.encoder.layer.1.intermediate.dense"
    assert torch.nonzero(found[name].frozen).flatten().tolist() == [4, 5, 6]
    # Padding is left out: 10 + 7 + 3 + 1 tokens in each batch.
    assert found[name].stats["n"].tolist() == [42] * 24
    assert "padding was left out by the attention mask" in found.notes
    model(**tokens()).loss.backward()
    torch.testing.assert_close(found.gradients["classifier.weight"], model.classifier.weight.grad)
    assert found.samples == 8


def test_mapping_with_a_loss_of_the_users():
    model = bert()
    seen = []

    def loss_fn(output, labels):
        seen.append((output.logits.shape, labels.tolist()))
        return cross_entropy(output.logits, labels)

    profile(model, [tokens()], loss_fn=loss_fn)
    assert seen == [((4, 3), [0, 1, 2, 0])]


def test_mapping_for_a_model_that_takes_no_labels():
    batch = {"left": torch.randn(6, 3), "right": torch.randn(6, 4), "labels": torch.ones(6).long()}
    found = profile(two_inputs(), [batch])
    assert found["fc"].stats["sum_abs_dw"].sum() > 0
    assert set(batch) == {"left", "right", "labels"}


def test_auxiliary_outputs_and_logits():
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net()

        def forward(self, x):
            return self.net(x), "auxiliary"

    assert profile(Wrapped(), data()).batches == 2


@pytest.mark.parametrize(
    ("batches", "text"),
    [
        ([], "there are no batches, expected at least one: check the data"),
        (iter(()), "there are no batches"),
        ([torch.ones(2, 3, 8, 8)], "batch 0 is a Tensor, expected (inputs, targets) or a"),
        ([(torch.ones(2, 3, 8, 8),)], "batch 0 is a tuple of 1, expected (inputs, targets)"),
        ([data()[0], (1, 2, 3)], "batch 1 is a tuple of 3, expected (inputs, targets)"),
        ([{"x": torch.ones(2, 3, 8, 8)}], "the batch has x but no 'labels', and the model's"),
        (data(classes=9), "a target is class 8, expected 0..3, the outputs of the model"),
        ([(torch.ones(2, 3, 8, 8), "ab")], "outputs and targets are Tensor and str, expected"),
    ],
)  # fmt: skip
def test_bad_batches(batches, text):
    with pytest.raises(InputError) as error:
        profile(net(), batches)
    assert text in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("loss_fn", "text"),
    [
        (
            lambda output, y: cross_entropy(output, y, reduction="none"),
            r"the loss is \(5,\), expec",
        ),
        (lambda *_: 3.0, "the loss is float, expected a tensor with one element: take its mean"),
    ],
)
def test_bad_losses(loss_fn, text):
    with pytest.raises(InputError, match=text):
        profile(net(), data(), loss_fn=loss_fn)


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (nn.Identity(), "the model has no parameters, expected weight layers: nothing to profile"),
        (nn.Sequential(nn.BatchNorm2d(3), nn.Flatten()).eval(), "none of 0 weight layers was meas"),
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
        "mode", "samples", "seed", "coverage", "totals", "layers",
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


def assert_same(one, two):
    assert type(one) is type(two)
    if isinstance(one, torch.Tensor):
        assert torch.equal(one.nan_to_num(), two.nan_to_num())
        assert one.dtype == two.dtype
    elif is_dataclass(one):
        for item in fields(one):
            assert_same(getattr(one, item.name), getattr(two, item.name))
    elif isinstance(one, dict):
        assert list(one) == list(two)
        for key, value in one.items():
            assert_same(value, two[key])
    elif isinstance(one, Weights):
        assert_same(dict(sorted(one.items())), dict(sorted(two.items())))
    elif isinstance(one, tuple):
        assert len(one) == len(two)
        for a, b in zip(one, two, strict=True):
            assert_same(a, b)
    else:
        assert one == two


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A profile and its file; one layer was never seen, so its minimum is infinite."""
    path = tmp_path_factory.mktemp("profiles") / "profile.safetensors"
    found = profile(net(), data(), gradients=True)
    found = replace(found, gradients=dict(sorted(found.gradients.items())), notes=("a note",))
    found.save(path)
    return found, path


def test_saving_and_loading(saved, tmp_path):
    found, path = saved
    assert_same(Profile.load(path), found)
    without = replace(found, gradients=None)
    without.save(tmp_path / "small")
    small = Profile.load(tmp_path / "small")
    assert small.gradients is None and small.weights is None
    assert (tmp_path / "small").stat().st_size < path.stat().st_size
    assert isinstance(Profile.load(path).layers[0], LayerProfile)


def test_existing_file_needs_force(saved, tmp_path):
    found, path = saved
    content = path.read_bytes()
    with pytest.raises(FileError):
        replace(found, notes=()).save(path)
    assert path.read_bytes() == content
    target = tmp_path / "p"
    target.write_text("old")
    found.save(target, force=True)
    assert_same(Profile.load(target), found)


def rewritten(path, target, change):
    """Copy a profile with its header and tensors changed."""
    with safetensors.safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["fastplastic"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    change(header, tensors)
    metadata = {"fastplastic": json.dumps(header)}
    safetensors.torch.save_file(tensors, target, metadata)
    return target


def put(*path_and_value):
    *path, key, value = path_and_value

    def change(header, tensors):
        for part in path:
            header = header[part]
        header[key] = value

    return change


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (put("schema_version", 2), "is a profile of schema 2, expected 1: read it"),
        (put("statistics", ["n"]), "is a profile of schema 1, expected 1"),
        (put("mode", 3), "'mode' is 3, expected a string; the file is damaged"),
        (put("samples", True), "'samples' is True, expected an integer"),
        (put("samples", "x" * 999), "'samples' is 'xxxx"),
        (put("notes", [1]), "'notes' is [1], expected a list of strings"),
        (put("has_gradients", None), "'has_gradients' is None, expected true or false"),
        (put("coverage", []), "'coverage' is [], expected an object"),
        (put("coverage", "skipped", [["a"]]), "'skipped' is [['a']], expected [name, reason]"),
        (put("layers", {}), "the list of layers is {}, expected a list"),
        (put("layers", []), "the table is torch.float64"),
        (
            lambda h, t: (h.update(layers=[]), t.update(statistics=t["statistics"][:, :0])),
            "the table is torch.float64 (27, 0), expected",
        ),
        (put("layers", 0, "n_units", 7), "layer 'conv'"),
        (put("layers", 0, "hidden", "runs", [[0, 0, 9, 1]]), "layer 'conv' hidden: a run is"),
        (lambda h, t: t.pop("statistics"), "the table is torch.float32 (0,), expected"),
        (lambda h, t: t.update(statistics=t["statistics"][:, 1:].clone()), "the table is torch.fl"),
        (lambda h, t: t.update(statistics=t["statistics"].float()), "the table is torch.float32"),
    ],
)  # fmt: skip
def test_damaged_profiles(saved, tmp_path, change, text):
    path = rewritten(saved[1], tmp_path / "damaged", change)
    with pytest.raises(FileError) as error:
        Profile.load(path)
    assert text in str(error.value)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("metadata", [None, {"x": "y"}, {"fastplastic": "["}, {"fastplastic": "[]"},
                                      {"fastplastic": "[" * 100_000}])  # fmt: skip
def test_other_safetensors(tmp_path, metadata):
    path = tmp_path / "weights"
    safetensors.torch.save_file({"w": torch.ones(2)}, path, metadata)
    with pytest.raises(FileError, match=r"is not a profile|not a JSON object"):
        Profile.load(path)


def test_missing_file_and_folder(tmp_path):
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(FileError, match="no such file, expected a profile: check the path"):
            Profile.load(path)


@given(data=st.data())
def test_any_damage_to_the_bytes_is_a_file_error_or_harmless(saved, tmp_path_factory, data):
    content = bytearray(saved[1].read_bytes())
    length = data.draw(st.integers(0, len(content)))
    path = tmp_path_factory.getbasetemp() / "bytes"
    if data.draw(st.booleans()):
        content = content[:length]
    else:
        # Mostly in the header, where it hurts.
        place = data.draw(st.integers(0, 9000)) % len(content)
        content[place] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        found = Profile.load(path)
    except FileError:
        return
    assert sum(layer.n_units for layer in found.layers) == 18
    assert len(found.layers[0].stats.table) == len(STATISTICS)


class Answers(NamedTuple):
    """What a model with an auxiliary head returns; `logits` as in torchvision's GoogLeNet."""

    logits: torch.Tensor
    auxiliary: torch.Tensor


class TwoHeads(nn.Module):
    """Two heads on one hidden layer; `returns` makes the output of their two answers."""

    def __init__(self, returns):
        super().__init__()
        torch.manual_seed(0)
        self.hidden, self.head, self.auxiliary = nn.Linear(6, 8), nn.Linear(8, 4), nn.Linear(8, 4)
        self.returns = returns

    def forward(self, x):
        hidden = self.hidden(x).relu()
        return self.returns(self.head(hidden), self.auxiliary(hidden))


def classified():
    torch.manual_seed(1)
    return [(torch.randn(5, 6), torch.arange(5) % 4) for _ in range(2)]


def as_dict(logits, auxiliary):
    return {"logits": logits, "auxiliary": auxiliary}


RETURNS = {
    "tuple": (lambda *answers: answers, tuple, lambda output: output),
    "list": (lambda *answers: list(answers), list, lambda output: output),
    "dict": (as_dict, dict, lambda output: tuple(output.values())),
    "namedtuple": (Answers, Answers, lambda output: (output.logits, output.auxiliary)),
}


@pytest.mark.parametrize("kind", RETURNS)
def test_a_loss_of_the_users_gets_the_output_as_it_is(kind):
    returns, expected, answers = RETURNS[kind]
    model = TwoHeads(returns)
    seen = []

    def loss_fn(output, targets):
        seen.append(type(output))
        main, auxiliary = answers(output)
        return cross_entropy(main, targets) + 0.3 * cross_entropy(auxiliary, targets)

    found = profile(model, classified(), loss_fn=loss_fn, gradients=True)
    assert seen == [expected] * 2
    for x, y in classified():
        (loss_fn(model(x), y) / 2).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found.gradients[name], parameter.grad)
    # The loss of a re-initialisation and the pass that measures norms ask the same way.
    made = plan(found, criterion="random", ratio=0.25)
    report = reinit_(
        model, made, batches=classified(), loss_fn=loss_fn, compensate=True, recalibrate=True
    )
    after = [loss_fn(model(x), y).item() for x, y in classified()]
    assert report.loss_after == pytest.approx(sum(after) / 2)
    assert set(seen) == {expected}


@pytest.mark.parametrize("kind", ["tuple", "list", "namedtuple"])
def test_the_default_loss_takes_the_main_answer(kind):
    model = TwoHeads(RETURNS[kind][0])
    found = profile(model, classified(), gradients=True)
    alone = profile(TwoHeads(lambda main, _: main), classified(), gradients=True)
    torch.testing.assert_close(found.gradients["head.weight"], alone.gradients["head.weight"])
    assert not found.gradients.get("auxiliary.weight", torch.zeros(1)).any()


@pytest.mark.parametrize("labels", [True, False])
def test_a_loss_on_hidden_states(labels):
    model = bert(output_hidden_states=True)

    def loss_fn(output, targets):
        assert isinstance(output, transformers.modeling_outputs.SequenceClassifierOutput)
        assert (targets is None) != labels
        return output.hidden_states[1].square().mean()

    found = profile(model, [tokens(labels)], loss_fn=loss_fn)
    first, second = (found[f"bert.encoder.layer.{i}.intermediate.dense"] for i in range(2))
    assert (first.stats["sum_abs_dw"] > 0).all()
    # What comes after that state has no part in the loss.
    assert not second.stats["sum_abs_dw"].any()


@pytest.mark.parametrize("mapping", [True, False])
def test_a_loss_that_expects_logits_says_where_they_are(mapping):
    batch = tokens()
    labels = batch["labels"]
    data = [batch] if mapping else [(tokens(labels=False), labels)]
    with pytest.raises(TypeError, match="must be Tensor") as error:
        profile(bert(), data, loss_fn=nn.CrossEntropyLoss())
    assert error.value.__notes__ == [
        "loss_fn gets the model's output as it is, here a SequenceClassifierOutput: "
        "take output.logits"
    ]
    profile(bert(), data, loss_fn=lambda output, y: cross_entropy(output.logits, y))


def test_other_errors_of_a_loss_have_no_note():
    with pytest.raises(TypeError) as error:
        profile(net(), data(), loss_fn=lambda output, _: output + "a")
    assert not hasattr(error.value, "__notes__")
