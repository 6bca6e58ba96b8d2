"""The errors that fastplastic raises on purpose, all under one base class."""

from collections.abc import Iterable
from difflib import get_close_matches


class FastPlasticError(Exception):
    """Base of every error raised on purpose: the value, what was expected, the way out."""


class InputError(FastPlasticError):
    """An argument, an option or the data is not usable."""


class NothingToChooseError(InputError):
    """There is no unit or weight to choose from, as things are now."""


class FileError(FastPlasticError):
    """A file is missing, corrupt, not writable, or does not fit the model."""


class FingerprintError(FileError):
    """A plan or profile was made for a model with other parameters."""


def no_such(what: str, name: str, known: Iterable[str]) -> str:
    """Return the text for a name that is not known, with near ones, or else some of those known."""
    names = list(known)
    near = get_close_matches(name, names, n=3)
    if near:
        return f"no {what} {name!r} among {len(names)}: did you mean {', '.join(near)}?"
    return f"no {what} {name!r} among {len(names)}, expected one such as {', '.join(names[:3])}"
