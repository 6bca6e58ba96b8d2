"""What a profile says stands out."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import fastplastic
from fastplastic import findings
from fastplastic.measure.finding import MOST


def net(width=20):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 3)
    )


def measured(model, samples=64, scale=1.0, **options):
    torch.manual_seed(1)
    batches = [(scale * torch.randn(samples, 6), torch.randint(0, 3, (samples,)))]
    return fastplastic.profile(model.eval(), batches, **options)


def kill(layer, units):
    with torch.no_grad():
        layer.weight[:units] = 0
        layer.bias[:units] = -1


def found(profile, words):
    (finding,) = [finding for finding in findings(profile) if words in finding.text]
    return finding


def healthy():
    model = net()
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.bias.zero_()
    return model


def test_nothing_found_is_said_too():
    (finding,) = findings(measured(healthy(), samples=512))
    assert finding.severity == "none"
    assert (
        finding.text == "Nothing stands out: no unit that was measured is dead, frozen or dormant."
    )
    assert finding.evidence == "43 units of 3 layers, 512 samples"


@pytest.mark.parametrize(
    ("units", "severity", "begin"),
    [(1, "low", "Some units"), (2, "medium", "From 2 on, units"), (10, "high", "From 2 on, units")],
)
def test_dead_units_and_where_they_begin(units, severity, begin):
    model = healthy()
    kill(model[2], units)
    finding = found(measured(model, samples=512), "are dead")
    assert (finding.severity, finding.text) == (
        severity, f"{begin} are dead: they give the same value for every input."
    )  # fmt: skip
    share = f"{units / 20:.0%}"
    assert finding.evidence == f"{units} of 43 units in 1 layer; most in 2, {share}"
    assert "can reach all of them" in finding.action


def test_what_cannot_be_reset_is_said():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.stream, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x):
            return self.head(x + self.stream(torch.relu(self.inner(x))))

    model = Residual()
    with torch.no_grad():
        model.stream.weight[:3] = 0
    finding = found(measured(model), "are dead")
    assert finding.action.startswith("none of them can be re-initialised:")


def test_units_that_are_reset_with_others_can_be_reached():
    """Depthwise filters are units, and re-initialised with the channels that they filter."""
    model = nn.Sequential(
        nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=6), nn.ReLU(), nn.Flatten(),
        nn.Linear(6 * 4, 3),
    )  # fmt: skip
    with torch.no_grad():
        for layer, units in ((model[0], slice(0, 2)), (model[2], slice(1, 4))):
            layer.weight[units] = 0
            layer.bias[units] = -1
    batches = [(torch.randn(64, 3, 4, 4), torch.zeros(64, dtype=torch.int64))]
    profile = fastplastic.profile(model, batches)
    finding = found(profile, "are dead")
    # Two of the first layer and those of the second one that get nothing or give nothing.
    dead = {layer.name: int(layer.dead.sum()) for layer in profile}
    assert dead["0"] == 2 and dead["2"] >= 3
    assert finding.evidence.startswith(f"{sum(dead.values())} of 15 units in 2 layers")
    assert finding.action.startswith("re-initialising can reach all of them")


def test_frozen_units_are_not_counted_as_dead_too():
    model = nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 3))
    torch.manual_seed(0)
    with torch.no_grad():
        model[0].weight.normal_().mul_(1000)
    profile = measured(model)
    assert not [finding for finding in findings(profile) if "are dead" in finding.text]
    finding = found(profile, "functions are flat")
    assert finding.text == ("From 0 on, layers work where their activation functions are flat.")


def test_dormant_units():
    model = healthy()
    with torch.no_grad():
        model[0].weight[:4] *= 1e-4
    finding = found(measured(model, samples=512), "are dormant")
    assert finding.severity == "medium"
    assert "mean |h| of at most 0.025 of the layer's" in finding.text


def test_values_that_are_not_finite_come_first():
    model = net()
    kill(model[0], 15)
    with torch.no_grad():
        model[2].weight[3] = torch.nan
    finding = findings(measured(model))[0]
    assert finding.severity == "high"
    assert finding.text == "Activations are NaN or infinite from 2 on."


def test_no_gradient():
    model = healthy()
    with torch.no_grad():
        model[2].weight.zero_()
        model[2].bias.fill_(1)
    finding = found(measured(model), "No gradient")
    assert finding.text == "No gradient reaches the weights of 1 layer, the first is 0."
    quiet = findings(measured(model, backward=False))
    assert not [finding for finding in quiet if "No gradient" in finding.text]


def test_few_samples_are_told_where_units_look_dead():
    model = healthy()
    kill(model[0], 2)
    assert found(measured(model, samples=63), "Few samples").evidence == "63 samples"
    with pytest.raises(ValueError, match="not enough values"):
        found(measured(model, samples=64), "Few samples")


def test_layers_without_figures():
    profile = measured(healthy())
    coverage = replace(profile.coverage, skipped=(("odd", "it was never called"),), found=4)
    finding = found(replace(profile, coverage=coverage), "no figures")
    assert finding.text == "1 of 4 weight layers have no figures."
    assert finding.evidence == "odd: it was never called"


def test_at_most_five_and_the_worst_first():
    model = net()
    kill(model[0], 12)
    with torch.no_grad():
        model[0].weight[12:16] *= 1e-5
        model[0].bias[12:16] = 1e-6
        model[2].weight[3] = torch.nan
    profile = measured(model, samples=8)
    coverage = replace(profile.coverage, skipped=(("odd", "why"),))
    several = findings(replace(profile, coverage=coverage))
    assert len(several) <= MOST
    order = ["high", "medium", "low"]
    ranks = [order.index(finding.severity) for finding in several]
    assert ranks == sorted(ranks) and ranks[0] == 0


def test_units_that_were_not_measured_are_not_called_healthy():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(6, 4), nn.Linear(4, 3)

        def forward(self, x):
            z = self.one(x)
            # An activation function that is not known.
            return self.two(z * z.sigmoid())

    profile = measured(Odd(), samples=512)
    profile = replace(profile, coverage=replace(profile.coverage, skipped=()))
    (finding,) = findings(profile)
    assert finding.evidence == "3 of 7 units of 2 layers, 512 samples"


def test_units_of_several_layers_are_counted_once_and_the_worst_layer_is_named():
    model = healthy()
    kill(model[0], 2)
    kill(model[2], 5)
    with torch.no_grad():
        model[2].weight[5:9] *= 1e-5
        model[2].bias[5:9] = 1e-6
    profile = measured(model, samples=512)
    dead, dormant = found(profile, "are dead"), found(profile, "are dormant")
    assert dead.text.startswith("From 0 on, units are dead")
    assert dead.evidence == "7 of 43 units in 2 layers; most in 2, 25%"
    # Dead units are dormant too, and are not said twice.
    assert dormant.text.startswith("From 2 on, units are dormant")
    assert dormant.evidence == "4 of 43 units in 1 layer; most in 2, 20%"


def test_some_units_that_can_be_reset_are_told_from_all():
    model = nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 3))
    kill(model[0], 4)
    with torch.no_grad():
        model[2].weight[:1] = 0
    finding = found(measured(model, samples=512), "are dead")
    assert finding.evidence == "5 of 23 units in 2 layers; most in 2, 33%"
    assert finding.action.startswith("re-initialising can reach 4 of them;")


@pytest.mark.parametrize(("activation", "flagged"), [(nn.ReLU(), False), (nn.Tanh(), True)])
def test_half_flat_is_usual_for_rectifiers_alone(activation, flagged):
    """Some 80 % of the positions are flat, of which the limit for rectifiers is 95 %."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 200), activation, nn.Linear(200, 3))
    with torch.no_grad():
        scale = 1 if isinstance(activation, nn.ReLU) else 30
        model[0].weight.mul_(scale)
        model[0].bias.fill_(-0.45 if scale == 1 else 0)
    profile = measured(model, samples=512)
    assert 0.55 < float(profile["0"].saturated_fraction.nanmean()) < 0.95
    texts = [finding.text for finding in findings(profile) if "are flat." in finding.text]
    assert texts == ["From 0 on, layers work where their activation functions are flat."] * flagged


