"""The errors that fastplastic raises on purpose, all under one base class."""

import sys
import warnings
from collections.abc import Iterable
from difflib import get_close_matches

# Whose code calls the library on behalf of somebody.
_BETWEEN = {"fastplastic", "torch", "contextlib", "transformers", "lightning", "accelerate"}


class FastPlasticError(Exception):
    """Base of every error raised on purpose: the value, what was expected, the way out."""


class InputError(FastPlasticError):
    """An argument, an option or the data is not usable."""


class NothingToChooseError(InputError):
    """There is no unit or weight to choose from, as things are now."""


class NoBatchesError(InputError):
    """There is no batch to measure anything on, in any process."""


class ProcessError(FastPlasticError):
    """Another process that trains the same model failed, is gone, or does something else."""


class FileError(FastPlasticError):
    """A file is missing, corrupt, not writable, or does not fit the model."""


class FingerprintError(FileError):
    """A plan or profile was made for a model with other parameters."""


class GateError(FastPlasticError):
    """Conditions of --fail-if are met; `args` has a line for each."""


def no_such(what: str, name: str, known: Iterable[str]) -> str:
    """Return the text for a name that is not known, with near ones, or else some of those known."""
    names = list(known)
    near = get_close_matches(name, names, n=3)
    if near:
        return f"no {what} {name!r} among {len(names)}: did you mean {', '.join(near)}?"
    return f"no {what} {name!r} among {len(names)}, expected one such as {', '.join(names[:3])}"


def warn(text: str) -> None:
    """Warn at the line of the caller's own code, not inside of the library or of torch."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and _package(frame.f_globals) in _BETWEEN:
        frame, level = frame.f_back, level + 1
    warnings.warn(text, stacklevel=level)


def _package(names: dict[str, object]) -> str:
    return str(names.get("__name__", "")).partition(".")[0]
