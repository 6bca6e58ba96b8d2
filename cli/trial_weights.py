"""The trained weights of a trial: those of the best run of every arm lie beside the results."""

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from fastplastic.cli.terminal import warn
from fastplastic.errors import FileError

if TYPE_CHECKING:
    from torch import nn

    from fastplastic.cli.training import Learner
    from fastplastic.trials import Trial, TrialRun


class KeptWeights:
    """Keeps the trained weights of the best run of every arm beside the results, for -o.

    They stay there, so that the same command can write them again. Runs may be made in several
    processes: each writes a file of its own, and who keeps the results chooses.

    Args:
        output: Where those of the best arm go; None keeps none.
        results: The file of results.
    """

    def __init__(self, output: Path | None, results: Path) -> None:
        self._output, self._folder = output, results.with_suffix(".weights")

    def keep(self, loaded: "Learner", run: "TrialRun", model: "nn.Module") -> None:
        """Write the weights of a run, where no run of the arm was better on the validation images.

        Args:
            loaded: Says in which dtypes to write, and what else.
            run: The run.
            model: What it trained.
        """
        if not self._is_better(run):
            return
        from fastplastic.files import save_state_dict

        self._folder.mkdir(exist_ok=True)
        score = {"validation": repr(run.validation), "seed": str(run.seed)}
        save_state_dict(
            self._file(run.arm, run.seed), model, force=True, dtypes=loaded.dtypes,
            metadata=loaded.metadata | score,
        )  # fmt: skip

    def settle(self, run: "TrialRun") -> None:
        """Let the weights of a run be those of its arm, where no run was better; or drop them.

        Raises:
            FileError: They are not there.
        """
        if self._output is None or run.validation is None or run.diverged_at is not None:
            return
        own = self._file(run.arm, run.seed)
        if not self._is_better(run):
            own.unlink(missing_ok=True)
        elif own.exists():
            os.replace(own, self._file(run.arm))
        else:
            raise FileError(
                f"{own}: the weights of a run are not there, expected its worker to write them: "
                "where workers are on other machines, all have to share the folder of --results"
            )

    def write(self, trial: "Trial", *, force: bool) -> None:
        """Copy the weights of the chosen arm to their place."""
        if self._output is None or trial.chosen is None:
            return
        file = self._file(trial.chosen)
        if not file.exists():
            warn(
                f"the weights of {trial.chosen} are not there (runs made without -o keep none): "
                "fine-tune it with fastplastic finetune, or give another --results"
            )
            return
        from fastplastic.files import atomic_write

        with atomic_write(self._output, force) as temporary:
            shutil.copyfile(file, temporary)

    def said(self, trial: "Trial") -> tuple[tuple[str, str], ...]:
        """Return what was written, as facts."""
        if self._output is None or trial.chosen is None:
            return ()
        arm = trial[trial.chosen]
        text = f"{self._output}: {arm.name}, best on validation: mean {arm.validation:.3f}"
        kept = f"{self._folder}: of every arm; no longer needed when the trial is over"
        text += "; the weights of its best seed"
        return (("file", text), ("weights", kept))

    def _is_better(self, run: "TrialRun") -> bool:
        """Tell whether a run is to be kept, and better than what is there of its arm."""
        if self._output is None or run.validation is None or run.diverged_at is not None:
            return False
        from fastplastic.files import read_metadata

        file = self._file(run.arm)
        if not file.exists():
            return True
        best = read_metadata(file)
        # Of equals the first seed, whichever run ended first.
        return (run.validation, -run.seed) > (float(best["validation"]), -int(best["seed"]))

    def _file(self, arm: str, seed: int | None = None) -> Path:
        plain = "".join(letter if letter.isalnum() or letter in ".-+=" else "_" for letter in arm)
        # Not safetensors yet: what a killed trial left is nobody's weights.
        return self._folder / f"{plain}.safetensors{'' if seed is None else f'.{seed}'}"
