"""Draw the curves of a trial with matplotlib, which the extra `report` brings."""

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from fastplastic.errors import InputError

if TYPE_CHECKING:
    from fastplastic.trials import Trial

# Of Okabe and Ito: can be told apart by most who do not see all colours.
_COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")
_LINES = ("-", "--", "-.", ":")


def require_matplotlib() -> None:
    """Raise InputError where matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        raise InputError(
            "--plot needs matplotlib: pip install 'fastplastic[report]', or leave it out"
        )


def draw(trial: "Trial", path: Path, *, force: bool) -> None:
    """Write a picture of the mean accuracy of every arm, with the spread over seeds.

    Raises:
        InputError: matplotlib is not installed.
        FileError: The file exists or cannot be written.
    """
    require_matplotlib()
    import numpy as np
    from matplotlib.figure import Figure

    from fastplastic.files import atomic_write

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for number, arm in enumerate(trial.arms):
        runs = [run for run in trial.runs if run.arm == arm.name and run.diverged_at is None]
        colour, line = _COLOURS[number % len(_COLOURS)], _LINES[number // len(_COLOURS) % 4]
        axes.plot(arm.steps, arm.curve, line, color=colour, label=arm.name)
        curves = np.array([run.accuracy for run in runs])
        if len(curves) > 1:
            mean, spread = curves.mean(0), curves.std(0, ddof=1)
            axes.fill_between(
                arm.steps, mean - spread, mean + spread, color=colour, alpha=0.12, linewidth=0
            )
    seeds = len(trial.arms[0].seeds)
    axes.set(xlabel="updates", ylabel="accuracy on the test images")
    axes.set_title(f"mean of {seeds} seed{'s' * (seeds != 1)}; band: one standard deviation")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    with atomic_write(path, force) as temporary:
        figure.savefig(temporary, format=path.suffix[1:], dpi=150)
