"""The command to type next, on the way from a profile to a fine-tuned model."""

import shlex
from dataclasses import replace

from fastplastic.cli.options import MeasureOptions, ModelOptions, ProfileOptions, ReinitOptions
from fastplastic.cli.parsing import arguments
from fastplastic.naming import ModelName

# What the plan for a first try looks like.
_PLAN = ("--ratio", "0.05", "-o", "plan.json")
# Data that nobody fine-tunes on.
_NOT_REAL = ("sample", "noise")


def after_profile(options: ProfileOptions, *, trains: bool) -> str:
    """Return a trial on the same data; where there can be none, a plan to look at."""
    if options.data in _NOT_REAL or not trains:
        return _joined("plan", *arguments(options, MeasureOptions), *_PLAN)
    return _joined("trial", *arguments(options, ModelOptions), "--data", options.data)


def after_reinit(options: ReinitOptions, *, trains: bool) -> str:
    """Return fine-tuning of what was written, as it is; "" where `finetune` takes no such model."""
    assert options.target is not None
    if not trains:
        return ""
    written = replace(options, checkpoint=options.target, pretrained=None)
    if options.writes_folder:
        written = replace(options, model=f"hf:{options.output}", checkpoint=None, pretrained=None)
    data = "DIR" if options.data in _NOT_REAL else options.data
    return _joined(
        "finetune", *arguments(written, ModelOptions), "--data", data, "--no-reinit",
        "-o", tuned_file(options.model),
    )  # fmt: skip


def tuned_file(model: str) -> str:
    """Return a name for the weights of a fine-tuned model."""
    return f"{ModelName.of(model).stem}-tuned.safetensors"


def fresh_output(model: str) -> list[str]:
    """Return -o for a re-initialised model: a file, or a folder for the model of a folder."""
    name = ModelName.of(model)
    return ["-o", f"{name.stem}-fresh{'.safetensors' * (name.kind != 'folder')}"]


def _joined(*words: str) -> str:
    return shlex.join(["fastplastic", *words])
