"""Conditions that make a check fail, for use in CI: what --fail-if takes.

    [change:][PATTERN:]METRIC(>|>=|<|<=)NUMBER

Without PATTERN it is about all units of the model, with one about each layer whose name matches;
with `change:` about the last profile minus the first, else about the last.
"""

import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fnmatch import fnmatchcase
from typing import Any

from fastplastic.comparison.metrics import METRICS, SHARES, difference, of_layer, of_layers
from fastplastic.errors import InputError, no_such
from fastplastic.files import ProfileFigures

_OPERATORS: Mapping[str, Callable[[float, float], bool]] = {
    ">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt,
}  # fmt: skip
_GRAMMAR = (
    f"expected [change:][PATTERN:]METRIC>NUMBER, or >=, <, <=, with METRIC one of "
    f"{', '.join(METRICS)}, for example 'dead>0.05' or 'layer4.*:dormant>30%'"
)
_FORM = re.compile(
    r"\s*(?P<change>change:)?(?:(?P<pattern>.+):)?\s*(?P<metric>\w+)"
    rf"\s*(?P<operator>{'|'.join(_OPERATORS)})\s*(?P<number>[^<>=]+)",
)
_NUMBER = re.compile(
    r"(?P<digits>[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]{1,2})?)\s*(?P<percent>%?)\s*", re.I
)
_SHOWN = 5
# What columns of the report are called.
_ALIASES = {"sat": "saturated"}


@dataclass(frozen=True)
class Gate:
    """A condition that makes a check fail.

    Attributes:
        expression: As it was given.
        metric: One of `METRICS`.
        operator: One of >, >=, <, <=.
        bound: The number.
        pattern: Which layers, each by itself; None for all units of the model.
        change: Whether it is about the change from the first profile to the last.
    """

    expression: str
    metric: str
    operator: str
    bound: float
    pattern: str | None = None
    change: bool = False

    def holds(self, value: float) -> bool:
        """Tell whether a value makes the check fail."""
        return _OPERATORS[self.operator](value, self.bound)

    def shown(self, value: float) -> str:
        """Return a value in words; shares in percent."""
        sign = "+" if self.change else ""
        return f"{100 * value:{sign}.4g} %" if self.metric in SHARES else f"{value:{sign}.6g}"


