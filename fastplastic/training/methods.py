"""The methods that keep plasticity while training, each declared in a few words."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from typing import Any

from fastplastic.criteria import CRITERIA, WEIGHT_CRITERIA
from fastplastic.errors import InputError
from fastplastic.planning import GRANULARITIES, Request
from fastplastic.reinit import OUTGOING

_AMOUNTS = ("threshold", "ratio", "rate")


@dataclass(frozen=True)
class Method:
    """What is measured, what is chosen by it, when, and what becomes of it.

    Attributes:
        name: Its name.
        criterion: Name in `criteria.CRITERIA`, or in `WEIGHT_CRITERIA` for single weights.
        granularity: "unit" or "weight".
        threshold: Choose what scores at most this (`frozen` and `saturated`: at least; weights: at
            most this times the mean of their tensor).
        ratio: Choose this share of all.
        rate: Choose this share of the mature units of each layer with each step, those with the
            smallest moving average of the score; what is less than a unit is carried on.
        every: Steps of the optimizer from one choice to the next.
        window: Of how many steps before a choice the moving average is made; None for all.
        decay: How much of the moving average each step keeps, in [0, 1).
        maturity: For how many steps a fresh unit is not chosen.
        outgoing: What becomes of the outgoing columns, as for `reinit_`.
        compensate: Add what the columns contributed on average, by a moving average of the
            activations, to the bias of their layer.
        init: Law of the fresh weights, as for `reinit_`.
        scope: As for `plan`.
        include, exclude: Patterns of layer names, as for `plan`.
        max_layer_fraction: As for `plan`.
        reset_steps: Let the optimizer's counter of steps begin anew for what is written.
        start_step, end_step: Nothing is done before and after these steps; None for no end.
        sample_positions: At how many positions large tensors of the running batch are read, as for
            `Monitor`; None for all.
        source: Where the method comes from.
    """

    name: str = "custom"
    criterion: str = "dormant"
    granularity: str = "unit"
    threshold: float | None = None
    ratio: float | None = None
    rate: float | None = None
    every: int = 1000
    window: int | None = None
    decay: float = 0.99
    maturity: int = 100
    outgoing: str = "zero"
    compensate: bool = False
    init: str = "default"
    scope: str = "global"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    max_layer_fraction: float = 1.0
    reset_steps: bool = True
    start_step: int = 0
    end_step: int | None = None
    sample_positions: int | None = None
    source: str = ""

    @property
    def needs_gradients(self) -> bool:
        """Whether its criterion reads gradients."""
        rules = CRITERIA if self.granularity == "unit" else WEIGHT_CRITERIA
        return rules[self.criterion].needs == "gradients"

    @property
    def measured(self) -> int:
        """How many steps before a choice are measured."""
        if self.rate is None:
            return 1
        return self.every if self.window is None else self.window

    def check(self) -> None:
        """Refuse what cannot be done: InputError."""
        if self.granularity not in GRANULARITIES:
            raise InputError(
                f"granularity {self.granularity!r} is unknown, expected 'unit' or 'weight'"
            )
        rules: Mapping[str, object] = CRITERIA if self.granularity == "unit" else WEIGHT_CRITERIA
        if self.criterion not in rules:
            other = WEIGHT_CRITERIA if self.granularity == "unit" else CRITERIA
            hint = "weight" if self.granularity == "unit" else "unit"
            raise InputError(
                f"criterion {self.criterion!r} is unknown for granularity {self.granularity!r}, "
                f"expected one of {', '.join(rules)}"
                + f"; or give granularity={hint!r}"
                * (self.criterion in other)
            )
        given = [name for name in _AMOUNTS if getattr(self, name) is not None]
        if len(given) != 1:
            raise InputError(
                f"{' and '.join(given) or 'nothing'} given of threshold, ratio and rate, expected "
                "exactly one: they say how much is re-initialised"
            )
        self._check_numbers()
        if self.outgoing not in OUTGOING:
            raise InputError(
                f"outgoing {self.outgoing!r} is unknown, expected one of {', '.join(OUTGOING)}"
            )
        # What the planner says of all others.
        ratio = self.ratio if self.rate is None else self.rate
        Request(
            self.criterion, ratio, self.threshold, self.granularity, self.scope,
            self.max_layer_fraction, 0,
        ).check()  # fmt: skip
        if self.granularity == "weight" and (self.rate is not None or self.compensate):
            raise InputError("rate and compensate are for units, found granularity 'weight'")
        if self.compensate and self.rate is None:
            raise InputError(
                "compensate needs the moving average of the activations, which is kept with rate "
                "alone: leave it out, or give a rate"
            )

    def _check_numbers(self) -> None:
        positive = ("every", "window", "sample_positions")
        for name in (*positive, "maturity", "start_step", "end_step"):
            value, least = getattr(self, name), 1 if name in positive else 0
            if value is None and name in ("window", "end_step", "sample_positions"):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InputError(f"{name} is {value!r}, expected an integer of at least {least}")
        if self.window is not None and self.rate is None:
            raise InputError(
                f"window {self.window} without a rate: only a method with a rate, such as 'cbp', "
                "makes a moving average over several steps"
            )
        if self.end_step is not None and self.end_step <= self.start_step:
            raise InputError(
                f"end_step {self.end_step} is not behind start_step {self.start_step}, so nothing "
                "would ever be done"
            )
        if self.measured > self.every:
            raise InputError(
                f"window {self.window} is more than every {self.every}: expected at most as many"
            )
        if not 0 <= self.decay < 1:
            raise InputError(f"decay is {self.decay!r}, expected at least 0 and less than 1")
        if self.rate is not None and not 0 < self.rate <= 1:
            raise InputError(
                f"rate is {self.rate!r}, expected more than 0 and at most 1: the share of the "
                "mature units with each step, such as 1e-4"
            )


_REDO = "ReDo: Sokar et al., arXiv 2302.12902"
_GRAMA = "ReGraMa: arXiv 2505.24061"

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("redo", "dormant", threshold=0.025, every=1000, source=_REDO),
        Method(
            "cbp", "contribution", rate=1e-4, every=1, decay=0.99, maturity=100, compensate=True,
            source="continual backpropagation: Dohare et al., Nature 2024",
        ),
        Method(
            "grama", "gradient", threshold=0.1, every=1000, outgoing="keep", source=_GRAMA,
        ),
        Method(
            "swr", "swr", "weight", threshold=5e-4, every=128, outgoing="keep",
            max_layer_fraction=0.5,
            source="SWR: Hernandez-Garcia et al., arXiv 2508.00212",
        ),
        Method(
            "random", "random", ratio=0.01, every=1000, source="the control at equal dose",
        ),
    )
}  # fmt: skip
# Another name in use for the same.
_ALIASES = {"regrama": "grama"}


def method_of(given: str | Method, options: Mapping[str, Any]) -> Method:
    """Return a method with some options of its own.

    Args:
        given: A name in METHODS, "custom", or a method.
        options: Fields of `Method` that differ. One of threshold, ratio and rate replaces the
            others.

    Raises:
        InputError: A name is unknown, or a value cannot be used.
    """
    if isinstance(given, str):
        name = _ALIASES.get(given, given)
        names = [*METHODS, *_ALIASES, "custom"]
        if name not in names:
            near = get_close_matches(given, names, n=1)
            hint = f": did you mean {near[0]!r}?" if near else ""
            raise InputError(
                f"method {given!r} is unknown, expected one of {', '.join(names)}{hint}"
            )
        given = METHODS.get(name, Method())
    known = {field.name for field in fields(Method)} - {"name", "source"}
    for option in options:
        if option not in known:
            near = get_close_matches(option, known, n=1)
            hint = f": did you mean {near[0]!r}?" if near else ""
            raise InputError(
                f"option {option!r} is unknown, expected one of {', '.join(sorted(known))}{hint}"
            )
    changes = dict(options)
    if any(changes.get(name) is not None for name in _AMOUNTS):
        changes = dict.fromkeys(_AMOUNTS) | changes
    for name in ("include", "exclude"):
        if name in changes:
            value = changes[name]
            changes[name] = (value,) if isinstance(value, str) else tuple(value)
    method = replace(given, **changes)
    method.check()
    return method
