"""How single weights are scored: the one table that every backend, and the planner, reads."""

from typing import NamedTuple

import torch
from torch import Tensor


class Score(NamedTuple):
    """abs(w)^w abs(dw)^dw, factor by factor in float32; 0 for every weight where both are 0.

    Attributes:
        w: Power of the weight, 0 or more.
        dw: Power of its gradient, 0 or more.
    """

    w: int
    dw: int

    def of(self, weights: Tensor, gradients: Tensor | None) -> Tensor:
        """Return the scores, float32 in the shape of the weights.

        Args:
            weights: Weights, floating point.
            gradients: dL/dw in the shape of the weights; not read where `dw` is 0.
        """
        score = None
        for factor in [weights] * self.w + [gradients] * self.dw:
            assert factor is not None, self
            size = factor.float().abs()
            score = size if score is None else score * size
        return torch.zeros(weights.shape, device=weights.device) if score is None else score


# Criterion -> its score. Elements with the smallest scores come first, those with equal ones, so
# all of "random", in a seeded order.
SCORES = {
    "swr": Score(w=1, dw=1),
    "gradient": Score(w=0, dw=1),
    "magnitude": Score(w=1, dw=0),
    "random": Score(w=0, dw=0),
}