@dataclass(frozen=True)
class GateResult:
    """What became of a gate.

    Attributes:
        gate: The gate.
        values: (layer name, value) of each layer, the worst first; one without a name for a model.
        left_out: Names of layers of which the figure is not known.
    """

    gate: Gate
    values: tuple[tuple[str | None, float], ...]
    left_out: tuple[str, ...] = ()

    @property
    def failed(self) -> tuple[tuple[str | None, float], ...]:
        """Those of `values` that make the check fail."""
        return tuple(pair for pair in self.values if self.gate.holds(pair[1]))

    @property
    def passed(self) -> bool:
        """Whether the check did not fail."""
        return not self.failed

    @property
    def reason(self) -> str:
        """What was found, in a line."""
        own, failed = self.gate, self.failed
        what = f"the change of {own.metric}" if own.change else own.metric
        where = "" if own.pattern is None else f" of {len(self.values)} layers"
        if own.pattern is None:
            return f"{own.expression}: {what} is {own.shown(self.values[0][1])} over all units"
        if not failed:
            name, value = self.values[0]
            return f"{own.expression}: {what} is {own.shown(value)} at worst{where}, in {name}"
        values = [f"{name} {own.shown(value)}" for name, value in failed]
        return f"{own.expression}: {what} in {len(failed)}{where}: {_some(values)}"

    @property
    def gap(self) -> str:
        """Which layers were left out, in a line; empty where none was."""
        if not self.left_out:
            return ""
        layers = f"{len(self.left_out)} layer{'s' * (len(self.left_out) > 1)}"
        return (
            f"{self.gate.expression}: {self.gate.metric} is not known of {layers}, left out: "
            f"{_some(self.left_out)}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain values, the worst value first."""
        return {
            "expression": self.gate.expression,
            "passed": self.passed,
            "values": [{"layer": name, "value": value} for name, value in self.values],
            "left_out": list(self.left_out),
        }


def parse_gates(expressions: Iterable[str], *, change: bool = True) -> tuple[Gate, ...]:
    """Return the gates that expressions stand for.

    Args:
        expressions: As --fail-if takes them.
        change: Whether there is a profile to take the difference to.

    Raises:
        InputError: One of them is no gate.
    """
    gates = tuple(map(_parse, expressions))
    for gate in gates:
        if gate.change and not change:
            raise _refused(gate.expression, "there is one profile only: use fastplastic compare")
    return gates


def _parse(expression: str) -> Gate:
    form = _FORM.fullmatch(expression)
    if form is None:
        raise _refused(expression, _GRAMMAR)
    metric = _ALIASES.get(form["metric"], form["metric"])
    if metric not in METRICS:
        raise _refused(expression, f"{no_such('metric', metric, METRICS)}; {_GRAMMAR}")
    change = form["change"] is not None
    return Gate(
        expression=expression,
        metric=metric,
        operator=form["operator"],
        bound=_bound(expression, form["number"], metric, change),
        pattern=form["pattern"] and form["pattern"].strip(),
        change=change,
    )


def _bound(expression: str, text: str, metric: str, change: bool) -> float:
    """Return the number; InputError where it is none that the metric can be compared with."""
    number, share = _NUMBER.fullmatch(text), metric in SHARES
    if number and (share or not number["percent"]):
        digits = Decimal(number["digits"])
        # In decimals: 0.1 % is 0.001 then, and not a little more.
        bound = float(digits.scaleb(-2) if number["percent"] else digits)
        if (change or bound >= 0) and (not share or abs(bound) <= 1):
            return bound
    wanted = "a number" if change else "a number from 0 on"
    if share:
        wanted = f"a share in {'-1' if change else '0'}..1, as in 0.05 or 5%"
    raise _refused(expression, f"{text.strip()!r} is not {wanted}; {_GRAMMAR}")


def _refused(expression: str, why: str) -> InputError:
    return InputError(f"--fail-if {expression!r}: {why}")


def check_patterns(gates: Iterable[Gate], names: Sequence[str]) -> None:
    """Raise InputError where a pattern matches none of these names of layers."""
    for gate in gates:
        if gate.pattern is not None:
            _like(gate, names)


def check_gates(
    gates: Iterable[Gate], profiles: Sequence[ProfileFigures]
) -> tuple[GateResult, ...]:
    """Return what becomes of gates on the last of the profiles.

    Raises:
        InputError: A pattern matches no layer, or a figure is not known of any of its layers.
    """
    return tuple(_check(gate, profiles) for gate in gates)


def _check(gate: Gate, profiles: Sequence[ProfileFigures]) -> GateResult:
    ends = (profiles[0], profiles[-1]) if gate.change else (profiles[-1],)
    return _check_model(gate, ends) if gate.pattern is None else _check_layers(gate, ends)


def _check_model(gate: Gate, ends: Sequence[ProfileFigures]) -> GateResult:
    values = [of_layers(own.layers, gate.metric) for own in ends]
    unknown = dict.fromkeys(
        layer.name for own in ends for layer in own.layers if of_layer(layer, gate.metric) is None
    )
    value = _value(gate, values)
    if value is None:
        raise _unknown(gate, list(unknown))
    return GateResult(gate, ((None, value),), tuple(unknown))


def _check_layers(gate: Gate, ends: Sequence[ProfileFigures]) -> GateResult:
    found = {
        name: _value(gate, [of_layer(own.by_name[name], gate.metric) for own in ends])
        for name in _matching(gate, ends)
    }
    pairs = [(name, value) for name, value in found.items() if value is not None]
    if not pairs:
        raise _unknown(gate, list(found))
    pairs.sort(key=lambda pair: pair[1], reverse=gate.operator.startswith(">"))
    return GateResult(gate, tuple(pairs), tuple(name for name, x in found.items() if x is None))


def _matching(gate: Gate, ends: Sequence[ProfileFigures]) -> list[str]:
    """Return the names of the layers that a pattern is about: for a change, those in both."""
    return _like(gate, [name for name in ends[-1].by_name if name in ends[0].by_name])


def _like(gate: Gate, names: Sequence[str]) -> list[str]:
    """Return those of the names that match the pattern; InputError where none does."""
    assert gate.pattern is not None
    matching = [name for name in names if fnmatchcase(name, gate.pattern)]
    if not matching:
        what = "layer in both profiles like" if gate.change else "layer like"
        raise _refused(gate.expression, no_such(what, gate.pattern, names))
    return matching


def _value(gate: Gate, values: Sequence[float | None]) -> float | None:
    return difference(gate.metric, *values) if gate.change else values[-1]


def _unknown(gate: Gate, layers: Sequence[str]) -> InputError:
    return _refused(
        gate.expression,
        f"{gate.metric} is not known of any layer that it is about ({_some(layers)}): take "
        "another metric or pattern",
    )


def _some(names: Sequence[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
