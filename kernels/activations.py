"""The activation functions that are known, one entry each; every backend has an expression of f.

An activation function is added here, in `cpu/functions.py` and in `gpu/functions.py`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

_INF = math.inf
Interval = tuple[float, float]


@dataclass(frozen=True)
class Activation:
    """An activation function h = f(z).

    Attributes:
        function: f by torch's own function, in the dtype of z.
        flat: Where |f'(z)| <= 0.01: closed intervals, ascending and disjoint, whose ends solve
            |f'(z)| = 0.01 in float64. GELU, SiLU and their kin also have a narrow one around their
            minimum. Leaky ReLU counts as never flat, although its default slope is 0.01: a gradient
            comes through at every position.
        zero_below: At and below this h is exactly 0 in float32, where 1 + erf, 1 + tanh or exp
            round to 0 (or a divisor to infinity), and in the narrower dtypes too, since torch
            evaluates them in float32. Found by trying torch's own on the CPU, whose erf is not
            monotone between -5.55 and -5.48. None where there is no such end.
        operators: Names of torch's operators that are this function whatever their options are.
        classes: Names of classes in timm and Hugging Face that compute it by several operators.
    """

    function: Callable[[Tensor], Tensor]
    flat: tuple[Interval, ...] = ()
    zero_below: float | None = None
    operators: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()


ACTIVATIONS: Mapping[str, Activation] = {
    "identity": Activation(lambda z: z),
    "relu": Activation(functional.relu, flat=((-_INF, 0.0),), operators=("relu",)),
    "relu6": Activation(functional.relu6, flat=((-_INF, 0.0), (6.0, _INF)), operators=("relu6",)),
    "hardtanh": Activation(functional.hardtanh, flat=((-_INF, -1.0), (1.0, _INF))),
    "leaky_relu": Activation(functional.leaky_relu),
    "elu": Activation(functional.elu, flat=((-_INF, -4.605170185988092),)),
    "selu": Activation(functional.selu, flat=((-_INF, -5.169403491531345),), operators=("selu",)),
    "celu": Activation(functional.celu, flat=((-_INF, -4.605170185988092),)),
    "gelu": Activation(
        functional.gelu,
        flat=((-_INF, -3.067427203908899), (-0.7754719024484459, -0.7290798339189214)),
        zero_below=-5.515625,
    ),
    "gelu_tanh": Activation(
        lambda z: functional.gelu(z, approximate="tanh"),
        flat=((-_INF, -3.052854995144465), (-0.7762035521160159, -0.7296934550964786)),
        zero_below=-5.0613803,
        classes=("NewGELUActivation", "FastGELUActivation", "PytorchGELUTanh", "GELUTanh"),
    ),
    "quick_gelu": Activation(
        lambda z: z * torch.sigmoid(1.702 * z),
        flat=((-_INF, -3.6788418618213665), (-0.7790128411157946, -0.7249694341153377)),
        zero_below=-52.128573,
        classes=("QuickGELUActivation", "QuickGELU"),
    ),
    "silu": Activation(
        functional.silu,
        flat=((-_INF, -6.261388848819966), (-1.3258798555790823, -1.2338979768643046)),
        zero_below=-88.72284,
        operators=("silu",),
        classes=("Swish", "SiLUActivation"),
    ),
    "mish": Activation(
        functional.mish,
        flat=((-_INF, -6.263968785699261), (-1.2310248406972117, -1.1559962858941732)),
        zero_below=-102.87347,
        operators=("mish",),
    ),
    "softplus": Activation(
        functional.softplus, flat=((-_INF, -4.59511985013459),), zero_below=-102.87347
    ),
    "hardswish": Activation(
        functional.hardswish,
        flat=((-_INF, -3.0), (-1.53, -1.47)),
        operators=("hardswish",),
        classes=("HardSwish",),
    ),
    "hardsigmoid": Activation(
        functional.hardsigmoid,
        flat=((-_INF, -3.0), (3.0, _INF)),
        operators=("hardsigmoid",),
        classes=("HardSigmoid",),
    ),
    "sigmoid": Activation(
        torch.sigmoid,
        flat=((-_INF, -4.584863339122355), (4.584863339122355, _INF)),
        zero_below=-88.72284,
        operators=("sigmoid",),
    ),
    "tanh": Activation(
        torch.tanh,
        flat=((-_INF, -2.9932228461263777), (2.9932228461263777, _INF)),
        operators=("tanh",),
    ),
}

# From here on a float32 is infinite in a narrower dtype. Of all h, only that of SELU can be beyond
# the z that it is made from.
INFINITE_FROM = {torch.float16: 65520.0, torch.bfloat16: 3.3961775292304e38}


def parse_activation(activation: str) -> tuple[str, float | None]:
    """Split "leaky_relu:0.2" into its name and slope; other functions have no parameter.

    Raises:
        ValueError: There is no such function.
    """
    name, colon, text = activation.partition(":")
    try:
        slope = float(text) if colon and name == "leaky_relu" else None
    except ValueError:
        slope = None
    if name not in ACTIVATIONS or (colon and slope is None):
        raise ValueError(
            f"activation is {activation!r}, expected one of {', '.join(ACTIVATIONS)} "
            "or leaky_relu:SLOPE"
        )
    return name, slope


def activate(z: Tensor, activation: str) -> Tensor:
    """Return h = f(z) by torch's own function, in the dtype of z.

    Args:
        z: Pre-activations, floating point.
        activation: As for `activation_stats`.

    Raises:
        ValueError: There is no such function.
    """
    name, slope = parse_activation(activation)
    return ACTIVATIONS[name].function(z) if slope is None else functional.leaky_relu(z, slope)
