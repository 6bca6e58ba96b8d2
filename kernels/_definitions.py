"""What every backend agrees on: names, rows, where functions are flat, and checks of arguments."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

ACTIVATION_ROWS = (
    "n", "sum_h", "sum_abs_h", "sum_sq_h", "min_h", "max_h", "n_zero", "n_flat", "n_nonfinite_h",
)  # fmt: skip
MIN_ROW = ACTIVATION_ROWS.index("min_h")
GRADIENT_ROWS = ("n_g", "sum_abs_g", "sum_sq_g", "n_nonfinite_g")
PARAMETER_ROWS = (
    "n", "sum_abs_w", "sum_sq_w", "n_dw", "sum_abs_dw", "sum_sq_dw", "sum_abs_w_dw",
    "n_nonfinite_dw",
)  # fmt: skip
PARAMETER_COLUMNS = ("n", "sum_abs_w", "sum_sq_w", "n_dw", "sum_w_dw", "n_nonfinite_dw")

ACTIVATIONS = (
    "identity", "relu", "relu6", "hardtanh", "leaky_relu", "elu", "selu", "celu", "gelu",
    "gelu_tanh", "quick_gelu", "silu", "mish", "softplus", "hardswish", "hardsigmoid", "sigmoid",
    "tanh",
)  # fmt: skip

_INF = math.inf
# Where |f'(z)| <= 0.01: closed intervals whose ends solve |f'(z)| = 0.01 in float64. GELU, SiLU and
# their kin also have a narrow one around their minimum. Leaky ReLU counts as never flat, although
# its default slope is 0.01: a gradient comes through at every position.
FLAT: dict[str, tuple[tuple[float, float], ...]] = {
    "relu": ((-_INF, 0.0),),
    "relu6": ((-_INF, 0.0), (6.0, _INF)),
    "hardtanh": ((-_INF, -1.0), (1.0, _INF)),
    "elu": ((-_INF, -4.605170185988092),),
    "selu": ((-_INF, -5.169403491531345),),
    "celu": ((-_INF, -4.605170185988092),),
    "gelu": ((-_INF, -3.067427203908899), (-0.7754719024484459, -0.7290798339189214)),
    "gelu_tanh": ((-_INF, -3.052854995144465), (-0.7762035521160159, -0.7296934550964786)),
    "quick_gelu": ((-_INF, -3.6788418618213665), (-0.7790128411157946, -0.7249694341153377)),
    "silu": ((-_INF, -6.261388848819966), (-1.3258798555790823, -1.2338979768643046)),
    "mish": ((-_INF, -6.263968785699261), (-1.2310248406972117, -1.1559962858941732)),
    "softplus": ((-_INF, -4.59511985013459),),
    "hardswish": ((-_INF, -3.0), (-1.53, -1.47)),
    "hardsigmoid": ((-_INF, -3.0), (3.0, _INF)),
    "sigmoid": ((-_INF, -4.584863339122355), (4.584863339122355, _INF)),
    "tanh": ((-_INF, -2.9932228461263777), (2.9932228461263777, _INF)),
}

# At and below these h is exactly 0 in float32, where 1 + erf, 1 + tanh or exp round to 0 (or a
# divisor to infinity), and in the narrower dtypes too, since torch evaluates them in float32.
# Found by trying torch's own on the CPU, whose erf is not monotone between -5.55 and -5.48.
ZERO_BELOW = {
    "gelu": -5.515625, "gelu_tanh": -5.0613803, "quick_gelu": -52.128573, "silu": -88.72284,
    "mish": -102.87347, "softplus": -102.87347, "sigmoid": -88.72284,
}  # fmt: skip


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


def check_axis(x: Tensor, axis: int) -> int:
    """Return the axis as a dimension from 0 on.

    Raises:
        ValueError: `x` has no such axis or is not floating point.
    """
    if not x.is_floating_point():
        raise ValueError(f"the tensor is {x.dtype}, expected a floating-point dtype")
    if not -x.ndim <= axis < x.ndim:
        raise ValueError(f"axis is {axis}, expected a dimension of a tensor {tuple(x.shape)}")
    return axis % x.ndim


def activation_table(x: Tensor, axis: int, out: Tensor | None) -> Tensor:
    """Return `out`, checked, or a fresh table for the activations x; ValueError if unfit."""
    if out is not None:
        return _checked(out, len(ACTIVATION_ROWS), x.shape[axis], x.device)
    table = _fresh(len(ACTIVATION_ROWS), x.shape[axis], x.device)
    table[MIN_ROW].fill_(math.inf)
    table[MIN_ROW + 1].fill_(-math.inf)
    return table


def gradient_table(g: Tensor, axis: int, out: Tensor | None) -> Tensor:
    """Return `out`, checked, or a fresh table for the gradients g; ValueError if unfit."""
    if out is not None:
        return _checked(out, len(GRADIENT_ROWS), g.shape[axis], g.device)
    return _fresh(len(GRADIENT_ROWS), g.shape[axis], g.device)


def parameter_tables(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    groups: Sequence[int] | None,
    out: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """Check the arguments of parameter_stats; return `out` or fresh tables (rows, columns)."""
    groups = (1,) * len(weights) if groups is None else groups
    if not len(weights) == len(gradients) == len(groups):
        raise ValueError(
            f"there are {len(weights)} weights, {len(gradients)} gradients and {len(groups)} "
            "groups, expected as many of each"
        )
    for weight, gradient, parts in zip(weights, gradients, groups, strict=True):
        _check_parameter(weight, gradient, parts)
    rows = sum(weight.shape[0] for weight in weights)
    columns = sum(n * weight.shape[1] for weight, n in zip(weights, groups, strict=True))
    device = weights[0].device if weights else torch.device("cpu")
    sizes = ((len(PARAMETER_ROWS), rows), (len(PARAMETER_COLUMNS), columns))
    if out is None:
        return _fresh(*sizes[0], device), _fresh(*sizes[1], device)
    return _checked(out[0], *sizes[0], device), _checked(out[1], *sizes[1], device)


def _check_parameter(weight: Tensor, gradient: Tensor | None, groups: int) -> None:
    check_axis(weight, 0)
    if weight.ndim < 2 or groups < 1 or weight.shape[0] % groups:
        raise ValueError(
            f"a weight has shape {tuple(weight.shape)} and {groups} groups, expected two "
            "dimensions or more, the first a multiple of the groups"
        )
    if gradient is not None and gradient.shape != weight.shape:
        raise ValueError(
            f"gradient has shape {tuple(gradient.shape)}, expected that of the weight, "
            f"{tuple(weight.shape)}"
        )


def _fresh(rows: int, units: int, device: torch.device) -> Tensor:
    return torch.zeros(rows, units, dtype=torch.float64, device=device)


def _checked(out: Tensor, rows: int, units: int, device: torch.device) -> Tensor:
    adjacent = units < 2 or out.stride(-1) == 1
    if out.dtype != torch.float64 or out.shape != (rows, units) or not adjacent:
        raise ValueError(
            f"out is {out.dtype} {tuple(out.shape)} with strides {out.stride()}, expected float64 "
            f"({rows}, {units}) with adjacent columns"
        )
    if out.device != device:
        raise ValueError(f"out is on {out.device}, expected the device of the tensor, {device}")
    return out
