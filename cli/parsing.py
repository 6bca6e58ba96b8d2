"""Options as arguments: read by typer into dataclasses, and turned back into a command to type."""

import inspect
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import MISSING, fields
from functools import partial
from typing import Any, cast, get_type_hints

import typer

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
    """Return the options that are not at their default, without the model's name."""
    values = {item.name: (getattr(options, item.name), _default(item)) for item in fields(options)}
    del values["model"]
    return {name: value for name, (value, default) in values.items() if value != default}


def arguments(options: Any, kept: type[Any]) -> list[str]:
    """Return the command line arguments for the options of class `kept` that were given."""
    names = {item.name for item in fields(kept)} - {"quiet"}
    line = [options.model]
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


def command(options: type[Any], run: Callable[[Any], None]) -> Callable[..., Callable[[], None]]:
    """Return a function that typer reads the options from, and that returns what is to be run.

    Typer only parses: run inside it, a command would have its exceptions handled by typer.
    """
    hints = get_type_hints(options, include_extras=True)

    def call(**values: Any) -> Callable[[], None]:
        return partial(run, options(**values))

    call.__annotations__ = {item.name: hints[item.name] for item in fields(options)}
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
    )
    return call
