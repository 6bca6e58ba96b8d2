"""What `reinit_` does with batches: loss, compensation, running statistics; and averages."""

import copy
from dataclasses import replace

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import fastplastic
from fastplastic import plan, reinit_
from fastplastic.errors import InputError
from fastplastic.planning import Plan

SOURCE = torch.Generator().manual_seed(1)
IMAGES = [
    (torch.randn(6, 3, 8, 8, generator=SOURCE), torch.randint(0, 4, (6,), generator=SOURCE))
    for _ in range(3)
]


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def identical(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], two[name]) for name in one)


def stuck(model: nn.Module, layer: str, unit: int, value: float) -> None:
    """Let a unit be the same everywhere, whatever goes in."""
    module = model.get_submodule(layer)
    with torch.no_grad():
        module.weight[unit] = 0.0
        module.bias[unit] = value


def network(kind: str) -> nn.Module:
    """Return networks in which something else lies between a unit and what reads it."""
    torch.manual_seed(0)
    head = [nn.Flatten(), nn.Linear(5 * 64, 4)]
    parts = {
        "linear": [nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, 4)],
        "padding": [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 5, 3, padding=1), *head],
        "pooling": [
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 5, 1),
            nn.Flatten(), nn.Linear(80, 4),
        ],
        "norm": [
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 5, 1, bias=False),
            nn.BatchNorm2d(5), nn.ReLU(), *head,
        ],
        "flattened": [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 4)],
        "groups": [
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 6, 3, groups=2), nn.ReLU(),
            nn.Flatten(), nn.Linear(216, 4),
        ],
    }  # fmt: skip
    return nn.Sequential(*parts[kind]).eval()


def planned(model: nn.Module, layer: str, ratio: float = 0.25, **arguments) -> Plan:
    profile = fastplastic.profile(model, IMAGES)
    arguments = {"criterion": "dead", "include": [layer], **arguments}
    return plan(profile, ratio=ratio, **arguments)


FIRST = {"linear": "1"}


@pytest.mark.parametrize("kind", ["linear", "pooling", "norm", "flattened", "groups"])
def test_the_constant_of_a_stuck_unit_stays_with_compensation(kind):
    model = network(kind)
    first = FIRST.get(kind, "0")
    stuck(model, first, 1, 3.0)
    stuck(model, first, 6, 2.0)
    made = planned(model, first)
    assert made.units[first].tolist() == [1, 6]
    plain = copy.deepcopy(model)
    before = [model(x) for x, _ in IMAGES]
    report = reinit_(model, made, compensate=True, batches=IMAGES)
    for (x, _), out in zip(IMAGES, before, strict=True):
        torch.testing.assert_close(model(x), out, rtol=1e-4, atol=1e-4)
    assert report.loss_after == pytest.approx(report.loss_before, rel=1e-5) and not report.notes
    reinit_(plain, made)
    assert (plain(IMAGES[0][0]) - before[0]).abs().max() > 0.1


def test_at_padded_edges_the_mean_is_kept():
    model = network("padding")
    stuck(model, "0", 1, 3.0)
    outputs = []
    model[2].register_forward_hook(lambda *args: outputs.append(args[2].mean((0, 2, 3))))
    made = planned(model, "0", 0.125)
    outputs.clear()
    reinit_(model, made, compensate=True, batches=IMAGES)
    # Before and after.
    n = len(IMAGES)
    assert len(outputs) == 2 * n
    before, after = (torch.stack(own).mean(0) for own in (outputs[:n], outputs[n:]))
    torch.testing.assert_close(before, after, rtol=1e-4, atol=1e-5)


def test_what_is_added_is_counted_and_fresh_rows_lose_nothing():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4)
    )
    stuck(model, "1", 2, 3.0)
    stuck(model, "3", 3, 2.0)
    with torch.no_grad():
        # Not by chance one that is always 0, which contributes nothing.
        model[3].bias[1] = 1.0
    profile = fastplastic.profile(model, IMAGES)
    made = plan(profile, criterion="dead", threshold=0.0)
    units = {"1": torch.tensor([2]), "3": torch.tensor([1])}
    made = replace(made, units=units, scores={name: torch.zeros(1) for name in units})
    other = copy.deepcopy(model)
    old = model[3].bias.detach().clone()
    contribution = 3.0 * model[3].weight.detach()[:, 2]
    report = reinit_(model, made, compensate=True, batches=IMAGES)
    reinit_(other, made)
    changed = model[3].bias.detach() - old
    kept = [0, 2, 3, 4, 5]
    torch.testing.assert_close(changed[kept], contribution[kept])
    # The fresh row has the bias that it would have had.
    assert model[3].bias[1] == other[3].bias[1]
    counted = {(w.name, w.elements) for w in report.written if w.name.endswith("bias")}
    # Row 3 reads nothing, row 1 is fresh.
    assert {("3.bias", 4), ("5.bias", 4)} <= counted


