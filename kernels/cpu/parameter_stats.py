"""Numba: row and column sums of all weights and their gradients, in one launch over all of them.

    rows     [8, sum D0]           n, sum |w|, sum w^2, n_dw, sum |dw|, sum dw^2, sum |w dw|, #bad
    columns  [6, sum groups * D1]  n, sum |w|, sum w^2, n_dw, sum w dw, #bad

The kernels are in `parameter_kernels.py`; what they read is told by a plan and tasks (`lines.py`).
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastplastic.kernels.cpu.lines import LineMatrix, matrix_of, tasks_of
from fastplastic.kernels.cpu.memory import NAMES
from fastplastic.kernels.cpu.parameter_kernels import SUMS, VARYING, fold_kernel, read_kernel
from fastplastic.kernels.cpu.tasks import LOCK, Work, scratch
from fastplastic.kernels.reference import parameter_stats as reference
from fastplastic.kernels.tables import parameter_tables


def parameter_stats(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    groups: Sequence[int] | None = None,
    *,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum up weights and gradients, as the reference, on the CPU."""
    tables = parameter_tables(weights, gradients, groups, out)
    parts = [1] * len(weights) if groups is None else list(groups)
    launches: dict[str, list[_Entry]] = {}
    row = column = 0
    for weight, gradient, number in zip(weights, gradients, parts, strict=True):
        place = (row, column)
        row, column = row + weight.shape[0], column + number * weight.shape[1]
        entry = _entry(weight.detach(), gradient, number, place)
        if entry is None:
            _by_reference(weight, gradient, number, place, tables)
        elif weight.numel():
            launches.setdefault(entry.spec, []).append(entry)
    for spec, entries in launches.items():
        _launch(spec, entries, tables)
    return tables


class _Entry(NamedTuple):
    """One weight of a launch; the tensors are kept alive."""

    spec: str
    matrix: LineMatrix
    weight: Tensor
    gradient: Tensor | None
    place: tuple[int, int]


def _entry(
    weight: Tensor, gradient: Tensor | None, groups: int, place: tuple[int, int]
) -> _Entry | None:
    """Return a weight as lines, copied where its strides do not allow that; None for float64."""
    if weight.dtype not in NAMES or (gradient is not None and gradient.dtype not in NAMES):
        return None
    matrix = matrix_of(tuple(weight.shape), weight.stride(), groups)
    if matrix is None:
        weight = weight.contiguous()
        matrix = matrix_of(tuple(weight.shape), weight.stride(), groups)
        assert matrix is not None
    if gradient is not None:
        gradient = gradient.detach()
        if matrix_of(tuple(gradient.shape), gradient.stride(), groups) == matrix:
            pass
        elif weight.is_contiguous() and gradient.movedim(1, -1).is_contiguous():
            # As compiled convolutions give it: torch needs longer to copy it than this to read it.
            matrix = matrix._replace(apart=matrix.repeat)
        else:
            gradient = torch.empty_like(weight, dtype=gradient.dtype).copy_(gradient)
    kind = "none" if gradient is None else NAMES[gradient.dtype]
    direction = "columns" if matrix.by_columns else "rows"
    return _Entry(f"{NAMES[weight.dtype]}:{kind}:{direction}", matrix, weight, gradient, place)


def _by_reference(
    weight: Tensor,
    gradient: Tensor | None,
    groups: int,
    place: tuple[int, int],
    tables: tuple[Tensor, Tensor],
) -> None:
    row, column = place
    rows = tables[0][:, row : row + weight.shape[0]]
    columns = tables[1][:, column : column + groups * weight.shape[1]]
    reference.parameter_stats([weight], [gradient], [groups], out=(rows, columns))


def _launch(spec: str, entries: Sequence[_Entry], tables: tuple[Tensor, Tensor]) -> None:
    launch = _prepared(
        spec, tuple(entry.matrix for entry in entries), tuple(entry.place for entry in entries)
    )
    # Sums along a line go to the table of its own direction, those across lines to the other.
    along, across = tables[::-1] if entries[0].matrix.by_columns else tables
    target = (along.data_ptr(), along.stride(0), across.data_ptr(), across.stride(0))
    with LOCK:
        for row, entry in enumerate(entries):
            launch.plan[row, 0] = entry.weight.data_ptr()
            if entry.gradient is not None:
                launch.plan[row, 1] = entry.gradient.data_ptr()
        parts = scratch(launch.scratch)
        for work in launch.works:
            work.run(parts, *target)


class _Launch(NamedTuple):
    """What reads weights of given shapes: kernels in turn, and float64 of scratch.

    Attributes:
        plan: int64 [weights, fields]; addresses go to the first two fields.
        tasks: int64 [tasks, 3], kept alive for the kernels.
    """

    works: tuple[Work, ...]
    scratch: int
    plan: Any
    tasks: Any


@lru_cache(maxsize=4096)
def _prepared(
    spec: str, matrices: tuple[LineMatrix, ...], places: tuple[tuple[int, int], ...]
) -> _Launch:
    """Prepare to read weights whose sums have these places in the tables."""
    plan, tasks, slots = tasks_of(matrices)
    found = np.array(places, dtype=np.int64)
    plan[:, 2:4] = found[:, ::-1] if matrices[0].by_columns else found
    fixed = (plan.ctypes.data, tasks.ctypes.data)
    read, fold = read_kernel(spec), fold_kernel(spec)
    works = [Work(read, len(tasks), fixed, varying=VARYING, after=fold)]
    if len(matrices) > 1:
        launches = ((read, len(tasks)), (fold, len(matrices)))
        works = [Work(kernel, number, fixed, varying=VARYING) for kernel, number in launches]
    return _Launch(tuple(works), slots * SUMS, plan, tasks)
