"""What to re-initialise, and how: the options that several commands share."""

from dataclasses import dataclass, field
from math import isfinite
from typing import Annotated, Literal

from fastplastic.cli.parsing import option, strings
from fastplastic.errors import InputError, no_such

_SELECT = "Selection"


def check_share(name: str, value: float | None) -> None:
    """Raise InputError unless an option is a share, or not given."""
    if value is not None and not 0 < value <= 1:
        flag = "--" + name.replace("_", "-")
        raise InputError(f"{flag} {value:g}: expected a share in (0, 1], for example 0.05")


@dataclass(frozen=True, kw_only=True)
class LayerChoice:
    """Which layers, and how much of each."""

    scope: Annotated[
        Literal["global", "layer"],
        option("--scope", panel=_SELECT, help="Rank over all layers, or take a share of each."),
    ] = "global"
    include: Annotated[
        list[str],
        strings("--include", panel=_SELECT, metavar="PATTERN", help="Only layers like PATTERN."),
    ] = field(default_factory=list)
    exclude: Annotated[
        list[str],
        strings("--exclude", panel=_SELECT, metavar="PATTERN", help="No layers like PATTERN."),
    ] = field(default_factory=list)
    max_layer_fraction: Annotated[
        float,
        option("--max-layer-fraction", panel=_SELECT, help="Never more than this of a layer."),
    ] = 0.5

    def check_layers(self) -> None:
        """Refuse a share that is none: InputError."""
        check_share("max_layer_fraction", self.max_layer_fraction)


@dataclass(frozen=True, kw_only=True)
class UnitSelection:
    """Which units or weights."""

    ratio: Annotated[
        float | None,
        option("--ratio", panel=_SELECT, help="Take this share of the eligible units, in (0, 1]."),
    ] = None
    threshold: Annotated[
        float | None,
        option("--threshold", panel=_SELECT, help="Take every unit beyond this score."),
    ] = None
    criterion: Annotated[
        str | None,
        option(
            "--criterion",
            panel=_SELECT,
            metavar="NAME",
            help="The score that ranks them: see fastplastic list criteria. "
            "(default: dormant, of weights swr)",
        ),
    ] = None
    granularity: Annotated[
        Literal["unit", "weight"],
        option("--granularity", panel=_SELECT, help="Take whole units, or single weights."),
    ] = "unit"

    def check_selection(self) -> None:
        """Refuse a selection that no model can fulfil: InputError."""
        if (self.ratio is None) == (self.threshold is None):
            given = "neither" if self.ratio is None else "both"
            raise InputError(
                f"{given} of --ratio and --threshold given: give one, for example --ratio 0.05"
            )
        if self.threshold is not None and not isfinite(self.threshold):
            raise InputError(f"--threshold {self.threshold}: expected a finite number")
        if self.criterion is not None:
            self._check_criterion(self.criterion)
        check_share("ratio", self.ratio)

    def _check_criterion(self, name: str) -> None:
        # Only here: the registry loads torch.
        from fastplastic.criteria import CRITERIA, WEIGHT_CRITERIA

        if name not in {**CRITERIA, **WEIGHT_CRITERIA}:
            names = dict.fromkeys([*CRITERIA, *WEIGHT_CRITERIA])
            raise InputError(f"--criterion: {no_such('criterion', name, names)}")
        known = CRITERIA if self.granularity == "unit" else WEIGHT_CRITERIA
        if name not in known:
            raise InputError(
                f"--criterion: criterion {name!r} is unknown for granularity "
                f"{self.granularity!r}, expected one of {', '.join(known)}"
            )


@dataclass(frozen=True, kw_only=True)
class Treatment:
    """What is done to them."""

    init: Annotated[
        Literal[
            "default", "kaiming_uniform", "kaiming_normal", "xavier_uniform", "trunc_normal",
            "empirical",
        ],
        option("--init", panel=_SELECT, help="Distribution of the fresh incoming weights."),
    ] = "default"  # fmt: skip
    outgoing: Annotated[
        Literal["zero", "small", "fresh", "keep"],
        option("--outgoing", panel=_SELECT, help="What becomes of the outgoing weights (README)."),
    ] = "zero"
    compensate: Annotated[
        bool,
        option(
            "--compensate",
            panel=_SELECT,
            help="Add what the outgoing weights contributed on average to the biases.",
        ),
    ] = False
    recalibrate: Annotated[
        bool,
        option(
            "--recalibrate",
            panel=_SELECT,
            help="Measure the running statistics of fresh BatchNorm channels on the data.",
        ),
    ] = False

    def check_treatment(self, granularity: str) -> None:
        """Refuse what does not go together: InputError."""
        if granularity == "weight" and self.outgoing != "zero":
            raise InputError(
                f"--outgoing {self.outgoing}: single weights have no outgoing ones: drop it"
            )
        for flag in ("compensate", "recalibrate"):
            if granularity == "weight" and getattr(self, flag):
                raise InputError(f"--{flag}: only for units, not for single weights: drop it")
        if self.compensate and self.outgoing not in ("zero", "small"):
            raise InputError(
                f"--compensate with --outgoing {self.outgoing}: expected zero or small: drop one"
            )
