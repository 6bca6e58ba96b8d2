"""Keep plasticity while a network is trained: re-initialisation on a schedule."""

from fastplastic.training.methods import METHODS, Method
from fastplastic.training.recycler import Recycler
from fastplastic.training.resets import Reset

__all__ = ["METHODS", "Method", "Recycler", "Reset"]
