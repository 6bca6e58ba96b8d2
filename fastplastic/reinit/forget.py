"""Let what an optimizer remembers of whole parameters begin anew."""

from collections.abc import Mapping
from functools import partial

from torch import Tensor

from fastplastic.reinit.optimizer_state import OptimizerState, set_step, step_of
from fastplastic.reinit.transaction import Undo


def forget(state: OptimizerState, weights: Mapping[str, Tensor], undo: Undo) -> None:
    """Let what is remembered of parameters begin anew.

    Args:
        state: Of the optimizer.
        weights: Name -> the fresh values.
        undo: Takes what undoes it.
    """
    for own in state.tensors(weights):
        tensor = own.tensor.detach()
        undo.keep(partial(tensor.copy_, tensor.clone()))
        if own.start is None:
            tensor.copy_(weights[own.name].detach())
        else:
            tensor.fill_(own.start)
    for step in state.steps(weights):
        undo.keep(partial(set_step, *step, step_of(*step)))
        set_step(*step, 0)
