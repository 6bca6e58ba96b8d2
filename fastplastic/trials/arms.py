"""What is compared in a trial: each arm by its name, and the text that a user writes for it.

`dormant@0.3:zero+compensate` is re-initialisation by `dormant` at ratio 0.3, with the options after
the colon. `random:` before it makes the control of the same dose, `remove:` the same units silenced
for good. `baseline`, `recalibrate`, `shrink-perturb` and `fresh` stand alone.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastplastic.criteria import CRITERIA, WEIGHT_CRITERIA
from fastplastic.errors import InputError, no_such
from fastplastic.initial import INITIALIZERS
from fastplastic.planning import GRANULARITIES
from fastplastic.reinit import OUTGOING

BASELINE = "baseline"
# Arms without a dose; "shrink-perturb" may have a number after "@".
_ALONE = (BASELINE, "recalibrate", "shrink-perturb", "fresh")
# What is done with the units of a dose, instead of re-initialising them.
CONTROLS = ("random", "remove")
_GRAMMAR = (
    "expected CRITERION@RATIO[:OPTION+OPTION...] such as dormant@0.3:zero+compensate or swr@0.05, "
    "or recalibrate, shrink-perturb, fresh, remove"
)
_SWITCHES = ("compensate", "recalibrate", "refit")
# Options with a value: which field they are.
_PATTERNS = {"in": "include", "not": "exclude"}
_NUMBERS = {"max": "max_layer_fraction", "shrink": "shrink"}


@dataclass(frozen=True, kw_only=True)
class Dose:
    """What is re-initialised and how, as for `plan` and `reinit_`.

    Attributes:
        criterion: Name of the criterion.
        ratio: Share of the eligible units or weights, in (0, 1]; or None for a threshold.
        threshold: Score up to which units or weights are taken, as for `plan`; or None.
        granularity: "unit" or "weight".
        outgoing: What becomes of the outgoing weights of units.
        compensate: Add what they contributed on average to the biases.
        recalibrate: Measure the running statistics of fresh norm channels.
        refit: Fit the head once more behind what has changed, and measure the norms anew where all
            arms begin so.
        init: Law of the fresh weights.
        shrink: Factor by which all other weights but those of the head are shrunk, with a little
            noise added, as in `shrink_perturb_`; None leaves them.
        scope: "global" or "layer".
        include: Patterns of layers to choose from.
        exclude: Patterns of layers to leave alone.
        max_layer_fraction: Never more than this of a layer.
    """

    criterion: str
    ratio: float | None = None
    threshold: float | None = None
    granularity: str = "unit"
    outgoing: str = "zero"
    compensate: bool = False
    recalibrate: bool = False
    refit: bool = False
    init: str = "default"
    shrink: float | None = None
    scope: str = "global"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    max_layer_fraction: float = 0.5

    def __str__(self) -> str:
        options = []
        if self.granularity == "unit":
            options.append(self.outgoing)
        elif self.criterion in CRITERIA:
            options.append(self.granularity)
        options += [name for name in _SWITCHES if getattr(self, name)]
        options += [self.init] if self.init != "default" else []
        options += [f"shrink={self.shrink:g}"] if self.shrink is not None else []
        options += ["scope=layer"] if self.scope == "layer" else []
        options += [f"in={pattern}" for pattern in self.include]
        options += [f"not={pattern}" for pattern in self.exclude]
        options += [f"max={self.max_layer_fraction:g}"] if self.max_layer_fraction != 0.5 else []
        named = f":{'+'.join(options)}" if options else ""
        amount = f"@{self.ratio:g}" if self.ratio is not None else f"<={self.threshold:g}"
        return f"{self.criterion}{amount}{named}"


@dataclass(frozen=True)
class Arm:
    """One thing that is done to the model before it is trained.

    Attributes:
        kind: "baseline", "reinit", "random", "remove", "recalibrate", "shrink-perturb" or "fresh".
        dose: What is re-initialised; None for kinds that do not.
        shrink: Factor of the weights for "shrink-perturb".
        name: How it is called; by default the text that makes it.
    """

    kind: str
    dose: Dose | None = None
    shrink: float | None = None
    name: str = ""

    def __post_init__(self) -> None:
        if not self.name:
            object.__setattr__(self, "name", self._text())

    def _text(self) -> str:
        if self.dose is None:
            return self.kind if self.shrink is None else f"{self.kind}@{self.shrink:g}"
        return str(self.dose) if self.kind == "reinit" else f"{self.kind}:{self.dose}"


def parse_arm(text: str, **common: Any) -> Arm:
    """Return the arm that a text describes.

    Args:
        text: For example "dormant@0.3:zero+compensate", "swr@0.05" or "fresh".
        **common: Fields of `Dose` that the text does not say, such as `include`.

    Raises:
        InputError: The text describes none.
    """
    head, at, rest = text.strip().partition("@")
    if head in _ALONE:
        return _alone(text, head, rest if at else None)
    control, colon, criterion = head.partition(":")
    kind = "reinit"
    if colon:
        if control not in CONTROLS:
            raise InputError(f"arm {text!r}: {no_such('control', control, CONTROLS)}")
        kind, head = control, criterion
    if not at:
        known = [*CRITERIA, *WEIGHT_CRITERIA, *_ALONE, "remove"]
        hint = "" if head in known else f" ({no_such('criterion', head, known)})"
        raise InputError(f"arm {text!r} has no ratio{hint}: {_GRAMMAR}")
    ratio, _, options = rest.partition(":")
    return Arm(kind, _dose(text, head, ratio, [x for x in options.split("+") if x], common))


def _alone(text: str, kind: str, number: str | None) -> Arm:
    if number is None:
        return Arm(kind)
    if kind != "shrink-perturb":
        raise InputError(f"arm {text!r}: {kind} takes no number: write {kind}")
    shrink = _number(text, number)
    if not 0 <= shrink < 1:
        raise InputError(f"arm {text!r}: expected a factor from 0 to less than 1, such as 0.6")
    return Arm(kind, shrink=shrink)


def _dose(text: str, criterion: str, ratio: str, options: list[str], common: Any) -> Dose:
    weights_only = criterion in WEIGHT_CRITERIA and criterion not in CRITERIA
    values: dict[str, Any] = {"granularity": "weight" if weights_only else "unit"} | common
    said: dict[str, str] = {}
    for option in options:
        for field, value in _option(text, option).items():
            # Patterns add up.
            more = isinstance(value, tuple)
            if field in said and not more and values[field] != value:
                raise InputError(f"arm {text!r}: {said[field]} and {option}: drop one of the two")
            said[field] = option
            values[field] = (*values.get(field, ()), *value) if more else value
    names = WEIGHT_CRITERIA if values["granularity"] == "weight" else CRITERIA
    if criterion not in names:
        raise InputError(f"arm {text!r}: {no_such('criterion', criterion, names)}")
    share = _number(text, ratio)
    if not 0 < share <= 1:
        raise InputError(f"arm {text!r}: ratio {share:g}, expected more than 0 and at most 1")
    dose = Dose(criterion=criterion, ratio=share, **values)
    _check(text, dose)
    return dose


def _option(text: str, option: str) -> dict[str, Any]:
    for names, field in ((OUTGOING, "outgoing"), (GRANULARITIES, "granularity")):
        if option in names:
            return {field: option}
    if option in _SWITCHES:
        return {option: True}
    if option in INITIALIZERS:
        return {"init": option}
    key, equals, value = option.partition("=")
    if equals and key in _PATTERNS:
        return {_PATTERNS[key]: (value,)}
    if equals and key in _NUMBERS:
        return {_NUMBERS[key]: _number(text, value)}
    if option == "scope=layer":
        return {"scope": "layer"}
    known = [*OUTGOING, *_SWITCHES, *GRANULARITIES, *INITIALIZERS]
    raise InputError(f"arm {text!r}: {no_such('option', option, known)}")


def _check(text: str, dose: Dose) -> None:
    if dose.granularity == "weight":
        for name, plain in (("outgoing", "zero"), ("compensate", False), ("recalibrate", False)):
            if getattr(dose, name) != plain:
                raise InputError(f"arm {text!r}: {name} is for units, not for weights: drop it")
    if dose.shrink is not None and not 0 <= dose.shrink < 1:
        raise InputError(f"arm {text!r}: shrink {dose.shrink:g}, expected from 0 to less than 1")
    if dose.compensate and dose.outgoing not in ("zero", "small"):
        raise InputError(f"arm {text!r}: compensate needs outgoing zero or small: drop one")


def _number(text: str, number: str) -> float:
    try:
        return float(number)
    except ValueError:
        raise InputError(f"arm {text!r}: {number!r} is no number: {_GRAMMAR}") from None


def with_controls(arms: Iterable[Arm | str], **common: Any) -> tuple[Arm, ...]:
    """Return the arms of a trial: the baseline first, and after each dose its random control.

    "remove" among them stands for one such arm after each dose.

    Raises:
        InputError: Two arms have one name, or none re-initialises anything.
    """
    texts = list(arms)
    removing = "remove" in texts
    given = [
        arm if isinstance(arm, Arm) else parse_arm(arm, **common)
        for arm in texts
        if arm != "remove"
    ]
    found = [Arm(BASELINE)]
    for arm in given:
        if arm.kind == BASELINE:
            continue
        found.append(arm)
        if arm.kind == "reinit":
            found += _controls_of(arm, removing, found + given)
    twice = [name for name, number in Counter(arm.name for arm in found).items() if number > 1]
    if twice:
        raise InputError(f"two arms are called {twice[0]!r}: give each another name or drop one")
    return tuple(found)


def _controls_of(arm: Arm, removing: bool, present: Sequence[Arm]) -> list[Arm]:
    assert arm.dose is not None
    kinds = ["random"] * (arm.dose.criterion != "random") + ["remove"] * removing
    wanted = [Arm(kind, arm.dose) for kind in kinds]
    names = {other.name for other in present}
    custom = arm.name != str(arm.dose)
    named = [replace(x, name=f"{x.kind}:{arm.name}") if custom else x for x in wanted]
    return [control for control in named if control.name not in names]


def control_name(arm: Arm) -> str | None:
    """Return the name of the random control of an arm, or None for an arm without."""
    if arm.dose is None or arm.kind == "random":
        return None
    dose = arm.name.removeprefix("remove:")
    return f"random:{dose}"
