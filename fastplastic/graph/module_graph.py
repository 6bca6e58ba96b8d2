"""The unit graph of a model that cannot be traced: what its modules show when it runs once.

Hooks on all modules, and a look at every operator, tell what reads the output of a weight layer.
Where that is a module that is one activation function, or the next weight layer, the units are
measured. Where it is anything else the activation function is unknown: to guess one would call
live units dead.
"""

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastplastic.graph.module_run import Call, Seen, Watch, run_once, weight_modules
from fastplastic.wiring import Site, UnitGraph, UnitLayer, is_conv1d

Trace = Callable[[nn.Module, Tensor], UnitGraph]

_UNTRACED = "the model could not be traced"
_NOT_CALLED = "this module was not called"
_NO_FUNCTION = "no activation module reads its output"
_SEVERAL = "its output is read in several ways"
_NO_HOOK = "no hook can see its pre-activation"


def module_graph(model: nn.Module, example_inputs: Any, reason: str, trace: Trace) -> UnitGraph:
    """Return the weight layers by their modules: measured where that is safe, never resettable.

    Args:
        model: Any module. It runs once, in the mode it is in but with norms and dropouts in eval
            mode, and is left as found.
        example_inputs: A tensor, a tuple of positional or a mapping of keyword arguments.
        reason: Why the model could not be traced.
        trace: Returns the unit graph of a small model by tracing: `build_graph`. It tells which
            activation function a module is.
    """
    watch, failed = Watch(), ""
    try:
        # A probe that could not be traced ends up here, too: no function that is known.
        if not isinstance(model, _Probe):
            watch = run_once(model, example_inputs)
    except Exception as error:  # models raise what they like
        text = (str(error).strip().splitlines() or [""])[0][:200]
        failed = f"running it failed ({type(error).__name__}: {text})"
    finder = _Finder(watch, _Functions(trace), failed)
    layers = _unit_layers(model, finder)
    return UnitGraph(layers, (), f"{_UNTRACED} ({reason})")


class _Probe(nn.Sequential):
    """A module between two small layers."""


class _Functions:
    """Tells which activation function a module is, by the rules that read traced models."""

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self._known: dict[Any, str] = {}

    def name(self, module: nn.Module, ndim: int, axis: int) -> str:
        """Return the name of the function of a module, or "unknown".

        Args:
            module: The module.
            ndim: Number of dimensions of its input.
            axis: Which of them runs over units, counted from the end.
        """
        # Modules of one class with equal attributes do the same. Hooks are in dicts: no key.
        own = (x for x in vars(module).items() if not isinstance(x[1], (dict, set)) or x[1])
        key: Any = (type(module), ndim, axis, *own)
        try:
            hash(key)
        except TypeError:
            key = id(module), ndim, axis
        if key not in self._known:
            self._known[key] = self._find(module, ndim, axis)
        return self._known[key]

    def _find(self, module: nn.Module, ndim: int, axis: int) -> str:
        """Trace the module between two layers: it is a function if z and h are its two sides."""
        try:
            # On the CPU whatever the default is: only its random numbers are put back.
            with torch.random.fork_rng([]), torch.device("cpu"):
                first, second = _small_layer(axis), _small_layer(axis)
                probe = _Probe(first, copy.deepcopy(module), second)
                example = torch.ones([2] * (ndim + axis) + [4] + [2] * (-1 - axis))
            graph = self._trace(probe, example)
        except Exception:  # whatever a module of the user raises when it is traced
            return "unknown"
        layer = graph.layers[0]
        before = _all_at(layer.z_sites, ("0", "output"), ("1", "input"))
        behind = _all_at(layer.g_sites, ("1", "output"), ("2", "input"))
        known = len(layer.activations) == 1 and before and behind
        return layer.activation if known else "unknown"


def _small_layer(axis: int) -> nn.Module:
    """Return a layer with four units along an axis, counted from the end."""
    if axis == -1:
        return nn.Linear(4, 4)
    return (nn.Conv1d, nn.Conv2d, nn.Conv3d)[-2 - axis](4, 4, 1)


def _all_at(sites: Sequence[Site], *places: tuple[str, str]) -> bool:
    """Tell whether all of some sites, one at least, are at these places, units in their order."""
    straight = all(site.unit_of_channel.tolist() == [0, 1, 2, 3] for site in sites)
    return bool(sites) and straight and {(x.module, x.where) for x in sites} <= set(places)


@dataclass(frozen=True, eq=False)
class _Ending:
    """Where units meet their activation function.

    Attributes:
        function: Its name.
        z: The pre-activation.
        h: The activation, or None where it was not seen.
        norm: The BatchNorm before.
    """

    function: str
    z: Seen
    h: Seen | None = None
    norm: str | None = None


@dataclass(frozen=True, eq=False)
class _Found:
    """What was found of a layer; `unknown` says why nothing was."""

    function: str = "unknown"
    norm: str | None = None
    z_sites: tuple[Site, ...] = ()
    g_sites: tuple[Site, ...] = ()
    unknown: str | None = None


