"""L2-init: pull the weights to where they began."""

from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from fastplastic.errors import InputError
from fastplastic.model import check_built
from fastplastic.reinit import OptimizerState, optimizers_of

# What pulls the weights of a model.
_PULLING: "WeakKeyDictionary[nn.Module, ref[L2Init]]" = WeakKeyDictionary()


class L2Init:
    """Add strength * norm(w - w_0)^2 to the loss, with w_0 the weights when this was made.

    The gradient 2 strength (w - w_0) is added to that of the loss when the optimizer makes its
    step: as of a term of the loss, up to rounding, but without a graph for it, and gradients are
    clipped without it.

        L2Init(model, optimizer, strength=1e-2)

    Source: Kumar, Marklund and Van Roy, "Maintaining plasticity in continual learning via
    regenerative regularization", arXiv 2308.11958.

    Args:
        model: The model, as it is to be pulled to.
        optimizer: Its optimizer.
        strength: More than 0.

    Raises:
        InputError: `strength` is not more than 0, the optimizer is not that of the model, or
            another L2Init pulls it.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, *, strength: float = 1e-2) -> None:
        if not strength > 0:
            raise InputError(f"strength is {strength!r}, expected more than 0, such as 1e-2")
        check_built(model)
        OptimizerState(optimizer, model)
        pulling = _PULLING.get(model)
        if pulling is not None and pulling() is not None:
            raise InputError("an L2Init pulls this model already: remove() it first")
        self._strength = float(strength)
        self._model = model
        self._begun = {name: p.detach().clone() for name, p in model.named_parameters()}
        innermost = list(optimizers_of(optimizer))[-1]
        self._handle: RemovableHandle | None = innermost.register_step_pre_hook(self._pull)
        _PULLING[model] = ref(self)

    def remove(self) -> None:
        """Pull no more."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
            _PULLING.pop(self._model, None)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the weights that are pulled to."""
        return dict(self._begun)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Pull to the weights that `state_dict` gave; InputError when they are of another model."""
        if {n: w.shape for n, w in state.items()} != {n: w.shape for n, w in self._begun.items()}:
            raise InputError("the state is of another model, expected that of this L2Init")
        self._begun = {name: state[name].clone().to(own) for name, own in self._begun.items()}

    def _pull(self, *_: Any) -> None:
        with torch.no_grad():
            for name, parameter in self._model.named_parameters():
                begun = self._begun.get(name)
                if parameter.grad is not None and begun is not None:
                    parameter.grad.add_(parameter - begun, alpha=2 * self._strength)
