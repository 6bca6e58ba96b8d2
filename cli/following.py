"""The command to type next, on the way from a profile to a fine-tuned model."""

import shlex
from dataclasses import replace
from pathlib import Path

from fastplastic.cli.options import MeasureOptions, ModelOptions, ProfileOptions, ReinitOptions
from fastplastic.cli.parsing import arguments

# What the plan for a first try looks like.
_PLAN = ("--ratio", "0.05", "-o", "plan.json")
# Data that nobody fine-tunes on.
_NOT_REAL = ("sample", "noise")


def after_profile(options: ProfileOptions) -> str:
    """Return a trial on the same data; where they are not the user's, a plan to look at."""
    if options.data in _NOT_REAL:
        return _joined("plan", *arguments(options, MeasureOptions), *_PLAN)
    return _joined("trial", *arguments(options, ModelOptions), "--data", options.data)


def after_reinit(options: ReinitOptions) -> str:
    """Return fine-tuning of what was written, as it is."""
    assert options.target is not None
    written = replace(options, checkpoint=options.target, pretrained=None)
    data = "DIR" if options.data in _NOT_REAL else options.data
    return _joined(
        "finetune", *arguments(written, ModelOptions), "--data", data, "--no-reinit",
        "-o", tuned_file(options.model),
    )  # fmt: skip


def tuned_file(model: str) -> str:
    """Return a name for the weights of a fine-tuned model."""
    return f"{Path(model).name}-tuned.safetensors"


def _joined(*words: str) -> str:
    return shlex.join(["fastplastic", *words])
