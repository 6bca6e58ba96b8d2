"""What the project's own trials say beforehand: whether re-initialisation helps, and by what.

The numbers are those of `evidence.json`, which benchmarks/transfer/predict.py writes from the
results of the study.
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from fastplastic.measure import Profile
from fastplastic.trials.profile_figures import figures

FILE = Path(__file__).with_name("evidence.json")


@dataclass(frozen=True)
class Advice:
    """Whether re-initialisation is likely to help a model, by its profile.

    Attributes:
        share: Share of the units that can be re-initialised which are dead.
        limit: Share from which on it helped.
        helps: Whether it is likely to help.
        text: The advice and how far it is to be trusted, in words.
    """

    share: float
    limit: float
    helps: bool
    text: str


@cache
def _evidence() -> dict[str, Any]:
    return dict(json.loads(FILE.read_text()))


def advise(profile: Profile) -> Advice | None:
    """Return whether re-initialisation is likely to help; None without units to re-initialise.

    The rule is the share of dead units, with the limit that tells the cases of benchmarks/transfer
    apart; its error is that on networks that were left out when the limit was set.

    Args:
        profile: Of the model before fine-tuning, on training images of the new task; where that
            begins by measuring the norms anew, behind those.
    """
    found = figures(profile)
    if "dead" not in found:
        return None
    share, known = found["dead"], _evidence()["advice"]
    limit = known["limit"]
    helps = share >= limit
    side, word = ("above", "likely") if helps else ("below", "not likely")
    (helped, cases), (wrong, of) = known[side], known["wrong"]
    text = (
        f"re-initialisation is {word} to help: {100 * share:.0f} % of the units that it could take "
        f"are dead, and {side} {100 * limit:.0f} % it helped in {helped} of {cases} cases of the "
        f"project's own trials. On networks that the limit was not set by, this rule was wrong in "
        f"{wrong} of {of} cases: fastplastic trial tells for your task"
    )
    if not helps and _mortal(profile) < 0.5:
        text += (
            ". Most of its units have no ReLU and hardly ever die, so that this says little here"
        )
    return Advice(share, limit, helps, text)


def _mortal(profile: Profile) -> float:
    """Return the share of the units that can be re-initialised which have a ReLU."""
    layers = [(int(layer.hidden.sum()), layer.activation.startswith("relu")) for layer in profile]
    return sum(units for units, relu in layers if relu) / sum(units for units, _ in layers)


def better_than_random(granularity: str, criterion: str) -> tuple[int, int] | None:
    """Return on how many screened networks a criterion was better than random, and of how many.

    Args:
        granularity: "unit" or "weight".
        criterion: Its name.
    """
    found = _evidence()["criteria"][granularity].get(criterion)
    return None if found is None else (found[0], found[1])
