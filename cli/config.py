"""--config: the options of any command from a TOML file; what is typed wins over it.

Keys are long option names or names of arguments. At the top of the file they hold for every command
that has them, in a table with the name of a command for that command alone.
"""

import json
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import typer

from fastplastic.errors import FileError, InputError, no_such

# Where the file is kept for messages about what stands in it.
_META = "fastplastic.config"


@dataclass(frozen=True)
class _Form:
    """What values of an option look like in the file, one and several in words, and as a check."""

    words: str
    plural: str
    fits: Callable[[Any], bool]


def config_option(commands: Mapping[str, type[Any]]) -> Any:
    """Return what typer needs to know of --config.

    Args:
        commands: The options of each command, by its name.
    """

    def read(context: typer.Context, file: Path | None) -> Path | None:
        if file is not None:
            context.default_map = options_in(file, str(context.info_name), commands)
            context.meta[_META] = file
        return file

    # Eager: read before the options that take their values from it.
    return typer.Option(
        "--config", metavar="FILE", is_eager=True, callback=read,
        help="Take options from a TOML file; what is typed wins over it.",
    )  # fmt: skip


def options_in(file: Path, command: str, commands: Mapping[str, type[Any]]) -> dict[str, Any]:
    """Return the options that a file has for a command.

    All names and all tables are checked, whichever command reads the file.

    Args:
        file: The TOML file.
        command: Name of the command.
        commands: The options of each command, by its name.

    Raises:
        FileError: The file cannot be read, or is not TOML.
        InputError: A key or a table is not known, or a value has another type.
    """
    entries = _parsed(file)
    where = f"--config {file}:"
    tables = {k: v for k, v in entries.items() if isinstance(v, dict) and k in commands}
    shared = _named(where, {k: v for k, v in entries.items() if k not in tables})
    _check_shared(where, shared, commands)
    found = {name: _named(f"{where} [{name}]", table) for name, table in tables.items()}
    for name, table in found.items():
        _check(f"{where} [{name}]", table, commands[name])
    own = {item.name for item in fields(commands[command])}
    kept = {name: value for name, value in shared.items() if name in own}
    _check(where, kept, commands[command])
    return kept | found.get(command, {})


def origin_of(error: BaseException) -> str:
    """Return which file the value that a usage error is about stands in, to be put behind it."""
    context, parameter = getattr(error, "ctx", None), getattr(error, "param", None)
    if context is None or parameter is None or _META not in context.meta:
        return ""
    source = context.get_parameter_source(parameter.name)
    return f" (in {context.meta[_META]})" if source and source.name == "DEFAULT_MAP" else ""


def _parsed(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_bytes().decode())
    except OSError as error:
        raise FileError(
            f"--config {file}: cannot be read ({error.strerror or error}): check the path"
        ) from None
    except tomllib.TOMLDecodeError as error:
        raise FileError(f"--config {file}: is not TOML: {error}") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise FileError(f"--config {file}: is not UTF-8 text, at line {line}: save it so") from None


def _named(where: str, entries: Mapping[str, Any]) -> dict[str, Any]:
    """Return entries under the names of fields; InputError where one stands there twice."""
    named: dict[str, Any] = {}
    for key, value in entries.items():
        name = key.replace("-", "_")
        if name in named:
            raise InputError(f"{where} {_key(name)} stands there twice, also as {name}: drop one")
        named[name] = value
    return named


def _check_shared(where: str, shared: Mapping[str, Any], commands: Mapping[str, type[Any]]) -> None:
    """Refuse keys outside tables that no command has, and tables of no command: InputError."""
    known = {item.name: None for options in commands.values() for item in fields(options)}
    for name, value in shared.items():
        if name in known:
            continue
        if name in commands:
            raise InputError(f"{where} {name}: expected a table of options: [{name}]")
        if isinstance(value, dict):
            raise InputError(f"{where} {no_such('command', name, commands)}")
        raise InputError(f"{where} {no_such('option', _key(name), map(_key, known))}")


def _check(where: str, entries: Mapping[str, Any], options: type[Any]) -> None:
    """Refuse keys that a command does not have, and values of another type: InputError."""
    hints = get_type_hints(options)
    known = [item.name for item in fields(options)]
    for name, value in entries.items():
        if name not in known:
            raise InputError(f"{where} {no_such('option', _key(name), map(_key, known))}")
        form = _form(hints[name])
        if not form.fits(value):
            # As TOML writes it, or nearly so.
            got = json.dumps(value, default=str, ensure_ascii=False)
            raise InputError(f"{where} {_key(name)} = {got}: expected {form.words}")


def _key(name: str) -> str:
    return name.replace("_", "-")


def _form(hint: Any) -> _Form:
    """Return what values of a type look like."""
    arguments = get_args(hint)
    if NoneType in arguments:
        return _form(next(one for one in arguments if one is not NoneType))
    if get_origin(hint) is Literal:
        names = f"one of {json.dumps(arguments)[1:-1]}"
        return _Form(names, names, lambda value: value in arguments)
    if get_origin(hint) is list:
        one = _form(arguments[0])
        return _list(f"a list of {one.plural}", one)
    if get_origin(hint) is tuple:
        one, size = _form(arguments[0]), len(arguments)
        return _list(f"a list of {size} {one.plural}", one, size)
    return _FORMS.get(hint, _TEXT)


def _list(words: str, one: _Form, size: int | None = None) -> _Form:
    def fits(value: Any) -> bool:
        whole = isinstance(value, list) and size in (None, len(value))
        return whole and all(map(one.fits, value))

    return _Form(words, words, fits)


_TEXT = _Form("text in quotes", "texts in quotes", lambda value: isinstance(value, str))
# The bool of Python is an int.
_FORMS = {
    bool: _Form("true or false", "true or false", lambda value: isinstance(value, bool)),
    int: _Form("a whole number", "whole numbers", lambda value: type(value) is int),
    float: _Form("a number", "numbers", lambda value: type(value) in (int, float)),
}