def test_flat_layers_are_counted_among_all_and_the_worst_is_named():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 200), nn.Tanh(), nn.Linear(200, 200), nn.Tanh(), nn.Linear(200, 3)
    )
    with torch.no_grad():
        model[0].weight.mul_(30)
        model[2].weight.mul_(3000)
    profile = measured(model, samples=512)
    first, second = (float(profile[name].saturated_fraction.nanmean()) for name in "02")
    assert 0.5 < first < second
    finding = found(profile, "are flat.")
    assert finding.text.startswith("From 0 on")
    assert finding.evidence == f"2 layers of 3; most in 2, {second:.0%} of all positions"


def test_where_values_are_not_finite_and_how_many_units_they_met():
    model = net()
    with torch.no_grad():
        model[2].weight[3:5] = torch.nan
    finding = found(measured(model), "NaN")
    # Two rows, and all three of the layer behind them.
    assert finding.evidence == "5 units of 2 layers met NaN or infinity"
    assert finding.action.startswith("look at the weights and the input of 2;")


def test_the_first_of_several_layers_is_named():
    model = healthy()
    with torch.no_grad():
        model[4].weight.zero_()
    without = found(measured(model), "No gradient")
    assert without.text == "No gradient reaches the weights of 2 layers, the first is 0."
    assert without.evidence == "2 of 3 layers have a gradient of exactly 0 or none"
    profile = measured(healthy())
    skipped = (("odd", "why"), ("even", "what for"))
    coverage = replace(profile.coverage, skipped=skipped, found=5)
    assert found(replace(profile, coverage=coverage), "no figures").evidence == "odd: why"


def test_few_samples_matter_where_units_look_dead_only():
    texts = [finding.text for finding in findings(measured(healthy(), samples=63))]
    profile = measured(healthy(), samples=63)
    assert not profile.totals.dead
    assert not [text for text in texts if "Few samples" in text]


def test_no_more_than_five_are_said_and_the_mildest_are_left_out():
    model = healthy()
    kill(model[0], 19)
    with torch.no_grad():
        model[2].weight[:4] *= 1e-5
        model[2].bias[:4] = 1e-6
        model[2].bias[4:] = 1
        model[4].weight.zero_()
    profile = measured(model, samples=8)
    assert found(profile, "Few samples").severity == "low"
    coverage = replace(profile.coverage, skipped=(("odd", "why"),), found=4)
    texts = [own.text for own in findings(replace(profile, coverage=coverage))]
    words = ["are dead", "are dormant", "are flat.", "No gradient", "no figures"]
    assert len(texts) == 5 and all(map(str.__contains__, texts, words))


def test_the_more_severe_comes_first_and_dead_before_frozen():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 3))
    kill(model[0], 2)
    with torch.no_grad():
        model[0].weight[2:4] *= 1e6
    texts = [finding.text for finding in findings(measured(model, samples=512))]
    assert [text.split()[5] for text in texts[:2]] == ["dead:", "frozen"]
    kill(model[0], 1)
    with torch.no_grad():
        model[0].weight[1] = 1
        model[0].weight[2:] *= 1e6
    first, second, *_ = findings(measured(model, samples=512))
    assert ("are frozen" in first.text, first.severity) == (True, "high")
    assert second.severity != "high"
