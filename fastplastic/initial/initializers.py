"""From which law the fresh values of each parameter are drawn.

An initializer is made for a model and then asked for the `Law` of one parameter at a time; `notes`
says afterwards what a reader should know. Only `default` gives biases of reset units other than
zero. What is no weight of a layer (norms, embeddings, biases on their own) has its default law
always.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastplastic.errors import InputError
from fastplastic.initial.laws import Law, constant, normal, truncated_normal, uniform
from fastplastic.initial.recorder import record_laws
from fastplastic.model import Lines
from fastplastic.wiring import UnitLayer

_ZERO = constant(0.0)
# Hugging Face's Conv1D initialises itself with this (after GPT-2).
_CONV1D_STD = 0.02
_TRUNC_STD = 0.02
# The second matrix of each pair of PEFT's LoRA begins at 0, so that the pair does nothing.
_SECOND_OF_LORA = {"lora_B", "lora_embedding_B"}
_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


@dataclass(frozen=True, eq=False)
class Target:
    """A parameter of which some rows, or some elements, are drawn afresh.

    Attributes:
        name: Its dotted name.
        tensor: Its present values.
        layer: The layer that it belongs to; None for what is no weight or bias of reset units.
        rows: int64, the rows to draw; the others are live.
        mask: bool, the elements to draw, instead of rows; the others are live.
    """

    name: str
    tensor: Tensor
    layer: UnitLayer | None
    rows: Tensor | None = None
    mask: Tensor | None = None

    @property
    def is_bias(self) -> bool:
        """Whether it is the bias of the layer, with one element per unit."""
        return self.layer is not None and self.name == self.layer.bias

    def moments(self) -> tuple[float, float, float]:
        """Return number, mean and standard deviation of the values that stay, in all processes."""
        assert self.layer is not None
        dim = self.layer.unit_dim
        lines = Lines(self.name, self.tensor, dim, live=None if self.mask is None else ~self.mask)
        staying = torch.ones(self.tensor.shape[dim], dtype=torch.bool)
        if self.rows is not None:
            staying[self.rows] = False

        def total(power: int, centre: float = 0.0) -> float:
            sums = lines.sums(power, centre)[0, staying].tolist()
            # An infinity is an error to fsum.
            return math.fsum(sums) if all(map(math.isfinite, sums)) else math.nan

        count = total(0)
        if not count:
            return 0.0, math.nan, math.nan
        mean = total(1) / count
        return count, mean, math.sqrt(total(2, mean) / count) if math.isfinite(mean) else math.nan


class Initializer(Protocol):
    """Gives the law of each parameter."""

    def __call__(self, target: Target) -> Law:
        """Return the law from which the rows of the target are drawn."""

    def notes(self) -> tuple[str, ...]:
        """Return what there is to say about the laws given so far."""


class OfShape:
    """A law that the shape of the weight alone decides; biases are 0.

    Args:
        model: The model.
        law: Returns the law of a weight.
    """

    def __init__(self, model: nn.Module, law: Callable[[Target], Law]) -> None:
        self._default = Default(model)
        self._law = law

    def __call__(self, target: Target) -> Law:
        """Return the law from which the rows of the target are drawn."""
        if target.layer is None:
            return self._default(target)
        return _ZERO if target.is_bias else self._law(target)

    def notes(self) -> tuple[str, ...]:
        """Return what there is to say about the laws given so far."""
        return self._default.notes()


def kaiming_uniform(target: Target) -> Law:
    """Return U(-b, b) with b = sqrt(6 / fan_in), fan_in the number of incoming weights.

    Source: He et al., "Delving deep into rectifiers", arXiv 1502.01852, for ReLU.
    """
    bound = math.sqrt(6 / _fan_in(target))
    return uniform(-bound, bound)


def kaiming_normal(target: Target) -> Law:
    """Return N(0, 2 / fan_in), fan_in the number of incoming weights.

    Source: He et al., "Delving deep into rectifiers", arXiv 1502.01852, for ReLU.
    """
    return normal(0.0, math.sqrt(2 / _fan_in(target)))


def xavier_uniform(target: Target) -> Law:
    """Return U(-b, b) with b = sqrt(6 / (fan_in + fan_out)), fans as in `torch.nn.init`.

    Source: Glorot and Bengio, "Understanding the difficulty of training deep feedforward neural
    networks", AISTATS 2010.
    """
    shape = target.tensor.shape
    bound = math.sqrt(6 / ((shape[0] + shape[1]) * math.prod(shape[2:])))
    return uniform(-bound, bound)


def trunc_normal(target: Target) -> Law:
    """Return N(0, 0.02^2) between -2 and 2, with which timm initialises transformers."""
    return truncated_normal(0.0, _TRUNC_STD, -2.0, 2.0)


def _fan_in(target: Target) -> float:
    assert target.layer is not None
    return target.tensor.numel() / target.layer.n_units


class Empirical:
    """Normal with the mean and standard deviation of the layer's own live weights; bias 0.

    Live is what is not drawn afresh. Without any, the law of `default` is taken.
    """

    def __init__(self, model: nn.Module) -> None:
        self._default = Default(model)
        self._without_live: list[str] = []

    def __call__(self, target: Target) -> Law:
        """Return the law from which the rows of the target are drawn."""
        if target.layer is None:
            return self._default(target)
        if target.is_bias:
            return _ZERO
        count, mean, std = target.moments()
        if not count:
            self._without_live.append(target.name)
            return self._default(target)
        if not math.isfinite(std):
            raise InputError(
                f"{target.name!r} has live weights that are not finite, expected numbers to "
                "imitate: choose another init"
            )
        return normal(mean, std)

    def notes(self) -> tuple[str, ...]:
        """Return what there is to say about the laws given so far."""
        own = tuple(f"{name}: nothing live to imitate, default law" for name in self._without_live)
        return (*own, *self._default.notes())


class Default:
    """The law with which the library initialises that very parameter.

    For a timm model it is read off a fresh model of the same architecture, parameter by parameter;
    otherwise, or where the fresh one differs in shape or has no law per element, it is the law of
    PyTorch's `reset_parameters`: U(-b, b) with b = 1 / sqrt(fan_in) for weights and biases of
    linear layers and convolutions, `MultiheadAttention` and Hugging Face's Conv1D as they do, 1 and
    0 for norms, and 0 for the second matrices of PEFT's LoRA.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._fresh: dict[str, tuple[torch.Size, Law | None]] | None = None
        self._failures: list[str] = []
        self._fallbacks: Counter[str] = Counter()

    def __call__(self, target: Target) -> Law:
        """Return the law from which the rows of the target are drawn."""
        if not _SECOND_OF_LORA.isdisjoint(target.name.split(".")):
            return _ZERO
        if self._fresh is None:
            self._fresh = self._record()
        if not self._fresh:
            return _pytorch_law(target, self._model)
        shape, law = self._fresh.get(target.name, (None, None))
        if law is not None and shape == target.tensor.shape:
            return law
        if shape is None:
            reason = "not in a fresh timm model"
        elif shape != target.tensor.shape:
            reason = "of another shape in a fresh timm model"
        else:
            reason = "initialised by timm without a law per element"
        self._fallbacks[reason] += 1
        return _pytorch_law(target, self._model)

    def notes(self) -> tuple[str, ...]:
        """Return what there is to say about the laws given so far."""
        return (
            *self._failures,
            *(
                f"{count} parameters are {reason}: PyTorch's default law is used for them"
                for reason, count in self._fallbacks.items()
            ),
        )

    def _record(self) -> dict[str, tuple[torch.Size, Law | None]]:
        laws: dict[str, tuple[torch.Size, Law | None]] = {}
        for prefix, module, architecture in _timm_models(self._model):
            try:
                fresh = _record_timm(module, architecture)
            except Exception as error:  # the code of a model may raise anything on the meta device
                self._failures.append(
                    f"no fresh {architecture} could be made ({type(error).__name__}): "
                    "PyTorch's default law is used"
                )
                continue
            laws |= {f"{prefix}{name}": law for name, law in fresh.items()}
        return laws


