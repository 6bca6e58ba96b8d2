"""The statistics in plain PyTorch, accumulated in float64: the oracle of every other backend.

    activation_stats  [9, C]  n, sum h, sum |h|, sum h^2, min h, max h, #(h == 0), #flat, #nonfinite
    gradient_stats    [4, C]  n, sum |g|, sum g^2, #nonfinite
    parameter_stats   rows    n, sum |w|, sum w^2, n_dw, sum |dw|, sum dw^2, sum |w dw|, #nonfinite
                      columns n, sum |w|, sum w^2, n_dw, sum w dw, #nonfinite dw

h = f(z) is evaluated in the dtype of z by torch's own function, because only that gives the zeros
that the network itself sees: GELU in float32 is exactly -0.0 below about -6, in float64 it is not.
Everything after that is float64. A position is flat where |f'(z)| <= 0.01, decided on the exact
value of z by the intervals `_definitions.FLAT`.

Inputs are read in pieces that stay in the cache, in the order of their strides: no float64 copy of
a whole tensor is made, and no layout needs one.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from ._definitions import (
    FLAT,
    PARAMETER_COLUMNS,
    PARAMETER_ROWS,
    activation_table,
    check_axis,
    gradient_table,
    parameter_tables,
    parse_activation,
)
from ._reference_resample import resample_
from ._reference_select import select, selection_masks

__all__ = [
    "activation_stats",
    "gradient_stats",
    "parameter_stats",
    "resample_",
    "select",
    "selection_masks",
]

# Sums along one dimension of a weight; each direction keeps some of them.
_SUMS = (
    "n", "sum_abs_w", "sum_sq_w", "n_dw", "sum_abs_dw", "sum_sq_dw", "sum_abs_w_dw", "sum_w_dw",
    "n_nonfinite_dw",
)  # fmt: skip
_OF_ROWS = [_SUMS.index(name) for name in PARAMETER_ROWS]
_OF_COLUMNS = [_SUMS.index(name) for name in PARAMETER_COLUMNS]

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
# Elements per piece. Torch runs an operation on fewer than 2**15 elements on one thread: with few
# threads, waiting for each other after every small step costs more than it gains (four times the
# time where another program runs). With many, each gets 1 MiB in float64, which stays in its cache.
# A GPU wants few, large kernels.
_PIECE_SERIAL = (1 << 15) - 1
_PIECE_PER_THREAD = 1 << 17
_PIECE_GPU = 1 << 24
_FEW_THREADS = 4


def activation_stats(
    x: Tensor, unit_axis: int = 1, activation: str = "identity", *, out: Tensor | None = None
) -> Tensor:
    """Sum up the activations of each unit; see `fastplastic.kernels.activation_stats`."""
    name, slope = parse_activation(activation)
    axis = check_axis(x, unit_axis)
    stats = activation_table(x, axis, out)
    for start, (piece,) in _pieces((x,), axis):
        part = _activation_piece(piece, name, slope)
        total = stats[:, start : start + piece.shape[1]]
        lowest = torch.minimum(total[4], part[4])
        highest = torch.maximum(total[5], part[5])
        total += part
        total[4] = lowest
        total[5] = highest
    return stats


def activate(z: Tensor, activation: str) -> Tensor:
    """Return h = f(z) by torch's own function, in the dtype of z; ValueError if f is unknown."""
    return _activated(z, *parse_activation(activation))


def gradient_stats(g: Tensor, unit_axis: int = 1, *, out: Tensor | None = None) -> Tensor:
    """Sum up the gradients to the activations of each unit.

    See `fastplastic.kernels.gradient_stats`.
    """
    axis = check_axis(g, unit_axis)
    stats = gradient_table(g, axis, out)
    for start, (piece,) in _pieces((g,), axis):
        wide, finite = _finite_float64(piece, piece)
        stats[:, start : start + piece.shape[1]] += torch.stack(
            [_count(piece, finite), _sum(wide.abs()), _sum(wide * wide), _count_not(wide, finite)]
        )
    return stats


def parameter_stats(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    groups: Sequence[int] | None = None,
    *,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum up every weight and its gradient, along rows (dimension 0) and columns (dimension 1).

    See `fastplastic.kernels.parameter_stats`.
    """
    table = parameter_tables(weights, gradients, groups, out)
    row = column = 0
    for weight, gradient, parts in zip(
        weights, gradients, groups or [1] * len(weights), strict=True
    ):
        stats = _one_dimension(weight, gradient, 0)
        table[0][:, row : row + weight.shape[0]] += stats[_OF_ROWS]
        row += weight.shape[0]
        size = weight.shape[0] // parts
        for group in range(parts):
            rows = slice(group * size, (group + 1) * size)
            part = _one_dimension(weight[rows], None if gradient is None else gradient[rows], 1)
            table[1][:, column : column + weight.shape[1]] += part[_OF_COLUMNS]
            column += weight.shape[1]
    return table


def _one_dimension(weight: Tensor, gradient: Tensor | None, dim: int) -> Tensor:
    """Return float64 [9, D], rows as in `_SUMS`, for each index along one dimension."""
    tensors = (weight,) if gradient is None else (weight, gradient)
    stats = weight.new_zeros(len(_SUMS), weight.shape[dim], dtype=torch.float64)
    for start, pieces in _pieces(tensors, dim):
        total = stats[:, start : start + pieces[0].shape[1]]
        w = pieces[0].double()
        total[:3] += torch.stack([_count(w, None), _sum(w.abs()), _sum(w * w)])
        if gradient is not None:
            total[3:] += _parameter_gradient_piece(w, pieces[1])
    return stats


def _activation_piece(z: Tensor, name: str, slope: float | None) -> Tensor:
    """Return [9, C] of one piece [A, C, B]."""
    h = _activated(z, name, slope)
    wide, finite = _finite_float64(h, z)
    low, high = (
        (wide, wide) if finite is None else (wide.where(finite, v) for v in (math.inf, -math.inf))
    )
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


def _activated(z: Tensor, name: str, slope: float | None) -> Tensor:
    return _FUNCTIONS[name](z) if slope is None else functional.leaky_relu(z, slope)


def _parameter_gradient_piece(w: Tensor, gradient: Tensor) -> Tensor:
    """Return the last six rows of `_SUMS` for one piece [A, D, B]."""
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
    intervals = FLAT.get(name, ())
    counts = z.new_zeros(z.shape[1], dtype=torch.float64)
    if not intervals:
        return counts
    # A NaN is in no interval. The intervals are disjoint, so their counts add up.
    wide = z.double() if finite is None else z.double().where(finite, torch.nan)
    inside = torch.empty_like(wide)
    for low, high in intervals:
        # Written as numbers, because a comparison that makes bool is several times as slow.
        if high < math.inf:
            counts += _sum(torch.le(wide, high, out=inside))
        else:
            counts += _count(z, finite)
        if low > -math.inf:
            counts -= _sum(torch.lt(wide, low, out=inside))
    return counts