class _Finder:
    """Decides what the activation functions of layers are, from what was seen in one run."""

    def __init__(self, watch: Watch, functions: _Functions, failed: str) -> None:
        self._watch = watch
        self._functions = functions
        self._failed = failed

    def find(self, name: str, n_units: int) -> _Found:
        """Return how the units of a layer are measured."""
        outputs = self._watch.outputs.get(name)
        if self._failed or outputs is None:
            return _Found(unknown=self._failed or _NOT_CALLED)
        calls = [list(self._endings(x, x, None)) for x in outputs if x is not None]
        endings = [ending for call in calls for ending in call]
        if None in outputs or any(ending.function == "unknown" for ending in endings):
            return _Found(unknown=_NO_FUNCTION)
        if len({(ending.function, ending.norm) for ending in endings}) > 1:
            return _Found(unknown=_SEVERAL)
        return self._sited(calls, n_units)

    def _sited(self, calls: list[list[_Ending]], n_units: int) -> _Found:
        first = calls[0][0]
        z_sites = self._sites([call[0].z for call in calls], n_units)
        if not z_sites:
            return _Found(unknown=_NO_HOOK)
        g_sites = z_sites if first.function == "identity" else ()
        # Of several consumers, each sees a part of the gradient only.
        if first.function != "identity" and all(len(call) == 1 for call in calls):
            g_sites = self._sites([call[0].h for call in calls], n_units)
        return _Found(first.function, first.norm, z_sites, g_sites)

    def _endings(self, seen: Seen, z: Seen, norm: str | None) -> Iterator[_Ending]:
        """Yield all that happens to a value; `z` is it, or what it is a view of."""
        if seen.lost or not (seen.calls or seen.views or seen.returned):
            yield _Ending("unknown", z, None, norm)
        if seen.returned:
            yield _Ending("identity", z, None, norm)
        for view in seen.views:
            yield from self._endings(view, z, norm)
        for call in seen.calls:
            if call.kind == "layer":
                yield _Ending("identity", z, None, norm)
            elif call.kind == "norm":
                assert call.result is not None
                yield from self._endings(call.result, call.result, call.name)
            else:
                yield _Ending(self._function(call), z, call.result, norm)

    def _function(self, call: Call) -> str:
        """Return the name of the activation function that a call of a module is."""
        seen, made = call.own[0], call.result
        if made is None or made.tensor.shape != seen.tensor.shape:
            return "unknown"
        return self._functions.name(call.module, seen.tensor.ndim, seen.axis or -1)

    def _sites(self, values: Sequence[Seen | None], n_units: int) -> tuple[Site, ...]:
        """Return the first place that shows these values, one in each call, and nothing else."""
        seen = [value for value in values if value is not None]
        axes = {value.axis for value in seen}
        axis = axes.pop() if len(axes) == 1 else None
        if len(seen) < len(values) or axis is None:
            return ()
        for place in seen[0].places:
            shown = sum(place in value.places for value in seen)
            if place[0] and shown == len(seen) == self._watch.calls[place[0]]:
                return (Site(*place, axis, torch.arange(n_units)),)
        return ()


def _unit_layers(model: nn.Module, finder: _Finder) -> tuple[UnitLayer, ...]:
    """Return all weight layers of a model, the last one as the head."""
    modules = list(weight_modules(model))
    holders: dict[int, list[str]] = defaultdict(list)
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None:
            holders[id(weight)].append(name)
    layers = []
    for name, module in modules:
        others = holders[id(module._parameters.get("weight"))]
        tied = tuple(other for other in others if other != name)
        found = finder.find(name, _n_units(module))
        layers.append(_unit_layer(name, module, found, tied, name == modules[-1][0]))
    return tuple(layers)


def _unit_layer(
    name: str, module: nn.Module, found: _Found, tied: tuple[str, ...], head: bool
) -> UnitLayer:
    """Return a weight layer with what its module tells and what was found of it."""
    units, prefix = _n_units(module), f"{name}." if name else ""
    return UnitLayer(
        name=name,
        kind=_layer_kind(module),
        weight=f"{prefix}weight",
        bias=f"{prefix}bias" if isinstance(getattr(module, "bias", None), Tensor) else None,
        unit_dim=int(_turned(module)),
        n_units=units,
        norm=found.norm,
        activations=((0, units, found.function),),
        hidden=torch.zeros(units, dtype=torch.bool),
        reasons={_UNTRACED: units},
        z_sites=found.z_sites,
        g_sites=found.g_sites,
        transformed=module._parameters.get("weight") is None,
        head=head,
        unknown={f"{_UNTRACED}, and {found.unknown}": units} if found.unknown else {},
        tied=tied,
    )


def _turned(module: nn.Module) -> bool:
    """Tell whether units are along dimension 1 of the weight."""
    return is_conv1d(module) or bool(getattr(module, "transposed", False))


def _n_units(module: nn.Module) -> int:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return int(getattr(module, "out_channels", weight.shape[int(_turned(module))]))


def _layer_kind(module: nn.Module) -> str:
    if not isinstance(module, nn.modules.conv._ConvNd):
        return "conv1d" if is_conv1d(module) else "linear"
    if module.transposed:
        return "conv transpose"
    alone = module.groups == module.in_channels == module.out_channels
    return "depthwise conv" if alone and module.groups > 1 else "conv"