INITIALIZERS: Mapping[str, Callable[[nn.Module], Initializer]] = {
    "default": Default,
    "kaiming_uniform": partial(OfShape, law=kaiming_uniform),
    "kaiming_normal": partial(OfShape, law=kaiming_normal),
    "xavier_uniform": partial(OfShape, law=xavier_uniform),
    "trunc_normal": partial(OfShape, law=trunc_normal),
    "empirical": Empirical,
}


# One line on each, for those who choose.
SUMMARIES: Mapping[str, str] = {
    "default": "the law with which the library itself initialises that parameter",
    "kaiming_uniform": "U(-b, b), b = sqrt(6 / fan_in) (He et al., arXiv 1502.01852)",
    "kaiming_normal": "N(0, 2 / fan_in) (He et al., arXiv 1502.01852)",
    "xavier_uniform": "U(-b, b), b = sqrt(6 / (fan_in + fan_out)) (Glorot and Bengio, 2010)",
    "trunc_normal": "N(0, 0.02^2) between -2 and 2, as timm initialises transformers",
    "empirical": "normal, with mean and standard deviation of the layer's own live weights",
}


def make_initializer(name: str, model: nn.Module) -> Initializer:
    """Return the initializer with this name for a model.

    Raises:
        InputError: There is none with this name.
    """
    if name not in INITIALIZERS:
        raise InputError(f"init {name!r} is unknown, expected one of {', '.join(INITIALIZERS)}")
    return INITIALIZERS[name](model)


