"""From scores to a plan: which units or single weights to re-initialise. No model is seen here."""

from fastplastic.planning.planner import Plan, control, plan
from fastplastic.planning.request import DEFAULT_CRITERIA, GRANULARITIES, SCOPES, Request, some_of

__all__ = [
    "DEFAULT_CRITERIA",
    "GRANULARITIES",
    "SCOPES",
    "Plan",
    "Request",
    "control",
    "plan",
    "some_of",
]
