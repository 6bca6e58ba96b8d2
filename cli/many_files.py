"""Checkpoints in many files as `fastplastic reinit` writes them: what is refused beforehand."""

import os
from pathlib import Path

from fastplastic.cli.outputs import require_folder
from fastplastic.cli.terminal import require_writable
from fastplastic.errors import FileError, InputError


def check_many_files(source: Path, output: Path | None, *, in_place: bool, force: bool) -> None:
    """Refuse a folder that cannot be written: InputError or FileError."""
    folder = source if source.is_dir() else source.parent
    if in_place:
        if output:
            raise InputError("-o beside --in-place: both say where to write: drop one")
        return _check_in_place(Path(os.path.realpath(folder)), force=force)
    assert output is not None
    if folder.resolve() == output.resolve():
        raise InputError(
            f"-o {output} is the checkpoint itself: name another folder, or pass --in-place "
            "instead, which keeps the old one"
        )
    if output.exists() and not output.is_dir():
        raise FileError(f"{output} is a file: name a folder")
    require_folder(output, force=force)


def refuse_batches(flag: str, source: Path) -> None:
    """Refuse an option for which batches would have to run through the model: InputError."""
    raise InputError(
        f"{flag}: runs the model, and {source} is re-initialised file by file, without the model "
        "in memory: leave it out, or pass -o with a name that ends in .safetensors"
    )


def _check_in_place(folder: Path, *, force: bool) -> None:
    """Refuse a folder that cannot be replaced, or whose old one cannot be kept."""
    from fastplastic.files import backup_of

    backup = backup_of(folder)
    # A name beside the folder: of itself it would be said that it is a folder.
    require_writable(folder.with_name(f"{folder.name}.tmp"), force=True)
    if os.path.lexists(backup) and not force:
        raise FileError(
            f"{backup} exists, an older copy of the folder: move it away, or replace it with "
            "--force"
        )
