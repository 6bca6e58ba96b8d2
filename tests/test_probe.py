import pytest
import timm
import torch
from helpers.tuned import TRAIN, data, small
from torch.nn.functional import cross_entropy

from fastplastic.errors import InputError
from fastplastic.trials import fit_head
from fastplastic.trials.probe import DECAYS, _decay


def test_only_the_head_is_fitted_and_nothing_is_random():
    model, other = small(), small()
    state = torch.get_rng_state()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fit_head(model, data().plain)
    torch.manual_seed(77)
    fit_head(other, data().plain)
    assert torch.equal(model[-1].weight, other[-1].weight)
    torch.set_rng_state(state)
    same = {name for name, value in model.state_dict().items() if torch.equal(value, before[name])}
    assert before.keys() - same == {"4.weight", "4.bias"}
    assert model.training


def test_the_head_is_the_minimum_of_its_loss():
    """No direction is better: for one of the decays the gradient of the loss is 0."""
    model = small()
    loss = fit_head(model, data().plain)
    features = model[:-1](TRAIN.tensors[0]).detach()
    mean, std = features.mean(0), features.std(0, correction=0)
    live = std > 0
    w = (model[-1].weight.detach() * std)[:, live].requires_grad_()
    b = (model[-1].bias + model[-1].weight @ mean).detach().requires_grad_()
    inputs = ((features - mean) / std)[:, live]
    plain = cross_entropy(inputs @ w.T + b, TRAIN.tensors[1])
    assert plain.item() == pytest.approx(loss, rel=1e-4)
    plain.backward()
    assert b.grad.abs().max() < 2e-3
    assert min((w.grad + decay * w).abs().max().item() for decay in DECAYS) < 2e-3


def test_the_decay_suits_the_images():
    """What is all noise is hardly learned, what is plain is."""
    noise = torch.Generator().manual_seed(0)
    x = torch.randn(50, 40, generator=noise)
    targets = torch.randint(2, (50,), generator=noise)
    plain = (x[:, 0] > 0).long()
    x[:, 0] *= 3
    assert _decay(x, targets, 2) == max(DECAYS)
    assert _decay(x, plain, 2) < max(DECAYS)


def test_dead_features_do_not_matter():
    model = small()
    with torch.no_grad():
        model[2].bias[:3] = -100.0
    fit_head(model, data().plain)
    assert not model[-1].weight[:, :3].any() and model[-1].weight.isfinite().all()


def test_a_head_that_has_two_names_is_fitted_once(monkeypatch):
    from fastplastic.trials import probe

    model = timm.create_model("test_resnet", num_classes=4).eval()
    fitted = []
    real = probe._fit
    monkeypatch.setattr(probe, "_fit", lambda *given: fitted.append(given[0]) or real(*given))
    fit_head(model, [(torch.randn(8, *model.pretrained_cfg["input_size"]), torch.arange(8) % 4)])
    assert fitted == [model.get_classifier()]


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "deit_tiny_distilled_patch16_224"])
def test_heads_of_timm(name):
    model = timm.create_model(name, num_classes=4).eval()
    size = model.pretrained_cfg["input_size"]
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(12) % 4
    images = torch.randn(12, *size, generator=generator) + targets.reshape(-1, 1, 1, 1)
    with torch.no_grad():
        before = cross_entropy(model(images), targets)
    fit_head(model, [(images[:7], targets[:7]), (images[7:], targets[7:])])
    with torch.no_grad():
        assert cross_entropy(model(images), targets) < 0.7 * before


def test_what_cannot_be_fitted():
    with pytest.raises(InputError, match="no batches to fit the head to"):
        fit_head(small(), [])
    with pytest.raises(InputError, match="has no classifier to fit"):
        fit_head(
            torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(6, 3), torch.nn.ReLU()),
            data().plain,
        )
    broken = small()
    broken[0].weight.data[0, 0] = torch.nan
    with pytest.raises(InputError, match="expected finite features"):
        fit_head(broken, data().plain)


class Plain(torch.nn.Module):
    """A model that does not say which layer is its head; the 1 x 1 convolution is flattened."""

    def __init__(self, flattened: bool) -> None:
        super().__init__()
        self.flattened = flattened
        self.out = torch.nn.Conv2d(8, 3, 1) if flattened else torch.nn.Linear(8, 3)
        self.body = torch.nn.Linear(6, 8)

    def forward(self, x):
        x = self.body(x.flatten(1)).relu()
        return self.out(x[:, :, None, None]).flatten(1) if self.flattened else self.out(x)


@pytest.mark.parametrize("flattened", [False, True])
def test_the_head_of_any_model_is_the_layer_whose_output_it_returns(flattened):
    torch.manual_seed(0)
    model = Plain(flattened)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fit_head(model, data().plain)
    same = {name for name, value in model.state_dict().items() if torch.equal(value, before[name])}
    assert before.keys() - same == {"out.weight", "out.bias"}
    assert not model.out._forward_hooks and not model.body._forward_hooks


def test_batches_are_read_once_and_draw_nothing():
    one, other = small(), small()
    fit_head(one, list(data().plain))
    fit_head(other, (batch for batch in data().plain))
    assert torch.equal(one[-1].weight, other[-1].weight)
    torch.manual_seed(4)
    state = torch.get_rng_state()
    fit_head(small(), data().train)
    assert torch.equal(state, torch.get_rng_state())
