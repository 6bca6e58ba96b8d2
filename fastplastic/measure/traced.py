"""What hooks put into a graph while torch.compile makes it."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from torch import Tensor

from fastplastic.measure.compiled import DEVICES, GRADIENTS, TRACES_GRADIENTS, break_graph
from fastplastic.measure.hooks import hook_gradient
from fastplastic.measure.operators import add_activations, add_gradients
from fastplastic.measure.positions import PositionSample
from fastplastic.measure.slots import TensorRead
from fastplastic.measure.sums import DeviceSums


class _Late(NamedTuple):
    """Activations to read, arguments as in `TracedReads.add`."""

    reads: Sequence[TensorRead]
    z: Tensor
    table: Tensor
    mask: Tensor | None


class TracedReads:
    """Puts what is read of tensors into the graph that is being compiled.

    Activations are read by the next hook. If their operator came before the functions that take z
    further, the compiler would keep what those give for the backward pass and would not make it
    anew (`ban_recompute_used_far_apart` in torch/_functorch/config.py): more memory, and fewer
    operations fused. A step of ResNet-18 took 15 % longer for it.

    Args:
        gradients: Whether to read gradients too.
        positions: Picks the positions that are read.

    Attributes:
        sums: The tables that compiled code adds to; None where it cannot.
    """

    def __init__(self, gradients: bool, positions: PositionSample) -> None:
        self.sums: DeviceSums | None = None
        self._gradients, self._obstacle = gradients, positions.obstacle
        # At most one; a list, since torch 2.14 forgets attributes as it traces gradient hooks.
        self._late: list[_Late] = []

    def add(
        self, reads: Sequence[TensorRead], tensor: Tensor | None, mask: Tensor | None, inside: bool
    ) -> bool:
        """Read a tensor, or end the graph.

        Args:
            reads: What is read.
            tensor: What the module is given or returns.
            mask: [batch, tokens], 0 where a token is padding; None for no padding.
            inside: Whether the body of a higher-order operator is traced.

        Returns:
            Whether it could be.
        """
        if not inside:
            self.finish()
        if self.sums is None:
            break_graph(self._obstacle or DEVICES)
            return False
        for read in reads:
            if tensor is None or not read.fits(tensor):
                break_graph(f"{read.layers}: {read.misfit(tensor)}")
                return False
        assert tensor is not None
        wanted = self._gradients and tensor.requires_grad
        slots = [(r.axis, r.gradients) for r in reads if wanted and r.gradients is not None]
        if slots and not TRACES_GRADIENTS:
            break_graph(GRADIENTS)
            return False
        late = _Late(reads, tensor.detach(), self.sums.activations, mask)
        # Nothing can be left for later in there. Without a function, as of logits, it is of no use.
        if inside or all(run.activation == "identity" for r in reads for run in r.activations):
            _add_activations(late)
        else:
            # A copy, for z may be overwritten by then. The compiler takes it out where it is not.
            self._late.append(late._replace(z=late.z.clone()))
        for axis, slot in slots:
            hook_gradient(tensor, partial(_add_gradients, axis, self.sums.gradients, slot, mask))
        return True

    def finish(self) -> None:
        """Read what is still to be read."""
        while self._late:
            _add_activations(self._late.pop())


def _add_activations(late: _Late) -> None:
    for read in late.reads:
        for run in read.activations:
            add_activations(
                late.z, read.axis, run.start, run.stop, run.activation, late.table, run.slot,
                late.mask,
            )  # fmt: skip


def _add_gradients(
    axis: int, table: Tensor, slot: int, mask: Tensor | None, gradient: Tensor
) -> None:
    add_gradients(gradient, axis, table, slot, mask)
