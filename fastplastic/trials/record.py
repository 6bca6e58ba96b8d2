"""What a trial found, as values: one result for each arm, and all of them."""

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastplastic.errors import InputError
from fastplastic.files import atomic_write, plain
from fastplastic.notebook import html_table
from fastplastic.trials.arms import parse_arm
from fastplastic.trials.results import TrialRun
from fastplastic.trials.statistics import Comparison, Estimate

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class ArmResult:
    """One arm over its seeds; accuracies are shares of right answers on the test images.

    Attributes:
        name: Name of the arm.
        kind: What it does.
        seeds: Seeds of its runs.
        diverged: Number of runs whose loss was not finite.
        steps: Updates at the points of the curve.
        curve: Mean accuracy at each.
        loss_curve: Mean loss at each; None where it is not finite.
        final: Accuracy at the end.
        best: Largest accuracy of the curve.
        area: Mean accuracy over the run: area under the curve over its length.
        steps_to_baseline: Median share of the updates after which the accuracy is that of the
            baseline's end for the first time, between points by a straight line; None where half
            of the runs never got there.
        reached: Number of runs that got there.
        saved: Share of the updates that are left when the accuracy is that of the baseline's end
            for the first time, 0 for runs that never got there; None without runs of the baseline.
        final_tests: Comparisons of `final`, with the baseline and the random control.
        best_tests: The same of `best`.
        area_tests: The same of `area`.
        saved_tests: The same of `saved`.
        validation: Mean accuracy on the images that arms are chosen by, or None.
        cost: Time of profile, plan and re-initialisation as a share of the training; None without.
        count: Units or weights that were treated, mean over seeds.
    """

    name: str
    kind: str
    seeds: tuple[int, ...]
    diverged: int
    steps: tuple[int, ...]
    curve: tuple[float, ...]
    loss_curve: tuple[float | None, ...]
    final: Estimate
    best: Estimate
    area: Estimate
    saved: Estimate | None
    steps_to_baseline: float | None
    reached: int
    final_tests: tuple[Comparison, ...]
    best_tests: tuple[Comparison, ...]
    area_tests: tuple[Comparison, ...]
    saved_tests: tuple[Comparison, ...]
    validation: float | None
    cost: float | None
    count: float


@dataclass(frozen=True, repr=False)
class Trial:
    """The outcome of a trial.

    Attributes:
        arms: The baseline first, then the others as they were asked for.
        runs: Every run.
        settings: What settled the results.
        verdict: One sentence for each arm that re-initialises.
        chosen: Name of the best arm by the validation images, or None without any.
        notes: What a reader should know, one sentence each.
    """

    arms: tuple[ArmResult, ...]
    runs: tuple[TrialRun, ...]
    settings: Mapping[str, Any]
    verdict: tuple[str, ...]
    chosen: str | None
    notes: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> ArmResult:
        """Return an arm by its name, or by a text that makes it, such as "dormant@0.30".

        Raises:
            KeyError: The trial has no such arm; with the names that it has.
        """
        by_name = {arm.name: arm for arm in self.arms}
        if name not in by_name:
            with suppress(InputError):
                name = parse_arm(name).name
        if name not in by_name:
            raise KeyError(f"no arm {name!r}, expected one of {', '.join(by_name)}")
        return by_name[name]

    def __repr__(self) -> str:
        return f"Trial({len(self.runs)} runs of {', '.join(arm.name for arm in self.arms)})"

    def _repr_html_(self) -> str:
        """Return a table for notebooks: the accuracy of every arm, and the verdict."""
        titles = ("arm", "runs", "end", "from", "to", "best", "units or weights")
        rows = (
            (
                arm.name, len(arm.seeds), arm.final.mean, arm.final.low, arm.final.high,
                arm.best.mean, arm.count,
            )
            for arm in self.arms
        )  # fmt: skip
        caption = f"Trial: {len(self.runs)} runs; accuracy at the end with its 95 % interval"
        return html_table(caption, titles, rows, (*self.verdict, *self.notes))

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as values that `json.dumps` takes."""
        found = {
            "schema_version": SCHEMA_VERSION, "verdict": self.verdict, "chosen": self.chosen,
            "notes": self.notes, "settings": self.settings,
            "arms": [asdict(arm) for arm in self.arms], "runs": [asdict(run) for run in self.runs],
        }  # fmt: skip
        return dict(plain(found))

    def save(self, path: str | Path, *, force: bool = False) -> None:
        """Write it as JSON; FileError when the file exists or cannot be written."""
        with atomic_write(path, force) as temporary:
            temporary.write_text(json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n")
