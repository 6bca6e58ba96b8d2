"""Apply a plan to a model: the only code that writes to weights, buffers and optimizer state."""

from fastplastic.reinit.report import ReinitReport, Written
from fastplastic.reinit.run import OUTGOING, reinit_

__all__ = ["OUTGOING", "ReinitReport", "Written", "reinit_"]
