"""Apply a plan to a model: the only code that writes to weights, buffers and optimizer state."""

from fastplastic.reinit.checkpoint import reinit_checkpoint
from fastplastic.reinit.fire import fire_
from fastplastic.reinit.optimizer_state import OptimizerState, optimizers_of
from fastplastic.reinit.report import ReinitReport, Written
from fastplastic.reinit.run import OUTGOING, reinit_
from fastplastic.reinit.shrink import shrink_perturb_
from fastplastic.reinit.silence import removal

__all__ = [
    "OUTGOING", "OptimizerState", "ReinitReport", "Written", "fire_", "optimizers_of", "reinit_",
    "reinit_checkpoint", "removal", "shrink_perturb_",
]  # fmt: skip
