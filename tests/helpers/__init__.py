"""What several test files share: models, and the two properties that prove a graph right.

(a) Zeroing the outgoing columns of units gives the same output as forcing their activation to zero.
(b) With outgoing columns at zero, the output does not depend on the incoming weights.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from fastplastic.graph import build_graph
from fastplastic.kernels.dispatch import kernel_of
from fastplastic.model import fingerprint
from fastplastic.planning import Plan, Request
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
    "hgnetv2_b0", "poolformerv2_s12", "mobileone_s0", "repvgg_a0",
]  # fmt: skip

# Fewer blocks of the same kinds: most of the time goes into tracing one after another.
SHORTER: dict[str, dict[str, Any]] = {
    "swin_tiny_patch4_window7_224": {"depths": (2, 2, 2, 2)},
    "densenet121": {"block_config": (2, 3, 2, 2)},
    "hiera_tiny_224": {"stages": (1, 2, 2, 1)},
    "vit_tiny_patch16_dinov3_qkvb": {"depth": 3},
    "deit_tiny_patch16_224": {"depth": 3},
    "vit_tiny_r_s16_p8_224": {"depth": 3},
    "levit_128s": {"depth": (1, 1, 2)},
    "tiny_vit_5m_224": {"depths": (1, 1, 2, 1)},
    "fastvit_t8": {"layers": (1, 1, 2, 1)},
    "pvt_v2_b0": {"depths": (1, 1, 1, 1)},
    "pit_ti_224": {"depth": (1, 2, 1)},
    "inception_next_atto": {"depths": (1, 1, 2, 1)},
    "repvit_m1": {"depth": (1, 1, 3, 1)},
    "fasternet_t0": {"depths": (1, 1, 2, 1)},
}


class Net(nn.Module):
    """A model from named layers and a forward function of (self, x)."""

    def __init__(self, forward, **layers: nn.Module) -> None:
        super().__init__()
        self._forward = forward
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(self, x)


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

    def force_to_zero(self, at_consumers: bool) -> tuple[Tensor, int]:
        """Return the output with the chosen activations forced to zero where they are made.

        Or where they are read, where a constant is added in between: it goes with the column.
        """
        hooks = []
        for layer, rows in self.rows:
            if not layer.consumers:
                continue
            if not at_consumers and self._made_at(layer):
                hooks += self._force_at_sites(layer, rows, 0.0)
                continue
            for consumer in layer.consumers:
                module = self.model.get_submodule(consumer.name)
                if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
                    self._zero_values(layer, rows)
                    continue
                axis = 1 if isinstance(module, nn.modules.conv._ConvNd) else -1
                gone = torch.isin(consumer.unit_of_column, rows)
                hooks.append(self._force(consumer.name, "input", axis, gone, 0.0))
        forced = output(self.model, self.x)
        for hook in hooks:
            hook.remove()
        self.restore()
        return forced, len(hooks)

    def force_to_anything(self) -> Tensor:
        """Return the output with the chosen activations forced to a number where they are made."""
        hooks = []
        for layer, rows in self.rows:
            if self._made_at(layer):
                hooks += self._force_at_sites(layer, rows, 3.0)
        forced = output(self.model, self.x)
        for hook in hooks:
            hook.remove()
        return forced

    def _made_at(self, layer: UnitLayer) -> bool:
        """Tell whether hooks see the activations of all units of the layer where they are made."""
        # Behind a norm of the consumer's own, zero here is not zero at the column.
        own_norms = {norm.name for norm in layer.norms} <= {layer.norm}
        seen = [site for site in layer.g_sites if site.where in ("input", "output")]
        return own_norms and len(seen) == 1 and bool((seen[0].unit_of_channel >= 0).all())

    def _force_at_sites(self, layer: UnitLayer, rows: Tensor, number: float) -> list[Any]:
        return [
            self._force(
                site.module, site.where, site.unit_axis,
                torch.isin(site.unit_of_channel, rows), number,
            )
            for site in layer.g_sites
        ]  # fmt: skip

    def _zero_values(self, layer: UnitLayer, rows: Tensor) -> None:
        """Zero attention values by their rows: nn.MultiheadAttention runs no module to hook."""
        assert layer.bias is not None
        self.model.get_parameter(layer.weight).data[rows] = 0
        self.model.get_parameter(layer.bias).data[rows] = 0

    def _force(self, name: str, where: str, axis: int, gone: Tensor, number: float) -> Any:
        def masked(x: Tensor) -> Tensor:
            shape = [1] * x.dim()
            shape[axis] = -1
            return x.masked_fill(gone.reshape(shape), number)

        module = self.model.get_submodule(name)
        if where == "output":
            return module.register_forward_hook(lambda _m, _i, out: masked(out))
        return module.register_forward_pre_hook(lambda _m, args: (masked(args[0]), *args[1:]))


def check_wiring(model: nn.Module, x: Any, at_consumers: bool = False) -> Case:
    """Assert both properties for a model; return the case, in the state it was in before."""
    case = Case(model, x)
    assert case.rows
    plain = output(case.model, x)
    forced, n_forced = case.force_to_zero(at_consumers)
    zeroed = case.zero_columns()
    anything = case.force_to_anything()
    scale = zeroed.abs().max()
    assert torch.isfinite(plain).all() and n_forced > 0
    assert (plain - zeroed).abs().max() > 1e-6 * scale, "the chosen units have no effect"
    assert (forced - zeroed).abs().max() <= 1e-9 * scale, (
        "(a) zeroed columns are not a zero activation"
    )
    assert (anything - zeroed).abs().max() <= 1e-9 * scale, (
        "(a) behind zeroed columns, the activation still counts"
    )
    randomised = case.randomise_rows()
    assert (randomised - zeroed).abs().max() <= 1e-9 * scale, "(b) the output depends on reset rows"
    case.restore()
    assert (case.randomise_rows() - plain).abs().max() > 1e-6 * scale, (
        "the rows have no effect at all"
    )
    case.restore()
    return case


class Twins:
    """The kernels of one backend by their names, loaded when first needed."""

    def __init__(self, backend: str) -> None:
        self._backend = backend

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return kernel_of(self._backend, name)


REFERENCE, NUMBA, TRITON = Twins("pytorch"), Twins("numba"), Twins("triton")


def made_plan(**values: Any) -> Plan:
    """Return a plan; values of its request are given by their own names."""
    request = {
        "criterion": "dead", "ratio": 0.1, "threshold": None, "granularity": "unit",
        "scope": "global", "max_layer_fraction": 0.5, "seed": 0,
    }  # fmt: skip
    names = {item.name for item in fields(Request)}
    request |= {name: value for name, value in values.items() if name in names}
    others = {name: value for name, value in values.items() if name not in names}
    return Plan(Request(**request), **{"units": {}, "scores": {}, "eligible": 10_000} | others)


def plan_of_units(
    model: nn.Module, layers: Iterable[UnitLayer], units: Mapping[str, Sequence[int]]
) -> Plan:
    """Return a plan that takes these units of a model."""
    index = {name: torch.tensor(chosen, dtype=torch.int64) for name, chosen in units.items()}
    scores = {name: torch.zeros(len(chosen)) for name, chosen in index.items()}
    wiring = {layer.name: layer for layer in layers}
    return made_plan(units=index, scores=scores, wiring=wiring, fingerprint=fingerprint(model))
