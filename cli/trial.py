"""`fastplastic trial`: fine-tune in several arms side by side, and say which is better."""

import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastplastic.cli.following import tuned_file
from fastplastic.cli.outputs import STDOUT, write_json
from fastplastic.cli.parsing import arguments
from fastplastic.cli.plot import draw, require_matplotlib
from fastplastic.cli.terminal import console, follow, run_progress, warn
from fastplastic.cli.training import Learner, learner
from fastplastic.cli.training_options import TrainingOptions, TrialOptions

if TYPE_CHECKING:
    from torch import nn

    from fastplastic.trials import Arm, Task, Trial, TrialRun


def run(options: TrialOptions) -> None:
    """Fine-tune a model in several arms under one budget, and say which is better.

    The baseline, what you name with --arm (by default dormant@0.3:zero+compensate+recalibrate), and
    for each dose as many units at random: each with several seeds, the same batches in the same
    order, and nothing chosen by the test images. Every finished run is kept in a file, so that the
    same command goes on after an interruption.
    """
    options.check()
    if options.plot:
        require_matplotlib()
    from fastplastic.trials import DEFAULT_ARMS, run_trial, with_controls

    options.settings()
    arms = with_controls(options.arm or DEFAULT_ARMS, **options.common())
    seeds = range(options.seed, options.seed + options.seeds)
    loaded = learner(options, validation_share=options.choose_split if options.output else 0.0)
    kept = _Kept(options, loaded)
    with run_progress(quiet=options.quiet) as told, _resumable(options):
        trial = run_trial(
            _task(options, loaded), arms, seeds, loaded.settings, results=options.results_file,
            progress=told, keep=kept.keep,
        )  # fmt: skip
    for note in trial.notes:
        warn(note)
    kept.write(trial)
    if options.json:
        write_json(options.json, trial.to_dict(), force=options.force)
    if options.plot:
        draw(trial, options.plot, force=options.force)
    if options.quiet or options.json == STDOUT:
        return
    from fastplastic.cli import trial_view

    out = console(sys.stdout)
    facts = (*loaded.facts, ("seeds", _seeds(options)), ("results", str(options.results_file)))
    out.print(trial_view.trial(trial, facts, kept.said(trial), width=out.width))
    follow(out, _following(options, trial, arms))


def _seeds(options: TrialOptions) -> str:
    first, last = options.seed, options.seed + options.seeds - 1
    if options.seeds == 1:
        return f"{first}: one seed gives no interval and shows nothing; take 3 or more"
    return f"{first} to {last}"


def _task(options: TrialOptions, loaded: Learner) -> "Task":
    from fastplastic.trials import Task, TrialData

    splits = loaded.splits
    data = TrialData(splits.train, splits.test, splits.plain, splits.validation)
    facts = {
        "model": options.model, "weights": loaded.digest, "data": options.data,
        "sizes": dict(splits.sizes), "images": splits.digest, "batch_size": options.batch_size,
        "augmentation": asdict(options.splits().augmentation), "model_kwargs": loaded.keywords,
        "layers": options.common(),
    }  # fmt: skip
    return Task(
        model=lambda seed: loaded.copy(), data=lambda seed: data, fresh=loaded.fresh,
        facts=facts,
    )  # fmt: skip


@contextmanager
def _resumable(options: TrialOptions) -> Iterator[None]:
    """Say how to go on when the trial is broken off."""
    try:
        yield
    except KeyboardInterrupt:
        lines = options.results_file.read_text().count("\n") if options.results_file.exists() else 0
        done = max(lines - 1, 0)
        warn(
            f"{done} finished run{'s' * (done != 1)} kept in {options.results_file}: the same "
            "command goes on from there"
        )
        raise


class _Kept:
    """Keeps the trained weights of the best run of every arm beside the results, for -o.

    They stay there, so that the same command can write them again.

    Args:
        options: The options.
        loaded: Says in which dtypes to write.
    """

    def __init__(self, options: TrialOptions, loaded: Learner) -> None:
        self._options, self._loaded = options, loaded
        self._folder = options.results_file.with_suffix(".weights")

    def keep(self, run: "TrialRun", model: "nn.Module") -> None:
        """Write the weights where no run of the arm was better on the validation images."""
        if self._options.output is None or run.validation is None or run.diverged_at is not None:
            return
        from fastplastic.files import read_metadata, save_state_dict

        file = self._file(run.arm)
        best = float(read_metadata(file)["validation"]) if file.exists() else -1.0
        if run.validation > best:
            self._folder.mkdir(exist_ok=True)
            score = {"validation": repr(run.validation), "seed": str(run.seed)}
            save_state_dict(
                file, model, force=True, dtypes=self._loaded.dtypes,
                metadata=self._loaded.metadata | score,
            )  # fmt: skip

    def write(self, trial: "Trial") -> None:
        """Copy the weights of the chosen arm to their place."""
        if self._options.output is None or trial.chosen is None:
            return
        file = self._file(trial.chosen)
        if not file.exists():
            warn(
                f"the weights of {trial.chosen} are not there (runs made without -o keep none): "
                "fine-tune it with fastplastic finetune, or give another --results"
            )
            return
        from fastplastic.files import atomic_write

        with atomic_write(self._options.output, self._options.force) as temporary:
            shutil.copyfile(file, temporary)

    def said(self, trial: "Trial") -> tuple[tuple[str, str], ...]:
        """Return what was written, as facts."""
        if self._options.output is None or trial.chosen is None:
            return ()
        arm = trial[trial.chosen]
        text = f"{self._options.output}: {arm.name}, best on validation: mean {arm.validation:.3f}"
        kept = f"{self._folder}: of every arm; no longer needed when the trial is over"
        text += "; the weights of its best seed"
        return (("file", text), ("weights", kept))

    def _file(self, arm: str) -> Path:
        plain = "".join(letter if letter.isalnum() or letter in ".-+=" else "_" for letter in arm)
        return self._folder / f"{plain}.safetensors"


def _following(options: TrialOptions, trial: "Trial", arms: "tuple[Arm, ...]") -> str:
    """Return the command to type next: fine-tuning with what was shown to be better, or without."""
    again = replace(options, force=False)
    line: list[Any] = ["fastplastic", "finetune", *arguments(again, TrainingOptions)]
    better = [
        arm
        for arm in trial.arms
        if arm.kind == "reinit" and arm.final_tests and arm.final_tests[0].shown > 0
    ]
    if better:
        best = max(better, key=lambda arm: arm.final.mean)
        line += ["--arm", best.name]
    else:
        line += ["--no-reinit"]
    return shlex.join([*line, "-o", tuned_file(options.model)])
