"""Keep plasticity while a network is trained: re-initialisation on a schedule, and a pull."""

from fastplastic.training.anchor import L2Init
from fastplastic.training.methods import METHODS, Method, method_of
from fastplastic.training.recycler import Recycler
from fastplastic.training.resets import Reset
from fastplastic.training.watch import StepWatch

__all__ = ["METHODS", "L2Init", "Method", "Recycler", "Reset", "StepWatch", "method_of"]
