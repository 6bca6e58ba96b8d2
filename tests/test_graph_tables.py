"""What the unit graph of well-known models must say, written down by hand from their papers."""

import re

import pytest
import timm
import torch

from fastplastic.graph import build_graph

# A row: pattern of layer names, their units, their activation function, their hidden units.
Row = tuple[str, int, str, int]


def hidden(pattern: str, units: int, activation: str) -> Row:
    return pattern, units, activation, units


def stream(pattern: str, units: int, activation: str = "identity") -> Row:
    return pattern, units, activation, 0


RESNET18 = [
    stream("conv1", 64, "relu"),
    *(
        row
        for stage, width in ((1, 64), (2, 128), (3, 256), (4, 512))
        for row in (
            hidden(rf"layer{stage}\.[01]\.conv1", width, "relu"),
            stream(rf"layer{stage}\.[01]\.conv2", width),
            *([stream(rf"layer{stage}\.0\.downsample\.0", width)] if stage > 1 else []),
        )
    ),
    stream("fc", 1000),
]
RESNET50 = [
    # A convolution stands in the first shortcut, so that nothing sums the stem itself.
    hidden("conv1", 64, "relu"),
    *(
        row
        for stage, width, last in ((1, 64, 2), (2, 128, 3), (3, 256, 5), (4, 512, 2))
        for row in (
            hidden(rf"layer{stage}\.[0-{last}]\.conv[12]", width, "relu"),
            stream(rf"layer{stage}\.[0-{last}]\.conv3", 4 * width),
            stream(rf"layer{stage}\.0\.downsample\.0", 4 * width),
        )
    ),
    stream("fc", 1000),
]
VIT_TINY = [
    stream(r"patch_embed\.proj", 192),
    (r"blocks\.\d+\.attn\.qkv", 576, "identity", 192),
    stream(r"blocks\.\d+\.attn\.proj", 192),
    hidden(r"blocks\.\d+\.mlp\.fc1", 768, "gelu"),
    stream(r"blocks\.\d+\.mlp\.fc2", 192),
    stream("head", 1000),
]
CONVNEXT_TINY = [
    stream(r"stem\.0", 96),
    *(
        row
        for stage, width in enumerate((96, 192, 384, 768))
        for row in (
            stream(rf"stages\.{stage}\.downsample\.1", width),
            stream(rf"stages\.{stage}\.blocks\.\d\.conv_dw", width),
            hidden(rf"stages\.{stage}\.blocks\.\d\.mlp\.fc1", 4 * width, "gelu"),
            stream(rf"stages\.{stage}\.blocks\.\d\.mlp\.fc2", width),
        )
        if not row[0].startswith(r"stages\.0\.downsample")
    ),
    stream(r"head\.fc", 1000),
]


def inverted_residual(
    block: str, expanded: int, out: Row, activation: str, squeezed: int = 0
) -> list[Row]:
    block = block.replace(".", r"\.")
    excite = [
        hidden(rf"{block}\.se\.conv_reduce", squeezed, "relu"),
        stream(rf"{block}\.se\.conv_expand", expanded, "hardsigmoid"),
    ]
    return [
        hidden(rf"{block}\.conv_pw", expanded, activation),
        stream(rf"{block}\.conv_dw", expanded, activation),
        *(excite if squeezed else []),
        (rf"{block}\.conv_pwl", *out[1:]),
    ]


