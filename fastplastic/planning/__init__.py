"""From scores to a plan: which units or single weights to re-initialise. No model is seen here."""

from fastplastic.planning.planner import Plan, control, plan, plan_of_units
from fastplastic.planning.request import (
    DEFAULT_CRITERIA,
    GRANULARITIES,
    SCOPES,
    Request,
    matching,
    some_of,
)
from fastplastic.planning.units import scored_units

__all__ = [
    "DEFAULT_CRITERIA",
    "GRANULARITIES",
    "SCOPES",
    "Plan",
    "Request",
    "control",
    "matching",
    "plan",
    "plan_of_units",
    "scored_units",
    "some_of",
]
