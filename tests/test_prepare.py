"""What is done to a model before it is trained."""

import pytest
import torch
from helpers.tuned import TRAIN, data, settings, small, task, with_norm

from fastplastic.errors import InputError
from fastplastic.trials import (
    Arm,
    Task,
    TrainSettings,
    TrialData,
    parse_arm,
    run_trial,
    with_controls,
)
from fastplastic.trials.prepare import Start
from fastplastic.trials.probe import fit_head

DOSE = "dormant@0.2:zero"
pytestmark = pytest.mark.usefixtures("traced_once")


def test_what_is_removed_stays_out():
    start = Start(task(), settings(), 0)
    arm = with_controls([DOSE, "remove"])[3]
    prepared = start.prepare(arm)
    from fastplastic.trials import train

    train(prepared.model, start.data.train, settings(), seed=0, hold=prepared.hold)
    plan = prepared.plan
    consumers = {"0": prepared.model[2], "2": prepared.model[4]}
    for layer, units in plan.units.items():
        assert not consumers[layer].weight[:, units].any()
    # Without the hold they come back.
    grown = start.prepare(with_controls([DOSE])[1])
    train(grown.model, start.data.train, settings(), seed=0)
    assert any(
        {"0": grown.model[2], "2": grown.model[4]}[layer].weight[:, units].any()
        for layer, units in grown.plan.units.items()
    )


def test_removed_weights_stay_out():
    from fastplastic.trials import train

    start = Start(task(), settings(), 0)
    prepared = start.prepare(with_controls(["swr@0.1", "remove"])[3])
    train(prepared.model, start.data.train, settings(), seed=0, hold=prepared.hold)
    parameters = dict(prepared.model.named_parameters())
    assert all(not parameters[name][mask].any() for name, mask in prepared.plan.masks.items())


def test_recalibrate_measures_all_norms_and_nothing_else():
    start = Start(with_norm(), settings(norms_first=False), 0)
    model = start.prepare(Arm("recalibrate")).model
    x = model[0](TRAIN.tensors[0]).detach()
    torch.testing.assert_close(model[1].running_mean, x.mean(0))
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, start.model.get_parameter(name), rtol=0, atol=0)


def test_norms_are_measured_before_the_head_is_fitted():
    start = Start(with_norm(), settings(), 0)
    x = start.model[0](TRAIN.tensors[0]).detach()
    torch.testing.assert_close(start.model[1].running_mean, x.mean(0))
    plain = Start(with_norm(), settings(norms_first=False), 0)
    assert not plain.model[1].running_mean.any()
    assert not torch.equal(plain.model[-1].weight, start.model[-1].weight)
    assert start.seconds.keys() == {"norms", "probe"} and plain.seconds.keys() == {"probe"}


def test_shrink_perturb_leaves_the_head():
    start = Start(task(), settings(), 0)
    model = start.prepare(Arm("shrink-perturb", shrink=0.5)).model
    torch.testing.assert_close(model[-1].weight, start.model[-1].weight, rtol=0, atol=0)
    difference = model[0].weight - 0.5 * start.model[0].weight
    assert 0.005 < difference.std() < 0.02


def test_a_dose_can_shrink_what_it_leaves():
    start = Start(task(), settings(), 0)
    plain, shrunk = (
        start.prepare(with_controls([text])[1])
        for text in ("dormant@0.2:fresh", "dormant@0.2:fresh+shrink=0.5")
    )
    units = plain.plan.units["0"]
    assert torch.equal(units, shrunk.plan.units["0"])
    one, other = plain.model[0].weight, shrunk.model[0].weight
    torch.testing.assert_close(one[units], other[units], rtol=0, atol=0)
    kept = torch.ones(16, dtype=torch.bool)
    kept[units] = False
    noise = other[kept] - 0.5 * one[kept]
    assert 0.005 < noise.std() < 0.02
    torch.testing.assert_close(plain.model[-1].bias, shrunk.model[-1].bias, rtol=0, atol=0)


def test_a_dose_can_fit_the_head_again():
    start = Start(task(), settings(), 0)
    plain, refit = (
        start.prepare(with_controls([text])[1])
        for text in ("dormant@0.2:fresh", "dormant@0.2:fresh+refit")
    )
    torch.testing.assert_close(plain.model[0].weight, refit.model[0].weight, rtol=0, atol=0)
    assert not torch.equal(plain.model[-1].weight, refit.model[-1].weight)
    fit_head(plain.model, start.data.plain)
    torch.testing.assert_close(plain.model[-1].weight, refit.model[-1].weight, rtol=0, atol=0)
    with pytest.raises(InputError, match=r"arm remove:dormant.*leave refit out, or remove"):
        run_trial(task(), with_controls(["dormant@0.2:fresh+refit", "remove"]), [0], settings())


@pytest.mark.parametrize("text", ["shrink-perturb", "dormant@0.2:fresh+refit"])
def test_norms_are_measured_anew_behind_what_has_changed(text):
    arm = parse_arm(text)
    first, without = (
        Start(with_norm(), settings(norms_first=norms), 0).prepare(arm).model
        for norms in (True, False)
    )
    x = first[0](TRAIN.tensors[0]).detach()
    torch.testing.assert_close(first[1].running_mean, x.mean(0))
    y = without[0](TRAIN.tensors[0]).detach()
    assert not torch.allclose(without[1].running_mean, y.mean(0))


def test_the_profiled_images_do_not_depend_on_what_was_drawn_before():
    def start():
        shuffled = TrialData(data().train, data().test, data().train)
        task = Task(lambda seed: small(), lambda seed: shuffled)
        return Start(task, TrainSettings(epochs=1, profile_images=32), seed=3)

    one, other = start(), start()
    torch.manual_seed(99)
    torch.randn(7)
    for ours, theirs in zip(one._profiled(), other._profiled(), strict=True):
        assert torch.equal(ours[0], theirs[0])
    torch.manual_seed(5)
    late = start()
    torch.randn(3)
    assert torch.equal(late._profiled()[0][0], one._profiled()[0][0])
