"""Parts of the pages that are made from the code: criteria, and the options of all commands."""

import re
from collections.abc import Callable, Iterator
from importlib import import_module
from inspect import getdoc
from typing import Any

import typer

from fastplastic import criteria
from fastplastic.cli.examples import EXAMPLES
from fastplastic.cli.main import app
from fastplastic.criteria import CRITERIA, WEIGHT_CRITERIA, Criterion, WeightCriterion
from fastplastic.trials import better_than_random

_TRIALS = "better than random units in the project's own trials"


def criteria_of_units() -> str:
    """Return a section for each criterion of units."""
    return "\n\n".join("\n\n".join(_unit_section(each)) for each in CRITERIA.values())


def criteria_of_weights() -> str:
    """Return a section for each criterion of single weights."""
    return "\n\n".join("\n\n".join(_weight_section(each)) for each in WEIGHT_CRITERIA.values())


def _unit_section(criterion: Criterion) -> Iterator[str]:
    beyond = "<=" if criterion.candidate == "small" else ">="
    threshold = criterion.threshold
    facts = {
        "formula": f"`{criterion.summary}`",
        "candidates": f"{criterion.candidate} scores",
        "threshold": "none in its source" if threshold is None else f"score {beyond} {threshold}",
        "reads": criterion.needs,
        "activation functions": criterion.only or "all",
        "source": criterion.source,
    } | _trials("unit", criterion.name)
    yield f"### {criterion.name}"
    yield _table(facts)
    yield _words(getattr(criteria, criterion.name, None))


def _weight_section(criterion: WeightCriterion) -> Iterator[str]:
    yield f"### {criterion.name} (weights)"
    facts = {"formula": f"`{criterion.summary}`", "candidates": "small scores"}
    facts |= {"reads": criterion.needs, "source": criterion.source}
    yield _table(facts | _trials("weight", criterion.name))
    if criterion.warning:
        yield f"{criterion.warning[:1].upper()}{criterion.warning[1:]}."


def _trials(granularity: str, name: str) -> dict[str, str]:
    better = better_than_random(granularity, name)
    return {_TRIALS: f"on {better[0]} of {better[1]} networks"} if better else {}


def _table(facts: dict[str, str]) -> str:
    rows = (f"| {name} | {_cell(value)} |" for name, value in facts.items())
    return "\n".join(["| | |", "|---|---|", *rows])


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _words(formula: Any) -> str:
    """Return what a function says of itself, without its arguments."""
    text = (getattr(formula, "__doc__", None) or "").partition("\n\n    Args:")[0]
    paragraphs = (" ".join(part.split()) for part in text.split("\n\n"))
    said = "\n\n".join(paragraphs).removeprefix("Return ")
    return said[:1].upper() + said[1:]


def commands() -> str:
    """Return a section for each command, with all of its options by panel."""
    group: Any = typer.main.get_command(app)
    context = group.make_context("fastplastic", [], resilient_parsing=True)
    return "\n\n".join(
        "\n\n".join(_command(name, command, context)) for name, command in group.commands.items()
    )


def _command(name: str, command: Any, parent: Any) -> Iterator[str]:
    context = command.context_class(command, info_name=name, parent=parent)
    yield f"## {name}"
    yield f"    {command.get_usage(context).removeprefix('Usage: ')}"
    yield from _paragraphs(command.help)
    panels: dict[str, list[str]] = {}
    for parameter in command.get_params(context):
        # None for one that is hidden.
        if record := parameter.get_help_record(context):
            argument = parameter.param_type_name == "argument"
            default = "Arguments" if argument else "Options"
            panel = getattr(parameter, "rich_help_panel", None) or default
            panels.setdefault(panel, []).append(f"| `{_cell(record[0])}` | {_plain(record[1])} |")
    for panel, rows in panels.items():
        yield f"**{panel}**"
        yield "\n".join(["| option | meaning |", "|---|---|", *rows])
    yield "**Examples**"
    for purpose, line in EXAMPLES[name]:
        yield _plain(purpose)
        yield f"    fastplastic {line}"


def _paragraphs(text: str | None) -> Iterator[str]:
    """Return text without rich's markup; lines that are commands as code."""
    from rich.text import Text

    for part in (text or "").split("\n\n"):
        plain = Text.from_markup(part).plain.strip("\n")
        code = plain.lstrip().startswith(("fastplastic ", "$ "))
        yield f"    {plain}" if code else _plain(" ".join(plain.split()))


def _plain(text: str) -> str:
    """Return text in which nothing is taken for markup."""
    for character in r"\`*_<>[]|":
        text = text.replace(character, f"\\{character}")
    return text


def _module(name: str) -> Callable[[], str]:
    """Return what gives the docstring of a module, which is Markdown."""
    return lambda: getdoc(import_module(name)) or ""


def as_rst(lines: list[str]) -> list[str]:
    """Return a docstring in which indented examples and abs(x) as |x| are RST.

    Sections such as "Args:" follow their name without a line between, examples do not.
    """
    made: list[str] = []
    example, last = False, "-"
    for line in lines:
        indented = line.startswith("    ")
        if line.strip():
            if indented and not example and last and not made[-1].strip():
                made += ["::", ""]
                example = True
            example = example and indented
            last = "" if indented else line
        # What is joined to code needs a mark between: `Arm`s.
        text = re.sub(r"(`[^`]+`)(?=\w)", r"\1\\ ", line.replace("|", "\\|"))
        made.append(line if example else text)
    return made


# The mark in a page, and what takes its place.
PARTS: dict[str, Callable[[], str]] = {
    "<!-- criteria of units -->": criteria_of_units,
    "<!-- criteria of weights -->": criteria_of_weights,
    "<!-- commands -->": commands,
    "<!-- diagnostics -->": _module("fastplastic.diagnostics"),
    "<!-- figures -->": _module("fastplastic.integrations.loggers"),
    "<!-- tables -->": _module("fastplastic.kernels.tables"),
}
