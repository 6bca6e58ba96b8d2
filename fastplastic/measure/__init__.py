"""Run a model on data and sum up what its units do: profiles, and a monitor for training."""

from fastplastic.measure.compiled import EagerStance
from fastplastic.measure.finding import Finding, findings
from fastplastic.measure.monitor import Monitor
from fastplastic.measure.observer import Observer
from fastplastic.measure.positions import PositionSample
from fastplastic.measure.record import Coverage, LayerProfile, Profile, Totals
from fastplastic.measure.rounds import Rounds
from fastplastic.measure.run import assemble, profile
from fastplastic.measure.table import flat_rows
from fastplastic.measure.together import compare_traces

__all__ = [
    "Coverage", "EagerStance", "Finding", "LayerProfile", "Monitor", "Observer", "PositionSample",
    "Profile", "Rounds", "Totals", "assemble", "compare_traces", "findings", "flat_rows", "profile",
]  # fmt: skip
