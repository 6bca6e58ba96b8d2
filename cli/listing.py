"""`fastplastic list`: what there is to choose from."""

import json
import sys
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, Literal

import typer

from fastplastic.cli.terminal import console


def command(
    what: Annotated[Literal["criteria"], typer.Argument(help="What to list.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> Callable[[], None]:
    """List the criteria with their formulas, thresholds and sources."""
    return partial(run, as_json)


def run(as_json: bool) -> None:
    """Print all criteria."""
    from fastplastic.criteria import CRITERIA, WEIGHT_CRITERIA
    from fastplastic.trials import better_than_random

    units: list[dict[str, Any]] = [
        {
            "name": rule.name,
            "granularity": "unit",
            "candidates": rule.candidate,
            "threshold": rule.threshold,
            "needs": rule.needs,
            "formula": rule.summary,
            "only": rule.only or None,
            "source": rule.source,
            "better_than_random": better_than_random("unit", rule.name),
        }
        for rule in CRITERIA.values()
    ]
    weights = [
        {
            "name": rule.name,
            "granularity": "weight",
            "candidates": "small",
            "threshold": None,
            "needs": rule.needs,
            "formula": rule.summary,
            "only": None,
            "source": rule.source,
            "better_than_random": better_than_random("weight", rule.name),
        }
        for rule in WEIGHT_CRITERIA.values()
    ]
    entries = units + weights
    if as_json:
        print(json.dumps(entries, indent=2))
        return
    from fastplastic.cli import render

    console(sys.stdout).print(render.criteria([_row(entry) for entry in entries]))


def _row(entry: dict[str, Any]) -> tuple[str, ...]:
    only = f"; only {entry['only']}" if entry["only"] else ""
    threshold = "-" if entry["threshold"] is None else f"{entry['threshold']:g}"
    return (
        entry["granularity"], entry["name"], entry["candidates"], threshold,
        entry["formula"] + only, entry["source"],
        "{} of {}".format(*entry["better_than_random"]) if entry["better_than_random"] else "-",
    )  # fmt: skip