def test_layers_without_a_place_for_the_constant_are_named():
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, 4, bias=False))
    report = reinit_(model, planned(model, "1"), compensate=True, batches=IMAGES)
    assert report.notes == ("1 weights have no bias or BatchNorm to compensate with: 3.weight",)


def normed() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5),
        nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 4),
    )  # fmt: skip
    for x, _ in IMAGES:
        model(x)
    return model.eval()


@pytest.mark.parametrize(("layer", "norm"), [("0", 1), ("4", 5)])
@pytest.mark.parametrize("training", [False, True])
def test_recalibration_measures_the_fresh_channels_and_no_others(layer, norm, training):
    model = normed()
    made = planned(model, layer, criterion="random")
    before = snapshot(model)
    model.train(training)
    report = reinit_(model, made, recalibrate=True, batches=IMAGES)
    assert all(module.training == training for module in model.modules())
    model.eval()
    fresh, bn = made.units[layer], model[norm]
    maps = [model[:norm](x).detach() for x, _ in IMAGES]
    means = torch.stack([z.mean((0, 2, 3)) for z in maps]).mean(0)
    variances = torch.stack([z.transpose(0, 1).flatten(1).var(1) for z in maps]).mean(0)
    torch.testing.assert_close(bn.running_mean[fresh], means[fresh])
    torch.testing.assert_close(bn.running_var[fresh], variances[fresh])
    others = torch.ones(bn.num_features, dtype=torch.bool)
    others[fresh] = False
    for kind in ("running_mean", "running_var"):
        assert torch.equal(getattr(bn, kind)[others], before[f"{norm}.{kind}"][others])
        other = f"{6 - norm}.{kind}"
        assert torch.equal(model.state_dict()[other], before[other])
    assert bn.momentum == 0.1 and bn.num_batches_tracked == len(IMAGES)
    # Counted once, as what was reset.
    assert [written.name for written in report.written].count(f"{norm}.running_var") == 1


