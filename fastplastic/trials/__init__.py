"""Does re-initialisation help here? Arms fine-tuned side by side, and what they show."""

from fastplastic.trials.arms import BASELINE, Arm, Dose, parse_arm, with_controls
from fastplastic.trials.compare import DEFAULT_ARMS, FineTuning, finetune, run_trial, trial
from fastplastic.trials.engine import Engine, InTurn, Made, Pending, Trainer
from fastplastic.trials.evidence import Advice, advise, better_than_random
from fastplastic.trials.loop import evaluate, train
from fastplastic.trials.missing import Progress
from fastplastic.trials.on_ray import OnRay, RunNeeds, require_ray
from fastplastic.trials.outcome import outcome_of
from fastplastic.trials.prepare import norms_of, recalibrate_norms
from fastplastic.trials.probe import fit_head
from fastplastic.trials.profile_figures import figures
from fastplastic.trials.record import ArmResult, Trial
from fastplastic.trials.results import Results, TrialRun
from fastplastic.trials.settings import TrainSettings
from fastplastic.trials.statistics import Comparison, Estimate
from fastplastic.trials.task import Task, TrialData, digest_of

__all__ = [
    "BASELINE",
    "DEFAULT_ARMS",
    "Advice",
    "Arm",
    "ArmResult",
    "Comparison",
    "Dose",
    "Engine",
    "Estimate",
    "FineTuning",
    "InTurn",
    "Made",
    "OnRay",
    "Pending",
    "Progress",
    "Results",
    "RunNeeds",
    "Task",
    "TrainSettings",
    "Trainer",
    "Trial",
    "TrialData",
    "TrialRun",
    "advise",
    "better_than_random",
    "digest_of",
    "evaluate",
    "figures",
    "finetune",
    "fit_head",
    "norms_of",
    "outcome_of",
    "parse_arm",
    "recalibrate_norms",
    "require_ray",
    "run_trial",
    "train",
    "trial",
    "with_controls",
]
