"""The two properties that prove a unit graph right, for transformers: see `helpers`."""

from collections.abc import Callable

import pytest
import torch
from helpers import check_wiring
from torch import nn

from fastplastic.graph import build_graph


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("norm_first", [False, True])
def test_torch_transformer_encoder(
    activation: str, norm_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The fused inference path calls no modules, so that nothing could be forced.
    monkeypatch.setattr(torch.backends.mha, "_is_fastpath_enabled", False)
    block = nn.TransformerEncoderLayer(
        16, 2, 32, activation=activation, batch_first=True, norm_first=norm_first
    )
    model = nn.Sequential(
        nn.TransformerEncoder(block, 2, enable_nested_tensor=False), nn.Linear(16, 3)
    )
    check_wiring(model, torch.randn(2, 5, 16, dtype=torch.double))
    graph = build_graph(model, torch.randn(2, 5, 16, dtype=torch.double))
    assert graph["0.layers.0.linear1"].hidden.all()
    assert graph["0.layers.0.linear1"].activation == activation
    in_proj = graph["0.layers.0.self_attn.in_proj"]
    assert in_proj.hidden.tolist() == [False] * 32 + [True] * 16


def _bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(
        BertConfig(
            vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=24,            max_position_embeddings=20, num_labels=3,
        )
    )  # fmt: skip


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2ForSequenceClassification

    return GPT2ForSequenceClassification(
        GPT2Config(
            vocab_size=50,
            n_embd=16,
            n_layer=2,
            n_head=2,
            n_positions=20,
            num_labels=3,
            pad_token_id=0,
        )
    )


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
            num_attention_heads=4,            num_key_value_heads=2, max_position_embeddings=20,
        )
    )  # fmt: skip


@pytest.mark.parametrize(
    ("build", "hidden"),
    [
        (
            _bert,
            {
                "bert.encoder.layer.1.intermediate.dense": 24,
                "bert.encoder.layer.0.attention.self.value": 16,
            },
        ),
        (_gpt2, {"transformer.h.0.mlp.c_fc": 64, "transformer.h.1.attn.c_attn": 16}),
        (_llama, {"model.layers.0.mlp.gate_proj": 24, "model.layers.1.self_attn.v_proj": 8}),
    ],
)  # fmt: skip
def test_hugging_face_model(build: Callable[[], nn.Module], hidden: dict[str, int]) -> None:
    model = build()
    tokens = torch.randint(1, 50, (2, 7))
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "use_cache": False}
    check_wiring(model, inputs)
    graph = build_graph(model, inputs)
    assert {name: int(graph[name].hidden.sum()) for name in hidden} == hidden
    assert all(graph[name].z_sites for name in hidden)
    # Decoders return a cache unless they are asked not to.
    del inputs["use_cache"]
    assert build_graph(model, inputs).note is None
