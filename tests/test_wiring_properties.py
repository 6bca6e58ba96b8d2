"""The two properties that prove a unit graph right, without a reference.

(a) Zeroing the outgoing columns of units gives the same output as forcing their activation to zero.
(b) With outgoing columns at zero, the output does not depend on the incoming weights.
"""

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from fastplastic.graph import build_graph
from fastplastic.wiring import UnitGraph, UnitLayer

# The smallest model of each timm family that runs quickly, and what is special about it.
FAMILIES = [
    "test_resnet", "test_byobnet", "test_mambaout", "fasternet_t0", "cs3darknet_focus_s",
    "cspnext_tiny", "resnetv2_18", "test_nfnet", "legacy_seresnet18", "regnetx_002", "test_vit",
    "inception_next_atto", "starnet_s050", "pit_ti_224", "lcnetv2_small", "test_coatnet",
    "test_convnext", "test_efficientnet", "resnest14d", "mobilenetv3_small_050", "levit_128s",
    "lowformer_b0", "cpubone_nano", "iformer_t", "mobilevit_xxs", "selecsls42", "hardcorenas_b",
    "test_vit_relpos", "fastvit_t8", "pvt_v2_b0", "ghostnet_050", "repghostnet_050",
    "vit_tiny_patch16_dinov3_qkvb", "vit_tiny_r_s16_p8_224", "ese_vovnet19b_slim_dw",
    "deit_tiny_patch16_224", "skresnet18", "hrnet_w18_small", "tiny_vit_5m_224", "dla46x_c",
    "nest_tiny", "rexnet_100", "edgenext_xx_small", "repvit_m1", "hiera_tiny_224",
    "gmlp_ti16_224", "swin_tiny_patch4_window7_224", "densenet121", "mixer_s32_224",
    "hgnetv2_b0", "poolformerv2_s12",
]  # fmt: skip
# Nothing here can be re-initialised: every MLP adds a constant behind its activation function.
NOTHING_HIDDEN = {"poolformerv2_s12"}


def wake(model: nn.Module) -> None:
    """Give zero-initialised norms, layer scales and biases values, so that every branch counts."""
    generator = torch.Generator().manual_seed(1)

    def draw(tensor: Tensor, low: float, high: float) -> None:
        drawn = torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype)
        tensor.copy_(low + (high - low) * drawn)

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                draw(parameter, -0.1, 0.1)
            elif parameter.dim() <= 1 or name.endswith(("gamma", "scale")):
                draw(parameter, 0.75, 1.25)
            elif not parameter.any():
                draw(parameter, -0.05, 0.05)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                draw(buffer, -0.1, 0.1)
            elif name.endswith("running_var"):
                draw(buffer, 0.5, 1.5)


def output(model: nn.Module, x: Any) -> Tensor:
    with torch.no_grad():
        out = model(**x) if isinstance(x, dict) else model(x)
    values = list(out.values()) if isinstance(out, dict) else [out]
    return torch.cat([item.flatten() for value in values for item in _tensors(value)])


