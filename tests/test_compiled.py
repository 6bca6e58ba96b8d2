"""What compiled steps measure: no graph break, and the statistics of eager steps."""

import copy

import pytest
import timm
import torch
from helpers.compiling import WARNINGS, WAYS, Block, compiled, eager, graphs, nothing_compiled
from helpers.monitored import by_hand, close, inputs, like, net, step
from torch import nn
from torch._dynamo.utils import counters

from fastplastic import Monitor
from fastplastic.kernels import activation_stats, gradient_stats
from fastplastic.measure.operators import add_activations, add_gradients

__all__ = ["nothing_compiled"]
pytestmark = WARNINGS


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operators(dtype, masked):
    x = torch.randn(3, 5, 7).to(dtype)
    mask = torch.tensor([[1] * 5, [1, 1, 0, 0, 0], [0, 1, 1, 1, 0]]) if masked else None
    kept = x[mask.bool()] if masked else x.flatten(0, 1)
    h, g = torch.zeros(9, 12, dtype=torch.float64), torch.zeros(4, 12, dtype=torch.float64)
    add_activations(x, -1, 2, 6, "gelu", h, 3, mask)
    add_gradients(x, 2, g, 4, mask)
    expected = activation_stats(kept[:, 2:6], 1, "gelu")
    # The table begins with zeros, of which the minima and maxima are taken too.
    expected[4].clamp_(max=0)
    expected[5].clamp_(min=0)
    like(h[:, 3:7], expected)
    like(g[:, 4:11], gradient_stats(kept, 1))
    assert not h[:, [0, 1, 2, 7, 8, 9, 10, 11]].any() and not g[:, [0, 1, 2, 3, 11]].any()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_operators_are_what_torch_expects(layout, masked):
    x = torch.randn(2, 6, 4, 4).to(memory_format=layout)
    mask = torch.tensor([[1, 1], [1, 0]]) if masked else None
    h, g = torch.zeros(9, 8, dtype=torch.float64), torch.zeros(4, 8, dtype=torch.float64)
    torch.library.opcheck(add_activations, (x, 1, 0, 6, "relu", h, 1, mask))
    torch.library.opcheck(add_gradients, (x, 1, g, 2, mask))


@pytest.mark.parametrize(
    ("backend", "way"),
    [("eager", "wrapped"), *(("aot_eager", way) for way in WAYS), ("inductor", "wrapped")],
)
def test_one_graph_holds_the_statistics(backend, way):
    model = net()
    with Monitor(model, inputs(9, 2)) as monitor:
        function = compiled(model, way, backend=backend)
        for seed in (1, 2):
            step(function, seed)
        assert graphs() == 1 and not counters["graph_break"]
    profile = monitor.compute()
    assert (profile.batches, profile.samples, profile.mode) == (2, 32, "eval")
    close(profile, by_hand(eager(model), [1, 2]))


def test_calls_are_counted_inside_of_a_graph():
    """With a padding mask, and modules in both modes; another model was compiled before."""
    compiled(Block())(inputs(1))
    model, batch = bert()
    model.train().bert.pooler.eval()

    def logits(input_ids, attention_mask):
        return model(input_ids=input_ids, attention_mask=attention_mask).logits

    tables = []
    for function in (torch.compile(logits, backend="aot_eager", fullgraph=True), logits):
        with Monitor(model, batch) as monitor:
            for _ in range(2):
                function(**batch).square().mean().backward()
        profile = monitor.compute()
        assert (profile.batches, profile.samples, profile.mode) == (2, 8, "mixed")
        assert any("padding" in note for note in profile.notes)
        tables.append({layer.name: layer.stats.table for layer in profile.layers})
    close(profile, tables[0])


@pytest.mark.parametrize("recompute", [False, True])
def test_checkpointing_inside_of_a_graph(recompute):
    model = net(recompute=recompute)
    with Monitor(model, inputs(9, 2)) as monitor:
        function = compiled(model)
        for seed in (1, 2):
            step(function, seed)
        assert graphs() == 1 and not counters["graph_break"]
    close(monitor.compute(), by_hand(model, [1, 2]))


def test_loss_scale():
    model = net()
    with Monitor(model, inputs(9, 2), grad_scale=1024.0) as monitor:
        function = compiled(model)
        step(function, 1, scale=1024.0)
        step(function, 2, scale=1024.0)
        step(function, 3, scale=float("inf"))
    profile = monitor.compute()
    for name, table in by_hand(model, [1, 2]).items():
        like(profile[name].stats.table[9:13], table[9:13])


