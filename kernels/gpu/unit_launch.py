"""How activation_stats and gradient_stats are launched, over one tensor or over many at once."""

from collections.abc import Sequence

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
    stream_of,
)
from fastplastic.kernels.gpu.unit_sums import unit_kernel
from fastplastic.kernels.gpu.unit_tables import Form, UnitTables, layout_of, tables_for


def add_unit_sums(
    tensors: Sequence[Tensor],
    axes: Sequence[int],
    activations: Sequence[str],
    columns: Sequence[int],
    out: Tensor,
    min_row: int | None = None,
) -> None:
    """Add the sums over tensors to a table: one launch for each dtype and function, and one fold.

    Args:
        tensors: Floating point but float64, with elements, on one device.
        axes: Dimension of the units of each, from 0 on.
        activations: Name of f for each, "" for gradients.
        columns: First column of the table for each.
        out: float64 [rows, columns] with adjacent columns, added to in place.
        min_row: Row that holds minima; the next one holds maxima. None where all rows are sums.
    """
    device, rows = out.device, len(out)
    check_devices(tensors, device)
    with launching(device):
        # Copies live until the launches are queued.
        read = [_readable(x, axis) for x, axis in zip(tensors, axes, strict=True)]
        forms = tuple(map(_form, read, axes, activations))
        plan = tables_for(forms, tuple(columns), rows, device, stream_of(device))
        one = read[0] if len(read) == 1 else None
        addresses = None
        if one is None:
            addresses = plan.addresses.of(tuple((x.data_ptr(),) for x in read), 1, device)
        keep_for_graph(device, plan, addresses)
        parts = scratch(device, (plan.parts * rows,))
        _launch(plan, one, addresses, parts)
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


def _readable(x: Tensor, axis: int) -> Tensor:
    x = x.detach()
    return x.contiguous() if layout_of(tuple(x.shape), x.stride(), axis) is None else x


def _form(x: Tensor, axis: int, activation: str) -> Form:
    aligned = x.data_ptr() % launch.VECTOR_BYTES == 0
    return Form(tuple(x.shape), x.stride(), axis, x.dtype, aligned, activation)


def _launch(plan: UnitTables, one: Tensor | None, addresses: Tensor | None, parts: Tensor) -> None:
    for kind, (begin, end) in plan.launches.items():
        unit_kernel[(end - begin,)](
            one,
            addresses,
            plan.tensors,
            plan.items,
            parts,
            begin,
            TYPE=TYPES[kind.dtype],
            **traits(kind.activation, kind.dtype),
            **launch.OPTIONS,
        )
