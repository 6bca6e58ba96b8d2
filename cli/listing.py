"""`fastplastic list`: what there is to choose from."""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal

import typer

from fastplastic.cli.parsing import option
from fastplastic.cli.terminal import console, say
from fastplastic.errors import InputError
from fastplastic.naming import MODEL_FORMS

Entry = dict[str, Any]
# Forms of a model's name whose names are listed.
_LISTED = ("NAME", "torchvision:NAME")


@dataclass(frozen=True, kw_only=True)
class ListOptions:
    """The options of `fastplastic list`."""

    what: Annotated[
        Literal["criteria", "initializers", "activations", "models"],
        typer.Argument(help="What to list.", metavar="criteria|initializers|activations|models"),
    ]
    pattern: Annotated[
        str | None, typer.Argument(metavar="PATTERN", help="Names like it, as in 'resnet*'.")
    ] = None
    json: Annotated[bool, option("--json", panel="Output", help="Print JSON.")] = False


def run(options: ListOptions) -> None:
    """List what there is to choose from: criteria, laws of --init, activation functions, models."""
    what, pattern = options.what, options.pattern
    entries = _LISTS[what]()
    if pattern is not None:
        entries = [entry for entry in entries if _fits(entry["name"], pattern)]
        if not entries:
            raise InputError(
                f"list {what} {pattern}: none has such a name: fastplastic list {what} shows all"
            )
    if options.json:
        print(json.dumps(entries, indent=2))
        return
    out = console(sys.stdout)
    if what == "models":
        # One name a line and nothing else, for pipes.
        print(*(entry["name"] for entry in entries), sep="\n", flush=True)
        others = ", ".join(form for form, _ in MODEL_FORMS if form not in _LISTED)
        say(f"MODEL can also be {others}")
        return
    from fastplastic.cli import render

    if what == "criteria":
        out.print(render.criteria([_criterion_row(entry) for entry in entries]))
    else:
        out.print(render.facts((entry["name"], entry["says"]) for entry in entries))


def _fits(name: str, pattern: str) -> bool:
    """Tell whether a name matches a pattern; one without wildcards is looked for anywhere in it."""
    return fnmatchcase(name, pattern if set(pattern) & set("*?[") else f"*{pattern}*")


def _criteria() -> list[Entry]:
    from fastplastic.criteria import CRITERIA, WEIGHT_CRITERIA
    from fastplastic.trials import better_than_random

    units: list[Entry] = [
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
    return units + weights


def _initializers() -> list[Entry]:
    from fastplastic.initial import SUMMARIES

    return [{"name": name, "says": text} for name, text in SUMMARIES.items()]


def _activations() -> list[Entry]:
    from fastplastic.kernels import ACTIVATIONS

    return [
        {"name": name, "says": f"|f'(z)| <= 0.01 {_intervals(function.flat)}"}
        for name, function in ACTIVATIONS.items()
    ]


def _intervals(intervals: Sequence[tuple[float, float]]) -> str:
    return " and ".join(f"in [{low:.4g}, {high:.4g}]" for low, high in intervals) or "nowhere"


def _models() -> list[Entry]:
    import timm

    tagged = timm.list_models(pretrained=True)
    known = {name.partition(".")[0] for name in tagged}
    # A name alone takes the first of its weights; NAME.TAG asks for one of them.
    plain = [{"name": name, "pretrained": name in known} for name in timm.list_models()]
    plain += [{"name": name, "pretrained": True} for name in tagged if "." in name]
    return [*plain, *_of_torchvision()]


def _of_torchvision() -> list[Entry]:
    from fastplastic.sources import torchvision_names, torchvision_tags

    tags = {f"torchvision:{name}": torchvision_tags(name) for name in torchvision_names()}
    plain = [{"name": name, "pretrained": bool(own)} for name, own in tags.items()]
    tagged = [f"{name}.{tag}" for name, own in tags.items() for tag in own]
    return plain + [{"name": name, "pretrained": True} for name in tagged]


_LISTS: Mapping[str, Callable[[], list[Entry]]] = {
    "criteria": _criteria,
    "initializers": _initializers,
    "activations": _activations,
    "models": _models,
}


def _criterion_row(entry: Entry) -> tuple[str, ...]:
    only = f"; only {entry['only']}" if entry["only"] else ""
    threshold = "-" if entry["threshold"] is None else f"{entry['threshold']:g}"
    return (
        entry["granularity"], entry["name"], entry["candidates"], threshold,
        entry["formula"] + only, entry["source"],
        "{} of {}".format(*entry["better_than_random"]) if entry["better_than_random"] else "-",
    )  # fmt: skip