MOBILENETV3_SMALL = [
    # The stem is read by the first depthwise filter only; no skip goes round the first block.
    hidden("conv_stem", 16, "hardswish"),
    stream(r"blocks\.0\.0\.conv_dw", 16, "relu"),
    hidden(r"blocks\.0\.0\.se\.conv_reduce", 8, "relu"),
    stream(r"blocks\.0\.0\.se\.conv_expand", 16, "hardsigmoid"),
    hidden(r"blocks\.0\.0\.conv_pw", 16, "identity"),
    *inverted_residual("blocks.1.0", 72, stream("", 24), "relu"),
    *inverted_residual("blocks.1.1", 88, stream("", 24), "relu"),
    *inverted_residual("blocks.2.0", 96, stream("", 40), "hardswish", 24),
    *inverted_residual("blocks.2.1", 240, stream("", 40), "hardswish", 64),
    *inverted_residual("blocks.2.2", 240, stream("", 40), "hardswish", 64),
    *inverted_residual("blocks.3.0", 120, stream("", 48), "hardswish", 32),
    *inverted_residual("blocks.3.1", 144, stream("", 48), "hardswish", 40),
    *inverted_residual("blocks.4.0", 288, stream("", 96), "hardswish", 72),
    *inverted_residual("blocks.4.1", 576, stream("", 96), "hardswish", 144),
    *inverted_residual("blocks.4.2", 576, stream("", 96), "hardswish", 144),
    hidden(r"blocks\.5\.0\.conv", 576, "hardswish"),
    hidden("conv_head", 1024, "hardswish"),
    stream("classifier", 1000),
]
LITE0_STAGES = (
    (1, (96, 144), 24), (2, (144, 240), 40), (3, (240, 480, 480), 80), (4, (480, 672, 672), 112),
    (5, (672, 1152, 1152, 1152), 192),
)  # fmt: skip
EFFICIENTNET_LITE0 = [
    hidden("conv_stem", 32, "relu6"),
    stream(r"blocks\.0\.0\.conv_dw", 32, "relu6"),
    hidden(r"blocks\.0\.0\.conv_pw", 16, "identity"),
    *(
        row
        for stage, expansions, out in LITE0_STAGES
        for block, expanded in enumerate(expansions)
        for row in inverted_residual(f"blocks.{stage}.{block}", expanded, stream("", out), "relu6")
    ),
    # One block alone in its stage, with other widths in and out: no skip.
    *inverted_residual("blocks.6.0", 1152, hidden("", 320, "identity"), "relu6"),
    hidden("conv_head", 1280, "relu6"),
    stream("classifier", 1000),
]
SWIN_TINY = [
    stream(r"patch_embed\.proj", 96),
    *(
        row
        for stage, width in enumerate((96, 192, 384, 768))
        for row in (
            (rf"layers\.{stage}\.blocks\.\d\.attn\.qkv", 3 * width, "identity", width),
            stream(rf"layers\.{stage}\.blocks\.\d\.attn\.proj", width),
            hidden(rf"layers\.{stage}\.blocks\.\d\.mlp\.fc1", 4 * width, "gelu"),
            stream(rf"layers\.{stage}\.blocks\.\d\.mlp\.fc2", width),
            *([stream(rf"layers\.{stage}\.downsample\.reduction", width)] if stage else []),
        )
    ),
    stream(r"head\.fc", 1000),
]
DENSENET121 = [
    hidden(r"features\.conv0", 64, "relu"),
    hidden(r"features\.denseblock\d\.denselayer\d+\.conv1", 128, "relu"),
    # Concatenated, and read by every later layer behind a norm of its own.
    hidden(r"features\.denseblock\d\.denselayer\d+\.conv2", 32, "relu"),
    hidden(r"features\.transition1\.conv", 128, "relu"),
    hidden(r"features\.transition2\.conv", 256, "relu"),
    hidden(r"features\.transition3\.conv", 512, "relu"),
    stream("classifier", 1000),
]
MIXER_S32 = [
    stream(r"stem\.proj", 512),
    hidden(r"blocks\.\d\.mlp_tokens\.fc1", 256, "gelu"),
    stream(r"blocks\.\d\.mlp_tokens\.fc2", 49),
    hidden(r"blocks\.\d\.mlp_channels\.fc1", 2048, "gelu"),
    stream(r"blocks\.\d\.mlp_channels\.fc2", 512),
    stream("head", 1000),
]
TABLES = {
    "resnet18": (RESNET18, 21), "resnet50": (RESNET50, 54), "vit_tiny_patch16_224": (VIT_TINY, 50),
    "convnext_tiny": (CONVNEXT_TINY, 59), "mobilenetv3_small_100": (MOBILENETV3_SMALL, 54),
    "tf_efficientnet_lite0": (EFFICIENTNET_LITE0, 50),
    "swin_tiny_patch4_window7_224": (SWIN_TINY, 53),
    "densenet121": (DENSENET121, 121), "mixer_s32_224": (MIXER_S32, 34),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_every_layer_is_as_written(name: str) -> None:
    table, n_layers = TABLES[name]
    model = timm.create_model(name, pretrained=False)
    graph = build_graph(model, torch.randn(1, *model.pretrained_cfg["input_size"]))
    assert graph.note is None and graph.skipped == ()
    assert len(graph.layers) == n_layers
    unused = {row[0] for row in table}
    for layer in graph.layers:
        rows = [row for row in table if re.fullmatch(row[0], layer.name)]
        assert len(rows) == 1, (layer.name, rows)
        pattern, units, activation, n_hidden = rows[0]
        unused.discard(pattern)
        found = (layer.n_units, layer.activation, int(layer.hidden.sum()))
        assert found == (units, activation, n_hidden), (layer.name, layer.reasons)
        assert layer.z_sites and layer.g_sites, layer.name
    assert not unused
