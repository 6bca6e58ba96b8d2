"""Write folders so that a kill at any moment leaves the old folder or the new one."""

import ctypes
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fastplastic.errors import FileError
from fastplastic.files.atomic import UNFINISHED, sync

# Of Linux: give two files each other's names, in one step.
_EXCHANGE, _HERE = 2, -100


@contextmanager
def atomic_folder(
    path: str | os.PathLike[str],
    *,
    force: bool = False,
    backup: Path | None = None,
    replaceable: Callable[[str], bool] = lambda name: False,
) -> Iterator[Path]:
    """Yield a temporary folder to fill; on success it becomes `path`, on failure it is removed.

    The temporary folder stands beside `path`. All that is in it is synced to disk, then it is
    renamed. Where there is a folder already, on Linux both are given each other's name at once:
    whoever looks at any moment sees the old folder or the new one. Elsewhere there is a moment
    without either, in which both are whole under other names. A symbolic link is followed.

    Args:
        path: The folder.
        force: Replace a folder with files.
        backup: Where the folder that is replaced is kept, instead of what there is; by default it
            is removed.
        replaceable: Tells by its name whether a file of the old folder may be lost, where the new
            one has none of that name.

    Raises:
        FileError: There is a folder with files and `force` is not set, or one with other files, or
            it cannot be written. Nothing is left behind.
    """
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name[:50]}.{secrets.token_hex(8)}.tmp")
    try:
        _check_old(path, target, force)
        try:
            UNFINISHED.add(temporary)
            temporary.mkdir(0o700)
            yield temporary
            _sync_all(temporary)
            if backup is None:
                _check_lost(path, target, temporary, replaceable)
            else:
                # From here on this is the name of the old one, which has to stay.
                UNFINISHED.discard(temporary)
            try:
                _take_name(temporary, target, path, force)
            except (OSError, FileError):
                UNFINISHED.add(temporary)
                raise
            if backup is not None:
                _keep(temporary, backup)
        finally:  # also after Ctrl-C: nothing temporary may stay
            if temporary in UNFINISHED or backup is None:
                shutil.rmtree(temporary, ignore_errors=True)
            UNFINISHED.discard(temporary)
        sync(target.parent)
    except OSError as error:
        reason = error.strerror or error
        raise FileError(f"{path}: cannot be written ({reason}): choose another place") from error


def _check_old(path: str | os.PathLike[str], target: Path, force: bool) -> None:
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise FileError(f"{path}: is a file, expected the name of a folder: choose another name")
    if any(target.iterdir()) and not force:
        raise FileError(f"{path}: is a folder with files: name another, or pass --force")


def _check_lost(
    path: str | os.PathLike[str], target: Path, new: Path, replaceable: Callable[[str], bool]
) -> None:
    """Refuse to replace a folder in which there are files of another kind."""
    for file in sorted(target.rglob("*")) if target.is_dir() else ():
        inside = file.relative_to(target)
        if not (os.path.lexists(new / inside) or file.is_dir() or replaceable(file.name)):
            raise FileError(
                f"{path}: has {inside} in it, which the new one has not and would be lost: move it "
                "away, or name another folder"
            )


def _take_name(temporary: Path, target: Path, path: str | os.PathLike[str], force: bool) -> None:
    """Give the folder its name, and the old one, if there is one, that of the temporary one."""
    with suppress(OSError):
        target.rmdir()  # an empty one
    if not target.is_dir():
        os.rename(temporary, target)
        return
    _check_old(path, target, force)  # another program may have written it meanwhile
    if not _exchanged(temporary, target):
        aside = temporary.with_suffix(".old")
        os.rename(target, aside)
        try:
            os.rename(temporary, target)
        except BaseException:
            os.rename(aside, target)
            raise
        os.rename(aside, temporary)


def _keep(old: Path, backup: Path) -> None:
    """Give the old folder the name of the backup."""
    shutil.rmtree(backup, ignore_errors=True)
    os.rename(old, backup)


def _exchanged(one: Path, other: Path) -> bool:
    """Give two folders each other's names; False where the system cannot."""
    exchange = getattr(ctypes.CDLL(None), "renameat2", None) if os.name == "posix" else None
    if exchange is None:
        return False
    names = (os.fsencode(one), os.fsencode(other))
    return bool(exchange(_HERE, names[0], _HERE, names[1], _EXCHANGE) == 0)


def _sync_all(folder: Path) -> None:
    for parent, _, files in os.walk(folder):
        for name in files:
            file = Path(parent, name)
            if not file.is_symlink():
                sync(file)
        sync(Path(parent))
