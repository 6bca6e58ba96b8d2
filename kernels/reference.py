"""The statistics in plain PyTorch, accumulated in float64: the oracle of every other backend.

    activation_stats  [9, C]  n, sum h, sum |h|, sum h^2, min h, max h, #(h == 0), #flat, #nonfinite
    gradient_stats    [4, C]  n, sum |g|, sum g^2, #nonfinite
    parameter_stats   [9, D]  n, sum |w|, sum w^2,
                              n_dw, sum |dw|, sum dw^2, sum |w dw|, sum w dw, #nonfinite dw

h = f(z) is evaluated in the dtype of z by torch's own function, because only that gives the zeros
that the network itself sees: GELU in float32 is exactly -0.0 below about -6, in float64 it is not.
Everything after that is float64. A position is flat where |f'(z)| <= 0.01, decided on the exact
value of z by the intervals below.

Inputs are read in pieces that stay in the cache, in the order of their strides: no float64 copy of
a whole tensor is made, and no layout needs one.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional

ACTIVATION_ROWS = (
    "n", "sum_h", "sum_abs_h", "sum_sq_h", "min_h", "max_h", "n_zero", "n_flat", "n_nonfinite_h",
)  # fmt: skip
GRADIENT_ROWS = ("n_g", "sum_abs_g", "sum_sq_g", "n_nonfinite_g")
PARAMETER_ROWS = (
    "n", "sum_abs_w", "sum_sq_w", "n_dw", "sum_abs_dw", "sum_sq_dw", "sum_abs_w_dw", "sum_w_dw",
    "n_nonfinite_dw",
)  # fmt: skip

_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda z: z,
    "relu": functional.relu,
    "relu6": functional.relu6,
    "hardtanh": functional.hardtanh,
    "leaky_relu": functional.leaky_relu,
    "elu": functional.elu,
    "selu": functional.selu,
    "celu": functional.celu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda z: functional.gelu(z, approximate="tanh"),
    "quick_gelu": lambda z: z * torch.sigmoid(1.702 * z),
    "silu": functional.silu,
    "mish": functional.mish,
    "softplus": functional.softplus,
    "hardswish": functional.hardswish,
    "hardsigmoid": functional.hardsigmoid,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}
ACTIVATIONS = tuple(_FUNCTIONS)

_INF = math.inf
# Where |f'(z)| <= 0.01: closed intervals whose ends solve |f'(z)| = 0.01 in float64. GELU, SiLU and
# their kin also have a narrow one around their minimum. Leaky ReLU counts as never flat, although
# its default slope is 0.01: a gradient comes through at every position.
_FLAT: dict[str, tuple[tuple[float, float], ...]] = {
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

# Elements per piece. Torch runs an operation on fewer than 2**15 elements on one thread: with few
# threads, waiting for each other after every small step costs more than it gains (four times the
# time where another program runs). With many, each gets 1 MiB in float64, which stays in its cache.
# A GPU wants few, large kernels.
_PIECE_SERIAL = (1 << 15) - 1
_PIECE_PER_THREAD = 1 << 17
_PIECE_GPU = 1 << 24
_FEW_THREADS = 4


def activation_stats(x: Tensor, unit_axis: int = 1, activation: str = "identity") -> Tensor:
    """Sum up the activations of each unit.

    Args:
        x: Pre-activations z, floating point, any shape and strides.
        unit_axis: Dimension of `x` that runs over the C units.
        activation: Name of f in h = f(z), one of `ACTIVATIONS`, or "leaky_relu:0.2" for a leaky
            ReLU with another slope than 0.01. hardtanh is the one between -1 and 1.

    Returns:
        float64 [9, C] on the device of `x`, rows as in `ACTIVATION_ROWS`, in the unit of h. Where z
        or h is NaN or infinite, the position is counted in the last row and in no other. With
        n = 0, min is +inf and max is -inf.

    Raises:
        ValueError: The activation is unknown, or `x` has no such axis or is not floating point.
    """
    name, slope = _parse(activation)
    axis = _axis(x, unit_axis)
    stats = x.new_zeros(len(ACTIVATION_ROWS), x.shape[axis], dtype=torch.float64)
    stats[4].fill_(_INF)
    stats[5].fill_(-_INF)
    for start, (piece,) in _pieces((x,), axis):
        part = _activation_piece(piece, name, slope)
        total = stats[:, start : start + piece.shape[1]]
        lowest = torch.minimum(total[4], part[4])
        highest = torch.maximum(total[5], part[5])
        total += part
        total[4] = lowest
        total[5] = highest
    return stats


def gradient_stats(g: Tensor, unit_axis: int = 1) -> Tensor:
    """Sum up the gradients to the activations of each unit.

    Args:
        g: dL/dh, floating point, any shape and strides.
        unit_axis: Dimension of `g` that runs over the C units.

    Returns:
        float64 [4, C] on the device of `g`, rows as in `GRADIENT_ROWS`, in the unit of loss per
        unit of h. NaN and infinite gradients are counted in the last row and in no other.

    Raises:
        ValueError: `g` has no such axis or is not floating point.
    """
    axis = _axis(g, unit_axis)
    stats = g.new_zeros(len(GRADIENT_ROWS), g.shape[axis], dtype=torch.float64)
    for start, (piece,) in _pieces((g,), axis):
        wide, finite = _finite_float64(piece, piece)
        stats[:, start : start + piece.shape[1]] += torch.stack(
            [_count(piece, finite), _sum(wide.abs()), _sum(wide * wide), _count_not(wide, finite)]
        )
    return stats


def parameter_stats(weight: Tensor, gradient: Tensor | None, dim: int) -> Tensor:
    """Sum up a weight and its gradient for each index along one dimension.

    Args:
        weight: A weight w, floating point, any strides.
        gradient: dL/dw in the shape of `weight`, or None.
        dim: Dimension of `weight` that is kept, of size D.

    Returns:
        float64 [9, D] on the device of `weight`, rows as in `PARAMETER_ROWS`. NaN and infinite
        elements of the gradient are counted in the last row and left out of every row with dw;
        without a gradient those rows are 0.

    Raises:
        ValueError: The shapes differ, `weight` has no such dimension or is not floating point.
    """
    axis = _axis(weight, dim)
    if gradient is not None and gradient.shape != weight.shape:
        raise ValueError(
            f"gradient has shape {tuple(gradient.shape)}, expected that of the weight, "
            f"{tuple(weight.shape)}"
        )
    tensors = (weight,) if gradient is None else (weight, gradient)
    stats = weight.new_zeros(len(PARAMETER_ROWS), weight.shape[axis], dtype=torch.float64)
    for start, pieces in _pieces(tensors, axis):
        total = stats[:, start : start + pieces[0].shape[1]]
        w = pieces[0].double()
        total[:3] += torch.stack([_count(w, None), _sum(w.abs()), _sum(w * w)])
        if gradient is not None:
            total[3:] += _parameter_gradient_piece(w, pieces[1])
    return stats


def _activation_piece(z: Tensor, name: str, slope: float | None) -> Tensor:
    """Return [9, C] of one piece [A, C, B]."""
    h = _FUNCTIONS[name](z) if slope is None else functional.leaky_relu(z, slope)
    wide, finite = _finite_float64(h, z)
    low, high = (wide, wide) if finite is None else (wide.where(finite, v) for v in (_INF, -_INF))
    return torch.stack(
        [
            _count(z, finite),
            _sum(wide),
            _sum(wide.abs()),
            _sum(wide * wide),
            low.amin((0, 2)),
            high.amax((0, 2)),
            _count_zero(h, finite),
            _count_flat(z, name, finite),
            _count_not(z, finite),
        ]
    )


def _parameter_gradient_piece(w: Tensor, gradient: Tensor) -> Tensor:
    """Return the last six rows of `PARAMETER_ROWS` for one piece [A, D, B]."""
    dw, finite = _finite_float64(gradient, gradient)
    product = w * dw if finite is None else (w * dw).where(finite, 0)
    return torch.stack(
        [
            _count(dw, finite),
            _sum(dw.abs()),
            _sum(dw * dw),
            _sum(product.abs()),
            _sum(product),
            _count_not(dw, finite),
        ]
    )


def _parse(activation: str) -> tuple[str, float | None]:
    """Split "leaky_relu:0.2" into its name and slope; other functions have no parameter."""
    name, colon, text = activation.partition(":")
    try:
        slope = float(text) if colon and name == "leaky_relu" else None
    except ValueError:
        slope = None
    if name not in _FUNCTIONS or (colon and slope is None):
        raise ValueError(
            f"activation is {activation!r}, expected one of {', '.join(ACTIVATIONS)} "
            "or leaky_relu:SLOPE"
        )
    return name, slope


def _axis(x: Tensor, axis: int) -> int:
    if not x.is_floating_point():
        raise ValueError(f"the tensor is {x.dtype}, expected a floating-point dtype")
    if not -x.ndim <= axis < x.ndim:
        raise ValueError(f"axis is {axis}, expected a dimension of a tensor {tuple(x.shape)}")
    return axis % x.ndim


def _pieces(tensors: tuple[Tensor, ...], axis: int) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
    """Yield (first unit, pieces [A, C', B]) that together cover tensors of one shape once."""
    first = tensors[0].detach()
    if first.numel() == 0:
        return
    # From the slowest to the fastest dimension in memory: a piece is then a few long stretches.
    order = sorted(range(first.ndim), key=first.stride, reverse=True)
    unit = order.index(axis)
    limit = _piece_size(first.device)
    permuted = tuple(tensor.detach().permute(order) for tensor in tensors)
    for start, pieces in _split(permuted, unit, 0, limit):
        shape = pieces[0].shape
        flat = (math.prod(shape[:unit]), shape[unit], math.prod(shape[unit + 1 :]))
        yield start, tuple(piece.reshape(flat) for piece in pieces)


def _piece_size(device: torch.device) -> int:
    if device.type != "cpu":
        return _PIECE_GPU
    threads = torch.get_num_threads()
    return _PIECE_SERIAL if threads <= _FEW_THREADS else _PIECE_PER_THREAD * threads


def _split(
    tensors: tuple[Tensor, ...], unit: int, start: int, limit: int
) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
    """Cut along the slowest dimension until a piece has at most `limit` elements."""
    shape = tensors[0].shape
    total = math.prod(shape)
    if total <= limit:
        yield start, tensors
        return
    dim = next(d for d, size in enumerate(shape) if size > 1)
    step = max(1, limit * shape[dim] // total)
    for begin in range(0, shape[dim], step):
        size = min(step, shape[dim] - begin)
        narrowed = tuple(tensor.narrow(dim, begin, size) for tensor in tensors)
        yield from _split(narrowed, unit, start + begin if dim == unit else start, limit)


def _finite_float64(value: Tensor, source: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return `value` in float64 with 0 where it or `source` is not finite, and the mask.

    The mask is None where everything is finite. Only on the CPU is that looked up: elsewhere it
    would make the host wait.
    """
    wide = value.double()
    same = source is value
    if value.device.type == "cpu" and _all_finite(value) and (same or _all_finite(source)):
        return wide, None
    finite = value.isfinite() & source.isfinite()
    return wide.where(finite, 0), finite


def _all_finite(x: Tensor) -> bool:
    """One pass: a NaN spreads into both ends."""
    low, high = torch.aminmax(x)
    return math.isfinite(low) and math.isfinite(high)


def _sum(piece: Tensor) -> Tensor:
    return piece.sum((0, 2))


def _count(piece: Tensor, finite: Tensor | None) -> Tensor:
    if finite is not None:
        return _sum(finite).double()
    ahead, units, behind = piece.shape
    return piece.new_full((units,), ahead * behind, dtype=torch.float64)


def _count_not(piece: Tensor, finite: Tensor | None) -> Tensor:
    if finite is not None:
        return _sum(~finite).double()
    return piece.new_zeros(piece.shape[1], dtype=torch.float64)


def _count_zero(h: Tensor, finite: Tensor | None) -> Tensor:
    # Converting to bool is several times as fast as comparing with 0.
    other = h.bool() if finite is None else h.bool() | ~finite
    return _count(h, None) - _sum(other)


def _count_flat(z: Tensor, name: str, finite: Tensor | None) -> Tensor:
    intervals = _FLAT.get(name, ())
    counts = z.new_zeros(z.shape[1], dtype=torch.float64)
    if not intervals:
        return counts
    # A NaN is in no interval. The intervals are disjoint, so their counts add up.
    wide = z.double() if finite is None else z.double().where(finite, torch.nan)
    inside = torch.empty_like(wide)
    for low, high in intervals:
        # Written as numbers, because a comparison that makes bool is several times as slow.
        if high < _INF:
            counts += _sum(torch.le(wide, high, out=inside))
        else:
            counts += _count(z, finite)
        if low > -_INF:
            counts -= _sum(torch.lt(wide, low, out=inside))
    return counts
