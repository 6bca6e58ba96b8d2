"""From which distribution the fresh values of each parameter are drawn."""

from fastplastic.initial.initializers import (
    INITIALIZERS,
    SUMMARIES,
    Initializer,
    Target,
    make_initializer,
)
from fastplastic.initial.laws import normal

__all__ = ["INITIALIZERS", "SUMMARIES", "Initializer", "Target", "make_initializer", "normal"]
