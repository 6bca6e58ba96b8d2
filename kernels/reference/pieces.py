"""How the reference reads tensors: in pieces that stay in the cache, and in float64.

Pieces follow the strides: no float64 copy of a whole tensor is made, and no layout needs one.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from fastplastic.kernels.strides import pieces_of

# Elements per piece. Torch runs an operation on fewer than 2**15 elements on one thread: with few
# threads, waiting for each other after every small step costs more than it gains (four times the
# time where another program runs). With many, each gets 1 MiB in float64, which stays in its cache.
# A GPU wants few, large kernels.
_PIECE_SERIAL = (1 << 15) - 1
_PIECE_PER_THREAD = 1 << 17
_PIECE_GPU = 1 << 24
_FEW_THREADS = 4


def pieces(tensors: tuple[Tensor, ...], axis: int) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
    """Yield (first unit, pieces [A, C', B]) that together cover tensors of one shape once."""
    first = tensors[0]
    if first.numel() == 0:
        return
    detached = tuple(tensor.detach() for tensor in tensors)
    yield from pieces_of(detached, axis, _piece_size(first.device))


def _piece_size(device: torch.device) -> int:
    if device.type != "cpu":
        return _PIECE_GPU
    threads = torch.get_num_threads()
    return _PIECE_SERIAL if threads <= _FEW_THREADS else _PIECE_PER_THREAD * threads


def finite_float64(value: Tensor, source: Tensor) -> tuple[Tensor, Tensor | None]:
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


def total(piece: Tensor) -> Tensor:
    """Return the sum over the positions of each unit, [C] of [A, C, B]."""
    return piece.sum((0, 2))


def count(piece: Tensor, finite: Tensor | None) -> Tensor:
    """Return the number of finite positions of each unit; None for all."""
    if finite is not None:
        return total(finite).double()
    ahead, units, behind = piece.shape
    return piece.new_full((units,), ahead * behind, dtype=torch.float64)


def count_not(piece: Tensor, finite: Tensor | None) -> Tensor:
    """Return the number of positions of each unit that are not finite."""
    if finite is not None:
        return total(~finite).double()
    return piece.new_zeros(piece.shape[1], dtype=torch.float64)
