"""What a command writes: whether it can be written is asked before anything slow starts."""

import csv
import io
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastplastic.cli.launch import is_first
from fastplastic.cli.terminal import require_writable
from fastplastic.errors import FileError, InputError

STDOUT = Path("-")
# How the names of PyTorch files end.
TORCH = (".pth", ".pt", ".pth.tar", ".ckpt")


def check_outputs(
    paths: Iterable[Path | None], *, force: bool, inputs: Iterable[Path | None] = ()
) -> None:
    """Raise FileError unless each file can be written; InputError for one twice, or an input."""
    named = [path for path in paths if path]
    places = [path if path == STDOUT else path.resolve() for path in named]
    for at, path in enumerate(named):
        if places[at] in places[:at]:
            raise InputError(f"two outputs are {path}: give each of them another name")
        if path == STDOUT:
            continue
        if any(is_same(path, other) for other in inputs):
            raise InputError(f"{path} is read here, and would be overwritten: name another file")
        if is_first():
            # The others may be on machines without that folder.
            require_writable(path, force=force)


def is_same(one: Path, other: Path | None) -> bool:
    """Tell whether two names are of the same file, also by links."""
    if other is None:
        return False
    there = one.exists() and other.exists()
    return one.samefile(other) if there else one.resolve() == other.resolve()


def check_in_place(checkpoint: Path | None, output: Path | None, *, force: bool) -> None:
    """Refuse to write a checkpoint in place where it cannot be, or not be kept as well."""
    from fastplastic.files import backup_of

    if output:
        raise InputError("-o beside --in-place: both say where to write: drop one")
    if checkpoint is None:
        raise InputError("--in-place: expected --checkpoint FILE, which is the file to write")
    require_writable(checkpoint.resolve(), force=True)
    if not os.access(checkpoint, os.W_OK):
        raise FileError(f"{checkpoint}: is read-only: allow writing, or pass -o instead")
    backup = backup_of(checkpoint)
    if backup.exists() and not force:
        raise FileError(
            f"{backup} exists, an older copy of the file: move it away, or replace it with --force"
        )


def check_suffix(flag: str, path: Path | None, *suffixes: str) -> None:
    """Raise InputError unless the name of a file, if there is one, ends as it should."""
    if path and not path.name.endswith(suffixes):
        expected = " or ".join(suffixes)
        raise InputError(f"{flag} {path}: expected a name that ends in {expected}")


def write_json(path: Path, values: Mapping[str, Any], *, force: bool) -> None:
    """Write values to a file, or print them where it is "-"."""
    _write(path, json.dumps(values, indent=2, allow_nan=False) + "\n", force=force)


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]], *, force: bool) -> None:
    """Write rows with the same columns under their names, or print them; None is empty."""
    text = io.StringIO()
    table = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    _write(path, text.getvalue(), force=force)


def _write(path: Path, text: str, *, force: bool) -> None:
    from fastplastic.files import atomic_write

    if path == STDOUT:
        sys.stdout.write(text)
        return
    with atomic_write(path, force) as temporary:
        temporary.write_text(text, encoding="utf-8")


def require_folder(path: Path, *, force: bool) -> None:
    """Raise FileError unless a folder can be made, or filled, at `path`."""
    if not is_first():
        return
    if path.is_dir():
        if any(path.iterdir()) and not force:
            raise FileError(f"{path} has files in it: give another name, or --force to overwrite")
        return
    require_writable(path, force=False)