def _timm_models(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Yield (prefix of parameter names, module, architecture) of the outermost timm models."""
    inside: list[str] = []
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        architecture = _architecture(module)
        if architecture is not None and not any(prefix.startswith(outer) for outer in inside):
            inside.append(prefix)
            yield prefix, module, architecture


def _architecture(module: nn.Module) -> str | None:
    config: Any = getattr(module, "pretrained_cfg", None) or getattr(module, "default_cfg", None)
    name = config.get("architecture") if isinstance(config, Mapping) else None
    return name if isinstance(name, str) else None


def _record_timm(module: nn.Module, architecture: str) -> dict[str, tuple[torch.Size, Law | None]]:
    import timm

    # create_model also takes names that it would download.
    if not timm.is_model(architecture):
        raise InputError(f"architecture {architecture!r} is not in timm, expected one that is")
    classes = getattr(module, "num_classes", None)
    options: dict[str, Any] = {"num_classes": classes} if isinstance(classes, int) else {}
    return record_laws(lambda: timm.create_model(architecture, pretrained=False, **options))


def _pytorch_law(target: Target, model: nn.Module) -> Law:
    owner = model.get_submodule(target.name.rpartition(".")[0])
    if target.layer is None:
        return _pytorch_law_alone(target, owner)
    if target.layer.kind == "conv1d":
        return _ZERO if target.is_bias else normal(0.0, _CONV1D_STD)
    weight = model.get_parameter(target.layer.weight)
    if isinstance(owner, nn.MultiheadAttention):
        if target.is_bias:
            return _ZERO
        # Xavier: one fan for both ends of the whole projection.
        bound = math.sqrt(6 / (weight.shape[0] + weight.shape[1]))
    else:
        # As in torch.nn.init, the fan is taken from the first row in memory.
        bound = 1 / math.sqrt(math.prod(weight.shape[1:]))
    return uniform(-bound, bound)


def _pytorch_law_alone(target: Target, owner: nn.Module) -> Law:
    """Return the law of a parameter that is no weight of a layer."""
    kind = target.name.rpartition(".")[2]
    if isinstance(owner, _NORMS) and kind in ("weight", "bias"):
        return constant(float(kind == "weight"))
    weight = getattr(owner, "weight", None)
    if isinstance(owner, (nn.Linear, nn.modules.conv._ConvNd)) and kind == "bias":
        assert isinstance(weight, Tensor)
        bound = 1 / math.sqrt(math.prod(weight.shape[1:]))
        return uniform(-bound, bound)
    if kind in ("in_proj_bias", "bias") and isinstance(owner, nn.MultiheadAttention):
        return _ZERO
    raise InputError(
        f"no initial distribution of {target.name!r} is known (of a {type(owner).__name__}), "
        "expected a weight, bias or norm: leave it out of include"
    )
