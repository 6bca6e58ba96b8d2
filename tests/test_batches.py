"""The forms of batches, outputs and losses that `profile` takes."""

from typing import NamedTuple

import pytest
import torch
import transformers
from helpers.profiled import Net, data, net
from torch import nn
from torch.nn.functional import cross_entropy

from fastplastic import plan, profile, reinit_
from fastplastic.errors import InputError


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
