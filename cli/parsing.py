"""Options as arguments: read by typer into dataclasses, and turned back into a command to type."""

import inspect
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import MISSING, fields
from functools import partial
from pathlib import Path
from typing import Annotated, Any, cast, get_args, get_type_hints

import typer
from typer.models import ArgumentInfo

# The arguments as they were typed, for what says how it was made. Options know only their values.
TYPED: ContextVar[tuple[str, ...]] = ContextVar("TYPED", default=())


def option(*names: str, panel: str, help: str, **more: Any) -> Any:
    """Return what typer needs to know of an option."""
    return typer.Option(*names, rich_help_panel=panel, help=help, **more)


def strings(*names: str, panel: str, help: str, metavar: str) -> Any:
    """Return what typer needs to know of an option that may be given several times."""
    return option(*names, panel=panel, help=help, metavar=metavar, show_default=False)


def _default(item: Any) -> Any:
    """Return the default of an option; `inspect.Parameter.empty` where it has to be given."""
    if item.default_factory is not MISSING:
        return item.default_factory()
    return inspect.Parameter.empty if item.default is MISSING else item.default


def given(options: Any) -> dict[str, Any]:
    """Return the options that are not at their default, without the arguments that have no flag."""
    values = {item.name: (getattr(options, item.name), _default(item)) for item in fields(options)}
    without = _positional(type(options))
    return {
        name: value
        for name, (value, default) in values.items()
        if value != default and name not in without
    }


def _positional(options: type[Any]) -> list[str]:
    """Return the names of what is typed without a flag."""
    hints = get_type_hints(options, include_extras=True)
    return [
        item.name
        for item in fields(options)
        if isinstance(get_args(hints[item.name])[-1], ArgumentInfo)
    ]


def arguments(options: Any, kept: type[Any]) -> list[str]:
    """Return the command line arguments for the options of class `kept` that were given."""
    names = {item.name for item in fields(kept)} - {"quiet"}
    line: list[str] = []
    for name in _positional(kept):
        value = getattr(options, name)
        line += map(str, value) if isinstance(value, list) else [str(value)]
    for name, value in given(options).items():
        if name not in names:
            continue
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            line += [flag if value else f"--no-{flag[2:]}"]
        elif isinstance(value, list):
            line += [part for element in value for part in (flag, element)]
        else:
            line += [flag, *(map(str, value) if isinstance(value, tuple) else [str(value)])]
    return line


def typed(command: str, options: Any) -> tuple[str, ...]:
    """Return arguments that do the same again, wherever a file of --config may be by then."""
    now = TYPED.get()
    if not any(word.partition("=")[0] == "--config" for word in now):
        return now
    return command, *arguments(options, type(options))


def command(
    options: type[Any], run: Callable[[Any], None], config: Any
) -> Callable[..., Callable[[], None]]:
    """Return a function that typer reads the options from, and that returns what is to be run.

    Typer only parses: run inside it, a command would have its exceptions handled by typer.

    Args:
        options: The class of the options.
        run: Takes the options.
        config: What typer needs to know of --config, which gives the others their values.
    """
    hints = get_type_hints(options, include_extras=True) | {
        "config": Annotated[Path | None, config]
    }

    def call(config: Path | None, **values: Any) -> Callable[[], None]:
        return partial(run, options(**values))

    call.__annotations__ = hints
    # Rich breaks lines where the source does, but for the space between paragraphs.
    paragraphs = (inspect.getdoc(run) or "").split("\n\n")
    call.__doc__ = "\n\n".join(" ".join(part.split()) for part in paragraphs)
    cast(Any, call).__signature__ = inspect.Signature(
        [
            inspect.Parameter(
                item.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=_default(item),
                annotation=hints[item.name],
            )
            for item in fields(options)
        ]
        + [
            inspect.Parameter(
                "config", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=hints["config"]
            )
        ]
    )
    return call
