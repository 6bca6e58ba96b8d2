"""How a page came about: all that somebody needs to make it again."""

import platform
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import fastplastic

# What settles the numbers, beside the program itself.
_LIBRARIES = ("torch", "numba", "triton", "timm", "numpy")


@dataclass(frozen=True)
class Origin:
    """What was typed, on what, and on which data.

    Attributes:
        command: The command line, quoted for a shell.
        versions: (name, version) of the program, of the libraries behind it and of Python.
        digest: sha256 of the data, or None where they were not read to the end.
    """

    command: str
    versions: tuple[tuple[str, str], ...]
    digest: str | None

    @classmethod
    def of(cls, arguments: Sequence[str], digest: str | None) -> "Origin":
        """Return the origin of what these arguments of the program make here and now."""
        return cls(shlex.join(["fastplastic", *arguments]), _versions(), digest)


def _versions() -> tuple[tuple[str, str], ...]:
    libraries = ((name, _version(name)) for name in _LIBRARIES)
    own = ("fastplastic", fastplastic.__version__)
    return own, *libraries, ("Python", f"{platform.python_version()} on {platform.platform()}")


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return "not installed"
