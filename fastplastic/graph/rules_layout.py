"""Rules for operators that move elements, pool over positions, or reduce dimensions."""

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fastplastic.graph.ledger import Ledger
from fastplastic.graph.nodes import base_name, op_name, shape_of
from fastplastic.graph.rules import rule, unknown
from fastplastic.graph.values import (
    CONST,
    Value,
    along,
    collapse,
    on_axis,
    plain,
    reduce_dims,
    values_in,
)

# These only move elements (or repeat them), so they are executed on the unit numbers.
LAYOUT = (
    "view reshape _unsafe_view permute transpose t flatten unflatten squeeze unsqueeze expand "
    "repeat tile select slice narrow split split_with_sizes chunk tensor_split unbind movedim "
    "moveaxis swapaxes swapdims roll flip rot90 pixel_shuffle pixel_unshuffle channel_shuffle "
    "native_channel_shuffle repeat_interleave unfold "
    "diagonal getitem"
).split()
# The second tensor gives its shape alone.
LAYOUT_AS = ("expand_as", "view_as", "reshape_as")
REDUCTIONS = (
    "mean sum amax amin var std logsumexp prod cumsum var_mean std_mean norm "
    "linalg_vector_norm normalize"
).split()
# Over units, these choose one of them: what then goes on is no function of each alone.
COMPARISONS = ("amax", "amin", "max", "min", "prod")
SPATIAL = {
    f"{kind}{n}d": n
    for n in (1, 2, 3)
    for kind in (
        "max_pool",
        "avg_pool",
        "adaptive_avg_pool",
        "adaptive_max_pool",
        "upsample_nearest",
        "_adaptive_avg_pool",
    )
} | {
    "upsample_bilinear2d": 2,
    "upsample_bicubic2d": 2,
    "upsample_linear1d": 1,
    "max_pool2d_with_indices": 2,
}


@rule(*LAYOUT, reads=(0, 1))
def layout(ledger: Ledger, node: Node, args: list[Any]) -> Any:
    value, name = args[0], base_name(op_name(node))
    if isinstance(value, list):
        return value[args[1]]
    if value.ids is None:
        return plain(node, value.const)
    if name == "repeat_interleave" and isinstance(args[1], Value):
        return unknown(ledger, node, args)
    if isinstance(args[-1], torch.dtype):
        return unknown(ledger, node, args)
    # The integers are expanded, so what is a view of the real tensor may need a copy of them.
    packet = getattr(torch.ops.aten, "reshape" if name in ("view", "_unsafe_view") else name)
    return _revalue(packet(value.ids, *args[1:], **node.kwargs), value.pristine)


@rule(*LAYOUT_AS, reads=(0,), shapes=(1,))
def layout_as(ledger: Ledger, node: Node, args: list[Any]) -> Any:
    value, shape = args[0], list(args[1].shape)
    if value.ids is None:
        return plain(node, value.const)
    moved = value.ids.expand(shape) if op_name(node) == "expand_as" else value.ids.reshape(shape)
    return _revalue(moved, value.pristine)


def _revalue(moved: Any, pristine: bool) -> Any:
    if isinstance(moved, Tensor):
        return Value(tuple(moved.shape), collapse(moved), pristine=pristine)
    return [_revalue(item, pristine) for item in moved]


@rule("cat", "concat", "concatenate", "stack", "hstack", "vstack")
def concat(ledger: Ledger, node: Node, args: list[Any]) -> Any:
    values = values_in(args[0])
    if all(value.ids is None for value in values):
        return plain(node, all(value.const for value in values))
    packet = getattr(torch.ops.aten, base_name(op_name(node)))
    moved = packet([value.filled() for value in values], *args[1:])
    return _revalue(moved, all(value.pristine or value.const for value in values))


@rule("pad", "constant_pad_nd")
def pad(ledger: Ledger, node: Node, args: list[Any]) -> Any:
    value = args[0]
    if value.ids is None:
        return plain(node, value.const)
    if len(args) > 2 and args[2] not in ("constant",) and op_name(node) == "pad":
        padded = torch.nn.functional.pad(value.ids.double(), args[1], args[2]).to(torch.int32)
    else:
        padded = torch.nn.functional.pad(value.ids, args[1], value=CONST)
    return Value(tuple(padded.shape), collapse(padded), pristine=value.pristine)


@rule("reflection_pad2d", "replication_pad2d", "reflection_pad1d", "replication_pad1d")
def mirror_pad(ledger: Ledger, node: Node, args: list[Any]) -> Any:
    return spatial(ledger, node, [args[0]])


@rule("im2col")
def im2col(ledger: Ledger, node: Node, args: list[Any]) -> Any:
    value = args[0]
    if value.ids is None:
        return plain(node, value.const)
    moved = torch.ops.aten.im2col(value.ids.double(), *args[1:]).to(torch.int32)
    return Value(tuple(moved.shape), collapse(moved))


@rule(*REDUCTIONS)
def reduction(ledger: Ledger, node: Node, args: list[Any]) -> Any:
    value, name = args[0], base_name(op_name(node))
    if value.ids is None:
        return plain(node, value.const)
    ledger.reductions.add(node)
    dims = node.kwargs.get("dim", args[1] if len(args) > 1 else None)
    if name in ("norm", "linalg_vector_norm"):
        dims = args[2] if len(args) > 2 else None
    dims = [dims] if isinstance(dims, int) else dims
    cut = reduce_dims(value.ids, dims) if isinstance(dims, (list, tuple)) and dims else None
    if cut is None:
        ledger.leak(value.ids, f"mixed by {name} over units")
        if name in COMPARISONS:
            ledger.opaque[node] = name
        return plain(node)
    out = node.meta["val"]
    if isinstance(out, (list, tuple)):
        return [_reshaped(cut, tuple(item.shape)) for item in out]
    return _reshaped(cut, shape_of(node))


def _reshaped(cut: Tensor, shape: tuple[int, ...]) -> Value:
    """Return the value of a reduction, with or without the reduced dimensions kept."""
    if cut.dim() == len(shape):
        return Value(shape, cut.expand(shape))
    return Value(shape, collapse(cut.reshape(shape)))


@rule(*SPATIAL)
def spatial(ledger: Ledger, node: Node, args: list[Any]) -> Any:
    """Pool or resize over positions: channels stay where they are."""
    value = args[0]
    if value.ids is None:
        return plain(node, value.const)
    out = node.meta["val"]
    first = out[0] if isinstance(out, (list, tuple)) else out
    digits = [int(char) for char in op_name(node) if char.isdigit()]
    axis = value.ids.dim() - digits[-1] - 1
    units = along(value.ids, axis)
    if units is None or first.dim() != value.ids.dim():
        ledger.leak(value.ids, f"passes through {op_name(node)}, which may mix units")
        return plain(node)
    if all(size == 1 for size in first.shape[axis + 1 :]):
        ledger.reductions.add(node)
    made = on_axis(units, axis, tuple(first.shape))
    return [made] * len(out) if isinstance(out, (list, tuple)) else made


@rule("softmax", "log_softmax", "_softmax", "_log_softmax")
def softmax(ledger: Ledger, node: Node, args: list[Any]) -> Any:
    """Give up on scores: over units they are mixed, over positions no activation function."""
    ledger.leak(args[0].ids, "mixed by a softmax")
    return plain(node)
