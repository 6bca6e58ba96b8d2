"""Figures of a profile under names that stay, and writers of them for what keeps experiments.

| name | value |
|---|---|
| `plasticity/dead` | share of units whose activation was the same at every position |
| `plasticity/frozen` | share of units that were flat (abs(f'(z)) <= 0.01) at every position |
| `plasticity/saturated` | share of units that were flat at 95 % of the positions or more |
| `plasticity/dormant` | share of units with a ReDo score of at most 0.025 |
| `plasticity/low_gradient` | share of units with a GraMa score of at most 0.1 |
| `plasticity/<one of these>/<layer>` | the same of one layer |
| `plasticity/reset` | units (or single weights) re-initialised since this was last logged |
| `plasticity/overlap` | share of the last reset that the reset before had taken, too |

Shares are in [0, 1], of the units whose score is known; where none is, the name is missing. The
criteria, thresholds and sources are those of `fastplastic.criteria`.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastplastic.criteria import CRITERIA
from fastplastic.errors import InputError
from fastplastic.measure import Profile
from fastplastic.training import Reset

_PREFIX = "plasticity"
# Name of a share -> the criterion with its threshold.
_SHARES = {
    "dead": "dead",
    "frozen": "frozen",
    "saturated": "saturated",
    "dormant": "dormant",
    "low_gradient": "gradient",
}
# Name of a histogram -> the criterion whose scores are shown.
_HISTOGRAMS = {"flat_share": "saturated", "dormant_score": "dormant"}


def metrics(
    profile: Profile, *, layers: bool = False, resets: Sequence[Reset] | None = None
) -> dict[str, float]:
    """Return the figures of a profile by the names in the docstring of this module.

        wandb.log(metrics(profile))

    Args:
        profile: Of `profile`, `Monitor` or a callback of `integrations`.
        layers: Also give the share of each layer.
        resets: What was re-initialised since this was last logged (the end of `Recycler.log`);
            None where nothing is.

    Raises:
        InputError: It is no profile.
    """
    if not isinstance(profile, Profile):
        raise InputError(
            f"a {type(profile).__name__} was given, expected a profile: of a monitor, "
            "monitor.compute(); of a callback, callback.profile"
        )
    values: dict[str, float] = {}
    for share, criterion in _SHARES.items():
        threshold, total, known = CRITERIA[criterion], 0, 0
        for name, scores in profile.score(criterion).items():
            beyond = threshold.beyond(scores)
            assert beyond is not None
            own = int(scores.isfinite().sum())
            found = int((beyond & scores.isfinite()).sum())
            total, known = total + found, known + own
            if layers and own:
                values[f"{_PREFIX}/{share}/{name}"] = found / own
        if known:
            values[f"{_PREFIX}/{share}"] = total / known
    return values | ({} if resets is None else reset_metrics(resets))


def reset_metrics(resets: Sequence[Reset]) -> dict[str, float]:
    """Return the figures of what was re-initialised since this was last logged."""
    values = {f"{_PREFIX}/reset": float(sum(reset.count for reset in resets))}
    if resets and resets[-1].overlap is not None:
        values[f"{_PREFIX}/overlap"] = resets[-1].overlap
    return values


def write_metrics(
    writer: Any,
    profile: Profile,
    step: int,
    *,
    layers: bool = False,
    histograms: bool = False,
    resets: Sequence[Reset] | None = None,
) -> None:
    """Write what `metrics` gives to TensorBoard, Weights & Biases, trackio, MLflow or the like.

        write_metrics(SummaryWriter("runs"), profile, step, histograms=True)  # TensorBoard
        write_metrics(wandb, profile, step)  # or a run; trackio alike
        write_metrics(mlflow, profile, step)  # or any logger of Lightning

    Args:
        writer: Has `add_scalar` (TensorBoard), `log_metrics(dict, step=)` or `log(dict, step=)`.
        profile: As for `metrics`.
        step: Number of the step.
        layers: As for `metrics`.
        histograms: Also write `plasticity/dormant_score/<layer>` and `plasticity/flat_share/
            <layer>`, a histogram over the units of each layer. TensorBoard only.
        resets: As for `metrics`.

    Raises:
        InputError: The writer has none of these methods, or no `add_histogram` for histograms.
    """
    if histograms and not hasattr(writer, "add_histogram"):
        raise InputError(
            f"the writer is a {type(writer).__name__} without add_histogram, expected a "
            "SummaryWriter of TensorBoard: leave histograms out, or log profile.score('dormant') "
            "yourself"
        )
    values = metrics(profile, layers=layers, resets=resets)
    if hasattr(writer, "add_scalar"):
        for name, value in values.items():
            writer.add_scalar(name, value, step)
    elif hasattr(writer, "log_metrics"):
        writer.log_metrics(values, step=step)
    elif hasattr(writer, "log"):
        writer.log(values, step=step)
    else:
        raise InputError(
            f"the writer is a {type(writer).__name__}, expected one with add_scalar, log_metrics "
            "or log: pass what metrics(profile) returns to it yourself"
        )
    for name, scores in _distributions(profile) if histograms else ():
        writer.add_histogram(name, scores, step)


def _distributions(profile: Profile) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, the known scores) of each layer, where there are any."""
    for title, criterion in _HISTOGRAMS.items():
        for name, scores in profile.score(criterion).items():
            known = scores[torch.isfinite(scores)]
            if len(known):
                yield f"{_PREFIX}/{title}/{name}", known
