"""What a forward pass sets on modules is put back: the model can be copied and pickled."""

import copy
import pickle

import pytest
import timm
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from fastplastic import Monitor, plan, profile, reinit_


def small_batches(size=6):
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(4, size, generator=generator), torch.randint(0, 3, (4,), generator=generator))
        for _ in range(2)
    ]


class Caching(nn.Module):
    """Remembers in every way in which a module can."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)
        self.calls = 0
        self.cache: dict[str, list[torch.Tensor]] = {"outputs": []}
        self.nested = ({"deep": set()},)
        self.total = torch.zeros(())

    def forward(self, x):
        self.calls += 1
        h = torch.relu(self.first(x))
        self.latest = h
        self.cache["outputs"].append(h)
        self.cache["more"] = [h]
        self.nested[0]["deep"].add(self.calls)
        if not isinstance(h, torch._subclasses.FakeTensor):
            self.total.add_(h.detach().sum())
        return self.last(h)


def assert_fresh(model):
    assert model.calls == 0
    assert model.cache == {"outputs": []}
    assert model.nested == ({"deep": set()},)
    assert not hasattr(model, "latest")
    assert model.total == 0
    copy.deepcopy(model)
    pickle.dumps(model)


def test_a_model_that_caches_attention_biases_can_be_copied():
    """More of them are copied in test_families.py."""
    model = timm.create_model("efficientformer_l1", num_classes=3).eval()
    batches = [(torch.randn(1, 3, 224, 224), torch.tensor([1]))]
    profile(model, batches)
    twin = copy.deepcopy(model)
    cross_entropy(model.train()(batches[0][0].repeat(2, 1, 1, 1)), torch.tensor([1, 1])).backward()
    assert twin.state_dict().keys() == model.state_dict().keys()


def test_profile_puts_back_what_a_forward_pass_sets():
    model = Caching().eval()
    profile(model, small_batches())
    assert_fresh(model)


def test_reinit_puts_back_what_its_loss_sets():
    model = Caching().eval()
    batches = small_batches()
    chosen = plan(profile(model, batches), ratio=0.3)
    reinit_(model, chosen, batches=batches)
    assert_fresh(model)


def test_what_was_there_stays_the_same_object():
    model = Caching().eval()
    model(small_batches()[0][0])
    cache, outputs, total = model.cache, model.cache["outputs"], model.total.clone()
    profile(model, small_batches())
    assert model.calls == 1 and model.total == total
    assert model.cache is cache and model.cache["outputs"] is outputs
    assert len(outputs) == 1


def test_after_an_error_everything_is_back():
    def fails(output, targets):
        raise RuntimeError("no loss")

    model = Caching().eval()
    with pytest.raises(RuntimeError, match="no loss"):
        profile(model, small_batches(), loss_fn=fails)
    assert_fresh(model)


def test_hooks_that_a_user_adds_meanwhile_stay():
    model = Caching().eval()
    seen = []

    def once(module, args, output):
        if not isinstance(output, torch._subclasses.FakeTensor):
            first.remove()
            model.last.register_forward_hook(lambda *_: seen.append(1))

    first = model.first.register_forward_hook(once)
    profile(model, small_batches())
    assert not model.first._forward_hooks
    del seen[:]
    model(small_batches()[0][0])
    assert len(seen) == 1


def test_a_monitor_rolls_nothing_back():
    model = Caching().train()
    batches = small_batches()
    monitor = Monitor(model, batches[0][0])
    assert_fresh(model)
    with monitor:
        for inputs, targets in batches:
            cross_entropy(model(inputs), targets).backward()
    assert model.calls == 2
    assert len(model.cache["outputs"]) == 2
    assert model.total > 0
