"""What changed from one profile to another, and the conditions that it has to meet."""

from fastplastic.comparison.gates import Gate, GateResult, check_gates, check_patterns, parse_gates
from fastplastic.comparison.metrics import MEANS, METRICS, SHARES
from fastplastic.comparison.record import (
    ComparedProfile,
    FigureChange,
    LayerChange,
    ProfileComparison,
    TotalChange,
    UnmatchedLayer,
)
from fastplastic.comparison.run import compare, compare_figures, read_figures

__all__ = [
    "MEANS",
    "METRICS",
    "SHARES",
    "ComparedProfile",
    "FigureChange",
    "Gate",
    "GateResult",
    "LayerChange",
    "ProfileComparison",
    "TotalChange",
    "UnmatchedLayer",
    "check_gates",
    "check_patterns",
    "compare",
    "compare_figures",
    "parse_gates",
    "read_figures",
]
