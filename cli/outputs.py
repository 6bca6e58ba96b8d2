"""What a command writes: whether it can be written is asked before anything slow starts."""

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fastplastic.cli.terminal import require_writable
from fastplastic.errors import InputError

STDOUT = Path("-")


def check_outputs(paths: Iterable[Path | None], *, force: bool) -> None:
    """Raise FileError unless each file that is named can be written."""
    for path in paths:
        if path and path != STDOUT:
            require_writable(path, force=force)


def check_suffix(flag: str, path: Path | None, *suffixes: str) -> None:
    """Raise InputError unless the name of a file, if there is one, ends as it should."""
    if path and path.suffix not in suffixes:
        expected = " or ".join(suffixes)
        raise InputError(f"{flag} {path}: expected a name that ends in {expected}")


def write_json(path: Path, values: Mapping[str, Any], *, force: bool) -> None:
    """Write values to a file, or print them where it is "-"."""
    from fastplastic.files import atomic_write

    text = json.dumps(values, indent=2, allow_nan=False) + "\n"
    if path == STDOUT:
        sys.stdout.write(text)
        return
    with atomic_write(path, force) as temporary:
        temporary.write_text(text)
