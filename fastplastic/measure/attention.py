"""Pre-activations of `nn.MultiheadAttention`, which multiplies its inputs in one function.

No hook sees what comes out of its input projections. Their values are computed once more; their
gradients are those that the operators of its weights are given in the backward pass.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.nn.functional import linear

from fastplastic.wiring import ARGUMENTS, Argument

_SPLITS = ("SplitBackward0", "SplitWithSizesBackward0")
_VIEWS = (*_SPLITS, "TBackward0", "TransposeBackward0", "ToCopyBackward0")
_SIGNATURE = signature(nn.MultiheadAttention.forward)


@dataclass(frozen=True, eq=False)
class Projection:
    """What one call of an attention multiplies with one of its arguments.

    Attributes:
        source: That argument, [..., columns of the weight].
        inputs: All arguments.
        weight: Weight of the module.
        bias: Bias of all its projections, or None.
        start: First row of the weight that is multiplied.
        rows: How many rows are.
        bias_start: First entry of the bias that is added.
        turned: Whether the module works on the argument with its first two dimensions swapped.
    """

    source: Tensor
    inputs: tuple[Tensor, ...]
    weight: Tensor
    bias: Tensor | None
    start: int
    rows: int
    bias_start: int
    turned: bool

    def values(self) -> Tensor:
        """Return the pre-activations, [..., rows]."""
        with torch.no_grad():
            bias = None if self.bias is None else self.bias.narrow(0, self.bias_start, self.rows)
            return linear(self.source, self.weight.narrow(0, self.start, self.rows), bias)

    def hook_gradient(self, output: Tensor, hook: Callable[[Tensor], None]) -> None:
        """Call the hook with the gradient, [..., rows], whenever one is computed.

        Args:
            output: What the module returned.
            hook: Called on a thread of the autograd engine.
        """
        if not self.weight.requires_grad:
            return
        shape = self.source.shape[:-1]
        for node, part in _products(output, self.weight, self.inputs):
            # Before the second and third part of the weight are those of one and two arguments.
            begin = self.start - part * (self.weight.shape[0] // len(ARGUMENTS))
            if begin >= 0:
                # It holds no tensor: one that is recomputed (checkpointing) is not to live on.
                see = partial(_see, range(begin, begin + self.rows), shape, self.turned, hook)
                node.register_prehook(see)


def _see(
    rows: range, shape: torch.Size, turned: bool, hook: Callable[[Tensor], None],
    gradients: Sequence[Tensor | None],
) -> None:  # fmt: skip
    """Call the hook with some rows of what an operator is given, in the shape of its argument."""
    whole = gradients[0]
    if whole is None or rows.stop > whole.shape[-1]:
        return
    if whole.numel() != shape.numel() * whole.shape[-1]:
        return
    own = whole.narrow(-1, rows.start, len(rows)).reshape(*(shape[::-1] if turned else shape), -1)
    hook(own.transpose(0, 1) if turned else own)


def projection(
    attention: nn.MultiheadAttention, where: Argument, args: Any, kwargs: Mapping[str, Any]
) -> Projection:
    """Return what a call of a module with these arguments multiplies with one of them."""
    given = _SIGNATURE.bind(attention, *args, **kwargs).arguments
    inputs = tuple(given[name] for name in ARGUMENTS)
    place = ARGUMENTS.index(where)
    source, rows = inputs[place], attention.embed_dim
    weight, start = attention.in_proj_weight, place * rows
    first = start
    if weight is None:
        weight, first = getattr(attention, f"{where[0]}_proj_weight"), 0
    turned = attention.batch_first and source.ndim == 3
    return Projection(source, inputs, weight, attention.in_proj_bias, first, rows, start, turned)


def _products(
    output: Tensor, weight: Tensor, inputs: Iterable[Tensor]
) -> Iterator[tuple[Node, int]]:
    """Yield the operators that multiply with a weight, each with the number of its part of it."""
    seen = {None, *(tensor.grad_fn for tensor in inputs)}
    todo = [output.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        for source, number in node.next_functions:
            part = _part(source, number, weight)
            if part is not None:
                yield node, part
            todo.append(source)


def _part(node: Node | None, number: int, weight: Tensor) -> int | None:
    """Return which part of a weight an operator reads, 0 for all of it; None for another tensor.

    Args:
        node: Where the gradient to its argument goes.
        number: Which output of that node's forward operator the argument is.
        weight: A parameter.
    """
    part = 0
    while node is not None and node.name() in _VIEWS:
        if node.name() in _SPLITS:
            part = number
        node, number = node.next_functions[0]
    return part if getattr(node, "variable", None) is weight else None
