"""--fail-if: conditions that end a command with an exit code of their own, for use in CI."""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

from fastplastic.cli.parsing import strings
from fastplastic.cli.terminal import warn
from fastplastic.errors import GateError

if TYPE_CHECKING:
    from fastplastic.comparison import GateResult


@dataclass(frozen=True, kw_only=True)
class GateOptions:
    """Which conditions make a command fail."""

    fail_if: Annotated[
        list[str],
        strings(
            "--fail-if",
            panel="Output",
            metavar="CONDITION",
            help="End with exit code 4 if this holds: 'dead>0.05' of all units, "
            "'layer4.*:dormant>30%' of a layer. May be given several times.",
        ),
    ] = field(default_factory=list)


def enforce(results: Sequence["GateResult"]) -> None:
    """Warn of layers that were left out; GateError with a line for each gate that failed."""
    failed = [result for result in results if not result.passed]
    for result in results:
        if result.gap:
            warn(f"--fail-if {result.gap}")
    if failed:
        # What was found stands before the reason, also where both go to one file.
        sys.stdout.flush()
        raise GateError(*(f"--fail-if {result.reason}" for result in failed))


def said(results: Iterable["GateResult"]) -> list[tuple[str, str]]:
    """Return what became of the gates, as facts."""
    return [
        ("gate", f"{'passed' if result.passed else 'FAILED'}: {result.reason}")
        for result in results
    ]