def _tensors(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [t for item in value for t in _tensors(item)]


class Case:
    """A model in float64 with awake branches, its graph, and a random third of its hidden units."""

    def __init__(self, model: nn.Module, x: Any) -> None:
        self.model, self.x = model.double().eval(), x
        wake(self.model)
        self.graph: UnitGraph = build_graph(self.model, x)
        assert self.graph.note is None, self.graph.note
        self.state = {key: value.clone() for key, value in self.model.state_dict().items()}
        self.generator = torch.Generator().manual_seed(0)
        self.rows: list[tuple[UnitLayer, Tensor]] = []
        for layer in self.graph.layers:
            hidden = torch.nonzero(layer.hidden).flatten()
            chosen = hidden[torch.rand(len(hidden), generator=self.generator) < 0.35]
            if len(chosen):
                self.rows += [(layer, chosen), *self._coupled(layer, chosen)]

    def _coupled(self, layer: UnitLayer, units: Tensor) -> list[tuple[UnitLayer, Tensor]]:
        pairs = [(self.graph[c.name], c.row_of_unit[units]) for c in layer.coupled]
        return [(member, rows[rows >= 0]) for member, rows in pairs]

    def restore(self) -> None:
        self.model.load_state_dict(self.state)

    def zero_columns(self) -> Tensor:
        for layer, rows in self.rows:
            for consumer in layer.consumers:
                weight = self.model.get_parameter(consumer.weight).data.movedim(
                    consumer.column_dim, 1
                )
                per_group = len(consumer.unit_of_column) // consumer.groups
                by_group = weight.unflatten(0, (consumer.groups, -1))
                for column in (
                    torch.nonzero(torch.isin(consumer.unit_of_column, rows)).flatten().tolist()
                ):
                    by_group[column // per_group, :, column % per_group] = 0
        return output(self.model, self.x)

    def randomise_rows(self) -> Tensor:
        for layer, rows in self.rows:
            self._redraw(
                self.model.get_parameter(layer.weight).data.movedim(layer.unit_dim, 0), rows
            )
            if layer.bias is not None:
                self._redraw(self.model.get_parameter(layer.bias).data, rows)
            for norm in layer.norms:
                module = self.model.get_submodule(norm.name)
                channels = torch.nonzero(torch.isin(norm.unit_of_channel, rows)).flatten()
                for tensor in (module.weight, module.bias, module.running_mean):
                    if tensor is not None:
                        self._redraw(tensor.data, channels)
        return output(self.model, self.x)

    def _redraw(self, tensor: Tensor, rows: Tensor) -> None:
        shape = tensor[rows].shape
        tensor[rows] = 2 * torch.randn(shape, generator=self.generator, dtype=tensor.dtype)

    def force_to_zero(self) -> tuple[Tensor, int]:
        """Return the output with the chosen activations forced to zero where they are made."""
        hooks = []
        for layer, rows in self.rows:
            if not layer.consumers:
                continue
            # Behind a norm of the consumer's own (DenseNet), zero here is not zero at the column.
            own_norms = {norm.name for norm in layer.norms} <= {layer.norm}
            if layer.g_site is not None and own_norms and (layer.g_site.unit_of_channel >= 0).all():
                site = layer.g_site
                gone = torch.isin(site.unit_of_channel, rows)
                hooks.append(self._force(site.module, site.where, site.unit_axis, gone))
                continue
            for consumer in layer.consumers:
                module = self.model.get_submodule(consumer.name)
                if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
                    self._zero_values(layer, rows)
                    continue
                axis = 1 if isinstance(module, nn.modules.conv._ConvNd) else -1
                gone = torch.isin(consumer.unit_of_column, rows)
                hooks.append(self._force(consumer.name, "input", axis, gone))
        forced = output(self.model, self.x)
        for hook in hooks:
            hook.remove()
        self.restore()
        return forced, len(hooks)

    def _zero_values(self, layer: UnitLayer, rows: Tensor) -> None:
        """Zero attention values by their rows: nn.MultiheadAttention runs no module to hook."""
        assert layer.activation == "identity" and layer.bias is not None
        self.model.get_parameter(layer.weight).data[rows] = 0
        self.model.get_parameter(layer.bias).data[rows] = 0

    def _force(self, name: str, where: str, axis: int, gone: Tensor) -> Any:
        def masked(x: Tensor) -> Tensor:
            shape = [1] * x.dim()
            shape[axis] = -1
            return x.masked_fill(gone.reshape(shape), 0)

        module = self.model.get_submodule(name)
        if where == "output":
            return module.register_forward_hook(lambda _m, _i, out: masked(out))
        return module.register_forward_pre_hook(lambda _m, args: (masked(args[0]), *args[1:]))


def check(model: nn.Module, x: Any, anything_hidden: bool = True) -> None:
    case = Case(model, x)
    assert bool(case.rows) == anything_hidden
    if not anything_hidden:
        return
    plain = output(case.model, x)
    forced, n_forced = case.force_to_zero()
    zeroed = case.zero_columns()
    scale = zeroed.abs().max()
    assert torch.isfinite(plain).all() and n_forced > 0
    assert (plain - zeroed).abs().max() > 1e-6 * scale, "the chosen units have no effect"
    assert (forced - zeroed).abs().max() <= 1e-9 * scale, (
        "(a) zeroed columns are not a zero activation"
    )
    randomised = case.randomise_rows()
    assert (randomised - zeroed).abs().max() <= 1e-9 * scale, "(b) the output depends on reset rows"
    case.restore()
    assert (case.randomise_rows() - plain).abs().max() > 1e-6 * scale, (
        "the rows have no effect at all"
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_timm_family(name: str) -> None:
    model = timm.create_model(name, pretrained=False)
    size = model.pretrained_cfg["input_size"]
    check(model, torch.randn(1, *size, dtype=torch.double), name not in NOTHING_HIDDEN)


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
    check(model, torch.randn(2, 5, 16, dtype=torch.double))
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
    check(model, inputs)
    graph = build_graph(model, inputs)
    assert {name: int(graph[name].hidden.sum()) for name in hidden} == hidden
    assert all(graph[name].z_site is not None for name in hidden)
    # Decoders return a cache unless they are asked not to.
    del inputs["use_cache"]
    assert build_graph(model, inputs).note is None
