"""What Numba lacks for fast reductions: lanes on the stack, and memory by address.

Sums go into arrays of lanes on the stack of one function. Only of those does LLVM know that
nothing else points into them, and so it turns the loop over lanes into vector instructions without
reordering a single float operation.
"""

from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from fastplastic.kernels.cpu.compiling import inline, inline_sums

# Lanes per statistic: 64 KiB in all, which stays in the L1 and L2 caches.
LANES = 2048


def _stack_of(kind: Any) -> Any:
    def stack(typing: Any) -> Any:
        signature = types.CPointer(kind)()

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            element = context.get_value_type(kind)
            lanes = cgutils.alloca_once(builder, ir.ArrayType(element, LANES))
            lanes.align = 64
            return builder.bitcast(lanes, element.as_pointer())

        return signature, generate

    return intrinsic(stack)


def _pointer_to(kind: Any) -> Any:
    def pointer(typing: Any, address: Any) -> Any:
        signature = types.CPointer(kind)(types.int64)

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            element = context.get_value_type(kind)
            return builder.inttoptr(arguments[0], element.as_pointer())

        return signature, generate

    return intrinsic(pointer)


def _generate_next(typing: Any, counter: Any) -> Any:
    """Return the int64 at an address, and add 1 to it; no two threads get the same.

    Whoever gets a number sees all that was written before the lower ones were taken.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        one = context.get_constant(types.int64, 1)
        pointer = builder.inttoptr(arguments[0], one.type.as_pointer())
        return builder.atomic_rmw("add", pointer, one, "acq_rel")

    return types.int64(types.int64), generate


# Compiled code calls it with the address alone.
next_task: Any = intrinsic(_generate_next)
float_lanes = _stack_of(types.float32)
count_lanes = _stack_of(types.int32)
int_at = _pointer_to(types.int64)
double_at = _pointer_to(types.float64)
float_at = _pointer_to(types.float32)
short_at = _pointer_to(types.uint16)
byte_at = _pointer_to(types.uint8)


@inline
def load_float32(address: Any, index: Any) -> Any:
    """Return a float32 element."""
    return float_at(address)[index]


@inline
def load_bfloat16(address: Any, index: Any) -> Any:
    """Return a bfloat16 element: the upper half of a float32."""
    bits = np.uint32(short_at(address)[index])
    return np.uint32(bits << np.uint32(16)).view(np.float32)


_SIGN = np.uint32(0x8000)
_REST = np.uint32(0x7FFF)
_REBIAS = np.float32(2.0**112)
_TOO_LARGE = np.float32(65536.0)
_INFINITY = np.float32(np.inf)


@inline
def load_float16(address: Any, index: Any) -> Any:
    """Return a float16 element; its NaNs become infinities, both are only counted."""
    bits = np.uint32(short_at(address)[index])
    # Moved into place, the exponent is 112 too small, also that of a denormal.
    size = np.uint32(np.uint32(bits & _REST) << np.uint32(13)).view(np.float32) * _REBIAS
    size = size if size < _TOO_LARGE else _INFINITY
    sign = np.uint32(np.uint32(bits & _SIGN) << np.uint32(16))
    return np.uint32(np.float32(size).view(np.uint32) | sign).view(np.float32)


# dtype -> its name in the spec of a kernel.
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
# Name of a dtype -> its loader (address, index) and the bytes of an element.
LOADERS = {
    "float32": (load_float32, 4),
    "bfloat16": (load_bfloat16, 2),
    "float16": (load_float16, 2),
}


@inline_sums
def total_of(lane: Any, begin: Any, end: Any) -> Any:
    """Return the sum of lanes, which need not be finite."""
    total = np.float64(0)
    for j in range(begin, end):
        total += np.float64(lane[j])
    return total


@inline
def add_each(lane: Any, begin: Any, end: Any, out: Any, row: Any, unit: Any) -> None:
    """Add lanes to one statistic of as many units."""
    target = out[row, unit : unit + end - begin]
    for j in range(end - begin):
        target[j] += lane[begin + j]
