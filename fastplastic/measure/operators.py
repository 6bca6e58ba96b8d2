"""The statistics as operators of torch: torch.compile keeps them in its graphs, without a break.

Each adds to a table in place and returns nothing, so the table stays where it is. They take the
whole table and the first slot: of several views of one table, the compiler would make copies.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastplastic.kernels import activation_stats, gradient_stats
from fastplastic.measure.padding import tokens_of, unpadded

# Of the modules of a model together.
MODES = ("train", "eval", "mixed")
# Where `add_call` counts the calls with padding.
MASKED = 2
# The kernels take any strides, so that the compiler need not copy into those of eager code.
_TAGS = (torch.Tag.flexible_layout,)
# The operators are gone when this is.
_LIBRARY: Any = torch.library.Library("fastplastic", "FRAGMENT")  # type: ignore[no-untyped-call]


def _operator(changed: str) -> Callable[[Callable[..., None]], Any]:
    """Make an operator of a function that changes one of its tensors.

    Of `torch.library.custom_op` each call passes several functions in Python, for gradients that
    nothing here has: 7.3 us of an empty operator, where this takes 3.0.
    """

    def register(function: Callable[..., None]) -> Any:
        name = f"fastplastic::{function.__name__}"
        schema = torch.library.infer_schema(function, mutates_args=(changed,))
        torch.library.define(name, schema, lib=_LIBRARY, tags=_TAGS)
        # On every device; without gradients.
        torch.library.impl(name, "CompositeExplicitAutograd", function, lib=_LIBRARY)
        torch.library.register_fake(name, _nothing, lib=_LIBRARY)
        return getattr(torch.ops.fastplastic, function.__name__).default

    return register


def _nothing(*_: object) -> None:
    """Return nothing, of tensors without values."""


@_operator("table")
def add_activations(
    x: Tensor,
    axis: int,
    start: int,
    stop: int,
    activation: str,
    table: Tensor,
    slot: int,
    mask: Tensor | None,
) -> None:
    """Add the statistics of some channels of pre-activations to a table.

    Args:
        x: Pre-activations z, floating point, any shape and strides.
        axis: Dimension of the channels.
        start: First channel.
        stop: Where the channels end.
        activation: Name of f in h = f(z).
        table: float64 [9, slots], rows as in `ACTIVATION_ROWS`.
        slot: Column of the first channel.
        mask: [batch, tokens], 0 where a token is padding; None for no padding.
    """
    z, along = unpadded(x, axis, None if mask is None else tokens_of(mask))
    part = z if stop - start == z.shape[along] else z.narrow(along, start, stop - start)
    activation_stats(part, along, activation, out=table[:, slot : slot + stop - start])


@_operator("table")
def add_gradients(g: Tensor, axis: int, table: Tensor, slot: int, mask: Tensor | None) -> None:
    """Add the statistics of gradients to a table.

    Args:
        g: dL/dh, floating point, any shape and strides.
        axis: Dimension of the channels.
        table: float64 [4, slots], rows as in `GRADIENT_ROWS`.
        slot: Column of the first channel.
        mask: [batch, tokens], 0 where a token is padding; None for no padding.
    """
    part, along = unpadded(g, axis, None if mask is None else tokens_of(mask))
    gradient_stats(part, along, out=table[:, slot : slot + part.shape[along]])


@_operator("counts")
def add_call(counts: Tensor, samples: int, kind: int, mask: Tensor | None) -> None:
    """Count a call of a model.

    Args:
        counts: int64 [3 + len(MODES)]: calls, samples, calls with padding, calls in each mode.
        samples: Size of the batch.
        kind: Which of `MODES`.
        mask: [batch, tokens], 0 where a token is padding; None for no padding.
    """
    counts[0] += 1
    counts[1] += samples
    if mask is not None:
        counts[MASKED] += (mask == 0).any()
    counts[3 + kind] += 1
