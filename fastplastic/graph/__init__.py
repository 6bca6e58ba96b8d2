"""The unit graph: which rows make a unit, what reads it, and whether it can be re-initialised."""

from fastplastic.graph.build import build_graph

__all__ = ["build_graph"]
