"""From which distribution the fresh values of each parameter are drawn."""

from fastplastic.initial.initializers import INITIALIZERS, Initializer, Target, make_initializer
from fastplastic.initial.laws import normal

__all__ = ["INITIALIZERS", "Initializer", "Target", "make_initializer", "normal"]