class Joined(nn.Module):
    """One norm over the channels of two layers; the reader is called by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
        self.norm, self.read = nn.BatchNorm2d(8), nn.Linear(8, 4)

    def forward(self, x):
        joined = self.norm(torch.cat([self.a(x), self.b(x)], 1)).relu()
        return self.read(input=joined.mean((2, 3)))


def test_a_norm_of_several_layers_and_a_reader_called_by_keyword():
    torch.manual_seed(0)
    model = Joined().eval()
    stuck(model, "a", 1, 3.0)
    profile = fastplastic.profile(model, IMAGES)
    made = plan(profile, criterion="random", ratio=0.25, scope="layer")
    units = {"a": torch.tensor([1]), "b": torch.tensor([2])}
    assert set(made.units) == set(units)
    made = replace(made, units=units, scores={name: torch.zeros(1) for name in units})
    old = model.read.bias.detach().clone()
    means = torch.stack([model.norm(torch.cat([model.a(x), model.b(x)], 1)).relu().mean((0, 2, 3))
                         for x, _ in IMAGES]).mean(0)  # fmt: skip
    lost = model.read.weight.detach()[:, [1, 6]] @ means.detach()[[1, 6]]
    reinit_(model, made, recalibrate=True, compensate=True, batches=IMAGES)
    torch.testing.assert_close(model.read.bias.detach(), old + lost, rtol=1e-4, atol=1e-5)
    for layer, channel, unit in ((model.a, 1, 1), (model.b, 6, 2)):
        mean = torch.stack([layer(x)[:, unit].mean() for x, _ in IMAGES]).mean()
        torch.testing.assert_close(model.norm.running_mean[channel], mean.detach())
        assert model.norm.running_var[channel] != 1


def test_the_loss_before_and_after_is_that_of_the_batches():
    model = normed().train()
    made = planned(model, "0", criterion="random")

    def loss(net: nn.Module) -> float:
        torch.manual_seed(7)
        own = copy.deepcopy(net)
        return sum(nn.functional.cross_entropy(own(x), y).item() for x, y in IMAGES) / len(IMAGES)

    before, state = loss(model), snapshot(model)
    torch.manual_seed(7)
    random = torch.get_rng_state()
    report = reinit_(model, made, batches=IMAGES)
    assert torch.equal(random, torch.get_rng_state()) and model.training
    assert report.loss_before == pytest.approx(before, rel=1e-5)
    assert report.loss_after == pytest.approx(loss(model), rel=1e-5)
    assert report.loss_after != report.loss_before
    # The running statistics of layers that are not reset have not moved.
    assert torch.equal(model[5].running_mean, state["5.running_mean"])
    assert report.shares == {"0": 0.25} and report.to_dict()["loss_before"] == report.loss_before


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("at", range(len(IMAGES), 3 * len(IMAGES)))
def test_a_failure_on_the_batches_leaves_everything_as_it_was(error, at):
    model = normed()
    made = planned(model, "0", criterion="random")
    before, calls = snapshot(model), []

    def failing(output, targets):
        calls.append(1)
        if len(calls) == at + 1:
            raise error
        return nn.functional.cross_entropy(output, targets)

    with pytest.raises(error):
        reinit_(model, made, compensate=True, recalibrate=True, batches=IMAGES, loss_fn=failing)
    assert identical(before, snapshot(model)) and model[1].momentum == 0.1
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"compensate": True}, "compensate needs batches, found none: pass batches="),
        ({"recalibrate": True}, "recalibrate needs batches, found none: pass batches="),
        ({"batches": iter(IMAGES)}, "batches is a list_iterator that can be read once, expected"),
        ({"batches": []}, "there are no batches, expected at least one"),
        ({"batches": [3]}, "batch 0 is a int, expected"),
        (
            {"batches": IMAGES, "compensate": True, "outgoing": "keep"},
            "compensate with outgoing 'keep': expected 'zero' or 'small'",
        ),
    ],
)
def test_bad_arguments_are_refused(arguments, text):
    model = normed()
    made = planned(model, "0", criterion="random")
    before = snapshot(model)
    with pytest.raises(InputError, match=text):
        reinit_(model, made, **arguments)
    assert identical(before, snapshot(model))


def test_single_weights_report_their_loss_but_are_not_adjusted():
    model = network("linear")
    profile = fastplastic.profile(model, IMAGES, gradients=True)
    made = plan(profile, granularity="weight", ratio=0.1)
    for name in ("compensate", "recalibrate"):
        with pytest.raises(InputError, match=f"{name} is for units, found a plan of single weigh"):
            reinit_(model, made, batches=IMAGES, **{name: True})
    report = reinit_(model, made, batches=IMAGES)
    assert report.loss_before != report.loss_after
    assert report.shares == {"1.weight": report.layers["1.weight"] / model[1].weight.numel()}


@pytest.mark.parametrize("average", [AveragedModel, ModelEmaV3])
def test_a_moving_average_is_refused(average):
    model = network("linear")
    own = average(model)
    made = planned(model, "1")
    with pytest.raises(InputError, match=f"the model is a {average.__name__}, a moving average, e"):
        reinit_(own, made)


def test_what_is_named_as_an_average_is_not_written_unnoticed():
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.online, self.ema = network("linear"), network("linear")

        def forward(self, x):
            return self.online(x) + self.ema(x)

    model = Pair()
    profile = fastplastic.profile(model, IMAGES)
    made = plan(profile, criterion="random", ratio=0.25, scope="layer")
    assert set(made.units) == {"online.1", "ema.1"}
    report = reinit_(model, made)
    assert report.notes[0].startswith(
        "3 tensors are named as a moving average and were written too"
    )
    made = plan(profile, criterion="random", ratio=0.25, exclude=["ema*"])
    assert not reinit_(model, made).notes


def test_frozen_parameters_that_are_written_are_named():
    model = network("linear")
    made = planned(model, "1")
    model[1].requires_grad_(False)
    report = reinit_(model, made)
    assert report.notes == (
        "2 parameters that were written have requires_grad=False, so they do not learn: "
        "1.weight, 1.bias",
    )