def test_pause_and_detach():
    model = net()
    monitor = Monitor(model, inputs(9, 2))
    with monitor:
        function = compiled(model)
        step(function, 1)
        with monitor.pause():
            step(function, 2)
        step(function, 3)
    assert graphs() == 2
    step(function, 4)
    step(function, 5)
    assert graphs() == 3
    close(monitor.compute(), by_hand(model, [1, 3]))


def test_tables_stay_where_they_are():
    """CUDA graphs write to the addresses that they were recorded with."""
    model = net()
    with Monitor(model, inputs(9, 2)) as monitor:
        (sums,) = (reader.sums for reader in monitor._observer._readers)
        for table in (sums.activations, sums.gradients):
            assert table._dynamo_static_input_type == "unguarded"
        function = compiled(model)
        addresses = []
        for seed in range(3):
            step(function, seed)
            monitor.compute()
            monitor.reset()
            (sums,) = (reader.sums for reader in monitor._observer._readers)
            tables = (sums.activations, sums.gradients)
            addresses.append([table.data_ptr() for table in tables])
        assert graphs() == 1
    assert addresses[0] == addresses[1] == addresses[2]


def resnet():
    """ResNet-18."""
    model = timm.create_model("resnet18", num_classes=5)
    return model.train(), {"x": torch.randn(4, 3, 32, 32)}


def vit():
    """ViT-Ti with one block."""
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=5)
    return model.train(), {"x": torch.randn(4, 3, 32, 32)}


def bert():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=16, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    mask = torch.ones(4, 8, dtype=torch.int64)
    mask[1:, 5:] = 0
    ids = torch.randint(40, (4, 8))
    return (
        transformers.BertForSequenceClassification(config).train(),
        {"input_ids": ids, "attention_mask": mask},
    )


def train(model, function, batch):
    out = function(*batch.values()) if "x" in batch else function(**batch)
    getattr(out, "logits", out).square().mean().backward()
    return [parameter.grad for parameter in model.parameters()]


# What the compiler of inductor takes its time for is timed, on whole models, by a benchmark.
@pytest.mark.parametrize(
    ("build", "backend"), [(resnet, "aot_eager"), (vit, "inductor"), (bert, "aot_eager")]
)
def test_compiled_steps_have_the_statistics_of_eager_ones(build, backend):
    torch.manual_seed(0)
    model, batch = build()
    # In float64 the compiler's order of operations does not show.
    model = model.double()
    batch = {key: x.double() if x.is_floating_point() else x for key, x in batch.items()}
    twin = copy.deepcopy(model)
    example = tuple(batch.values()) if "x" in batch else batch
    found = []
    for each, function in ((model, compiled(model, backend=backend)), (twin, twin)):
        with Monitor(each, example) as monitor:
            gradients = train(each, function, batch)
        found.append((monitor.compute(), gradients))
    assert graphs() == 1 and not counters["graph_break"]
    (mine, gradients), (expected, others) = found
    torch.testing.assert_close(gradients, others)
    assert mine.coverage == expected.coverage and mine.mode == expected.mode
    assert mine.samples == expected.samples
    for layer in expected.layers:
        like(mine[layer.name].stats.table, layer.stats.table)


def test_gradients_are_those_without_a_monitor():
    """Compiled code gives gradients of convolutions channels last; `.grad` lies as the weight."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Conv2d(6, 3, 3), nn.Flatten())
    x = torch.randn(2, 4, 8, 8).to(memory_format=torch.channels_last)
    twin = copy.deepcopy(model)
    seen = []
    model[0].weight.register_hook(lambda gradient: seen.append(gradient.stride()))
    with Monitor(model, x) as monitor:
        for _ in range(2):
            model(x).square().mean().backward()
            twin(x).square().mean().backward()
    assert seen[0] != model[0].weight.stride()
    for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine.grad, other.grad) and mine.grad.stride() == other.grad.stride()
    stats = monitor.compute()["0"].stats
    torch.testing.assert_close(
        stats["sum_abs_dw"], twin[0].weight.grad.double().abs().sum((1, 2, 3)), rtol=1e-5, atol=0
    )


def test_a_graph_of_gradients_stays_whole():
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Tanh(), nn.Conv2d(6, 3, 3), nn.Flatten())
    x = torch.randn(2, 4, 8, 8).to(memory_format=torch.channels_last)
    with Monitor(model, x):
        (slope,) = torch.autograd.grad(model(x).square().mean(), model[0].weight, create_graph=True)
        slope.square().sum().backward()
    assert model[2].weight.grad.any()
