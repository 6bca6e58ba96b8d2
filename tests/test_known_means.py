"""Compensation by mean activations that the caller has kept, and copies that are written along."""

import copy

import pytest
import timm
import torch
from torch import Tensor, nn

from fastplastic import plan, profile, reinit_
from fastplastic.errors import InputError
from fastplastic.reinit.transaction import Undo


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3)
    )


def pointwise() -> nn.Sequential:
    """Return convolutions of one pixel, in groups, one without bias."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 1), nn.ReLU(), nn.Conv2d(16, 12, 1, groups=2), nn.ReLU(),
        nn.Conv2d(12, 8, 1, bias=False), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 3),
    )  # fmt: skip


def batch_of(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    shape = (32, 6) if isinstance(model[0], nn.Linear) else (8, 3, 5, 5)
    return [(torch.randn(shape), torch.randint(3, (shape[0],)))]


@pytest.mark.parametrize("make", [mlp, pointwise])
@pytest.mark.parametrize("outgoing", ["zero", "small"])
def test_known_means_do_what_measuring_does(make, outgoing: str) -> None:
    measured, known = make(), make()
    batches = batch_of(measured)
    seen = profile(measured, batches)
    chosen = plan(seen, ratio=0.4)
    means = {layer.name: layer.stats.mean_h for layer in seen.layers}
    reinit_(measured, chosen, outgoing=outgoing, compensate=True, batches=batches)
    report = reinit_(known, chosen, outgoing=outgoing, compensate=means)
    for name, value in measured.state_dict().items():
        torch.testing.assert_close(known.state_dict()[name], value, atol=1e-5, rtol=1e-5)
    without = [note for note in report.notes if "no bias" in note]
    assert bool(without) == (make is pointwise)


def test_what_the_consumer_computes_keeps_its_mean() -> None:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=5)
    images = torch.randn(16, 3, 32, 32)
    seen = profile(model.eval(), [(images, torch.zeros(16).long())])
    chosen = plan(seen, criterion="contribution", ratio=0.3, include=["blocks.0.mlp.fc1"])
    means = {layer.name: layer.stats.mean_h for layer in seen.layers}

    def mean_of_consumer(network: nn.Module) -> Tensor:
        found: list[Tensor] = []
        consumer = network.get_submodule("blocks.0.mlp.fc2")
        handle = consumer.register_forward_hook(lambda *args: found.append(args[2].mean((0, 1))))
        with torch.no_grad():
            network(images)
        handle.remove()
        return found[0]

    before = mean_of_consumer(model)
    plain = copy.deepcopy(model)
    reinit_(plain, chosen)
    assert (mean_of_consumer(plain) - before).norm() > 1e-3
    reinit_(model, chosen, compensate=means)
    torch.testing.assert_close(mean_of_consumer(model), before, atol=1e-5, rtol=1e-4)


def test_means_of_the_wrong_units() -> None:
    model = mlp()
    chosen = plan(profile(model, batch_of(model)), ratio=0.4)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match="no mean activation for each of the 16 units of '0'"):
        reinit_(model, chosen, compensate={"0": torch.zeros(3), "2": torch.zeros(12)})
    with pytest.raises(InputError, match="outgoing 'keep': expected 'zero' or 'small'"):
        reinit_(model, chosen, outgoing="keep", compensate={"0": torch.zeros(16)})
    assert all(map(torch.equal, before.values(), model.state_dict().values()))


def test_copies_follow_where_the_model_was_written() -> None:
    model = mlp()
    batches = batch_of(model)
    target = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in target.parameters():
            parameter.add_(0.5)
    chosen = plan(profile(model, batches), ratio=0.4)
    old, own = copy.deepcopy(model.state_dict()), copy.deepcopy(target.state_dict())
    report = reinit_(model, chosen, copies=[target], compensate=True, batches=batches)
    now = model.state_dict()
    for name, value in target.state_dict().items():
        written = now[name] != old[name]
        if name.endswith("4.bias"):
            # Shifted alone: the difference that the copy had stays.
            torch.testing.assert_close(value - now[name], own[name] - old[name])
        elif name.endswith("weight"):
            assert torch.equal(value[written], now[name][written])
            assert torch.equal(value[~written], own[name][~written])
    assert report.count


def test_a_copy_that_is_none() -> None:
    model = mlp()
    chosen = plan(profile(model, batch_of(model)), ratio=0.4)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match=r"'0.weight' of copy 0 .Sequential. is that of the model"):
        reinit_(model, chosen, copies=[model])
    with pytest.raises(InputError, match=r"copy 1 .Sequential. has no '0.weight', expected the"):
        reinit_(model, chosen, copies=[copy.deepcopy(model), nn.Sequential()])
    other = nn.Sequential(nn.Linear(6, 17), nn.ReLU(), nn.Linear(17, 12), nn.ReLU())
    other.append(nn.Linear(12, 3))
    with pytest.raises(
        InputError, match=r"has shape \(17, 6\), expected \(16, 6\) as in the model"
    ):
        reinit_(model, chosen, copies=[other])
    assert all(map(torch.equal, before.values(), model.state_dict().values()))


def test_model_optimizer_and_copies_are_as_before_when_a_copy_fails(monkeypatch) -> None:
    model = mlp()
    batches = batch_of(model)
    optimizer = torch.optim.Adam(model.parameters())
    model(batches[0][0]).sum().backward()
    optimizer.step()
    copies = [copy.deepcopy(model), copy.deepcopy(model)]
    seen = profile(model, batches)
    chosen = plan(seen, ratio=0.4)
    means = {layer.name: layer.stats.mean_h + 1 for layer in seen.layers}
    everything = [model.state_dict(), *(own.state_dict() for own in copies)]
    before = copy.deepcopy([*everything, optimizer.state_dict()["state"]])
    kept = Undo.keep_place
    calls = []

    def fail_late(self: Undo, tensor: Tensor, where: object) -> object:
        calls.append(tensor)
        if any(tensor.data_ptr() == p.data_ptr() for p in copies[1].parameters()):
            raise MemoryError
        return kept(self, tensor, where)

    monkeypatch.setattr(Undo, "keep_place", fail_late)
    with pytest.raises(MemoryError):
        reinit_(model, chosen, compensate=means, copies=copies, optimizer=optimizer)
    assert calls
    for now, then in zip([*everything], before, strict=False):
        assert all(map(torch.equal, now.values(), then.values()))
    for now, then in zip(
        optimizer.state_dict()["state"].values(), before[-1].values(), strict=True
    ):
        assert all(map(torch.equal, now.values(), then.values()))
