"""How activation_stats and gradient_stats are launched, over one tensor or over many at once."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastplastic.kernels.gpu import launch
from fastplastic.kernels.gpu.fold import fold_kernel
from fastplastic.kernels.gpu.functions import traits
from fastplastic.kernels.gpu.runtime import (
    TYPES,
    check_devices,
    keep_for_graph,
    launching,
    scratch,
)
from fastplastic.kernels.gpu.unit_sums import unit_kernel
from fastplastic.kernels.gpu.unit_tables import Form, UnitTables, layout_of, maskable, tables_for
from fastplastic.kernels.tables import counted


class UnitRead(NamedTuple):
    """A tensor to read.

    Attributes:
        tensor: Floating point but float64, with elements.
        axis: Dimension of its units, from 0 on.
        activation: Name of f, "" for gradients.
        column: First column of the table that its units are added to.
        mask: bool, which positions count, in their logical order; None for all.
    """

    tensor: Tensor
    axis: int
    activation: str
    column: int
    mask: Tensor | None = None


def add_unit_sums(reads: Sequence[UnitRead], out: Tensor, min_row: int | None = None) -> None:
    """Add the sums over tensors to a table: one launch for each dtype and function, and one fold.

    Args:
        reads: At least one, on the device of the table.
        out: float64 [rows, columns] with adjacent columns, added to in place.
        min_row: Row that holds minima; the next one holds maxima. None where all rows are sums.
    """
    device, rows = out.device, len(out)
    check_devices((tensor for read in reads for tensor in (read.tensor, read.mask)), device)
    with launching(device):
        # Copies live until the launches are queued.
        tensors, masks = zip(*map(_readable, reads), strict=True)
        forms = tuple(map(_form, tensors, masks, reads))
        columns = tuple(read.column for read in reads)
        plan = tables_for(forms, columns, rows, device)
        plan.filled.wait()
        pairs = zip(tensors, masks, strict=True)
        addresses = tuple((x.data_ptr(), 0 if m is None else m.data_ptr()) for x, m in pairs)
        # One address needs no table.
        table = None if len(addresses) == 1 else plan.addresses.of(addresses, device)
        keep_for_graph(device, plan, table)
        parts = scratch(device, (plan.parts * rows,))
        _launch(plan, (*addresses[0], table), parts)
        fold_kernel[(len(plan.folds), rows)](
            plan.folds,
            parts,
            out,
            out.stride(0),
            MIN_ROW=rows if min_row is None else min_row,
            BLOCK_SPLITS=launch.FOLD_PARTS,
            BLOCK_UNITS=launch.FOLD_UNITS,
            **launch.OPTIONS,
        )


def maskable_of(x: Tensor, axis: int, mask: Tensor | None) -> tuple[Tensor, int, Tensor | None]:
    """Return what to read, its axis and mask: a copy where a mask cannot be read beside it."""
    if mask is None or (x.dtype != torch.float64 and x.shape[axis] > 1):
        return x, axis, mask
    return counted(x, axis, mask), 1, None


def _readable(read: UnitRead) -> tuple[Tensor, Tensor | None]:
    """Return a tensor that can be read without another copy, and its mask."""
    x = read.tensor.detach()
    plan = layout_of(tuple(x.shape), x.stride(), read.axis)
    if read.mask is None:
        return (x.contiguous() if plan is None else x), None
    in_order = plan is not None and maskable(plan) and _falling(x, read.axis)
    if not in_order:
        # Units last, the other dimensions as they are.
        x = x.movedim(read.axis, -1).contiguous().movedim(-1, read.axis)
    return x, read.mask.contiguous().view(torch.uint8)


def _falling(x: Tensor, axis: int) -> bool:
    """Tell whether positions lie in memory in their logical order."""
    strides = [x.stride(d) for d in range(x.ndim) if d != axis and x.shape[d] > 1]
    return all(one > other for one, other in itertools.pairwise(strides))


def _form(x: Tensor, mask: Tensor | None, read: UnitRead) -> Form:
    aligned = x.data_ptr() % launch.VECTOR_BYTES == 0
    shape, masked = tuple(x.shape), mask is not None
    return Form(shape, x.stride(), read.axis, x.dtype, aligned, read.activation, masked)


def _launch(plan: UnitTables, given: tuple[int, int, Tensor | None], parts: Tensor) -> None:
    for kind, (begin, end) in plan.launches.items():
        unit_kernel[(end - begin,)](
            *given,
            plan.tensors,
            plan.items,
            parts,
            begin,
            TYPE=TYPES[kind.dtype],
            MASKED=kind.masked,
            **traits(kind.activation, kind.dtype),
            **launch.OPTIONS,
        )
