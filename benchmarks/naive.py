"""What one would write without kernels: eager hooks, one torch operation per statistic."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastplastic.graph import build_graph


def activation_stats(z: Tensor, axis: int, f: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Return the statistics of `kernels.activation_stats`, each by an operation of its own."""
    dims = [d for d in range(z.ndim) if d != axis % z.ndim]
    h = f(z)
    return [
        h.isfinite().sum(dims), h.sum(dims), h.abs().sum(dims), (h * h).sum(dims), h.amin(dims),
        h.amax(dims), (h == 0).sum(dims), (z <= 0).sum(dims), (~h.isfinite()).sum(dims),
    ]  # fmt: skip


def gradient_stats(g: Tensor, axis: int) -> list[Tensor]:
    """Return the statistics of `kernels.gradient_stats`."""
    dims = [d for d in range(g.ndim) if d != axis % g.ndim]
    return [
        g.isfinite().sum(dims), g.abs().sum(dims), (g * g).sum(dims), (~g.isfinite()).sum(dims),
    ]  # fmt: skip


def parameter_stats(w: Tensor, dw: Tensor) -> list[Tensor]:
    """Return row and column sums of one weight."""
    found = []
    for dims in ([d for d in range(w.ndim) if d != 0], [d for d in range(w.ndim) if d != 1]):
        found += [
            w.abs().sum(dims), (w * w).sum(dims), dw.abs().sum(dims), (dw * dw).sum(dims),
            (w * dw).abs().sum(dims), (w * dw).sum(dims),
        ]  # fmt: skip
    return found


class NaiveMonitor:
    """Hooks at the same places as those of `fastplastic.Monitor`."""

    def __init__(self, model: nn.Module, example: Any) -> None:
        self.model = model
        self.graph = build_graph(model, example)
        self.seen: list[list[Tensor]] = []
        self.handles: list[Any] = []

    def __enter__(self) -> "NaiveMonitor":
        for layer in self.graph.layers:
            sites = [(site, True) for site in layer.z_sites]
            for site, activations in [*sites, *((site, False) for site in layer.g_sites)]:
                module = self.model.get_submodule(site.module)
                hook = self._hook(site.unit_axis, layer.activation, activations)
                if site.where == "output":
                    self.handles.append(
                        module.register_forward_hook(lambda _, __, out, hook=hook: hook(out))
                    )
                else:
                    self.handles.append(
                        module.register_forward_pre_hook(lambda _, args, hook=hook: hook(args[0]))
                    )
        for weight in {id(w): w for w in self.model.parameters() if w.ndim > 1}.values():
            self.handles.append(
                weight.register_hook(
                    lambda dw, w=weight: self.seen.append(parameter_stats(w.detach(), dw))
                )
            )
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _hook(self, axis: int, activation: str, activations: bool) -> Callable[[Tensor], None]:
        functions = {"relu": torch.relu, "gelu": nn.functional.gelu, "silu": nn.functional.silu}
        f = functions.get(activation, lambda z: z)

        def hook(tensor: Tensor) -> None:
            if activations:
                with torch.no_grad():
                    self.seen.append(activation_stats(tensor.detach(), axis, f))
            elif tensor.requires_grad:
                tensor.register_hook(lambda g: self.seen.append(gradient_stats(g, axis)))

        return hook
