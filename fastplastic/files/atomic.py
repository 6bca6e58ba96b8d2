"""Write files so that a kill at any moment leaves the old file or the new one."""

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fastplastic.errors import FileError


@contextmanager
def atomic_write(path: str | os.PathLike[str], force: bool = False) -> Iterator[Path]:
    """Yield a temporary file to write; on success it becomes `path`, on failure it is removed.

    The temporary file stands in the folder of `path`. It is synced to disk, then renamed, then the
    folder is synced: whoever reads `path` at any moment sees the old file or the new one. A
    symbolic link is followed, and a replaced file keeps its mode.

    Raises:
        FileError: The file exists and `force` is not set, is not a regular file, or cannot be
            written. Nothing is left behind.
    """
    target = Path(os.path.realpath(path))
    try:
        mode = _mode_of_old(path, target, force)
        temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        try:
            mode = stat.S_IMODE(temporary.stat().st_mode) if mode is None else mode
            yield temporary
            _sync(temporary)
            temporary.chmod(mode)  # safetensors makes files that only their owner can read
            _mode_of_old(path, target, force)  # another program may have written it meanwhile
            os.replace(temporary, target)
        except BaseException:  # also Ctrl-C: no temporary file may stay
            with suppress(OSError):
                temporary.unlink()
            raise
        _sync(target.parent)
    except OSError as error:
        reason = error.strerror or error
        raise FileError(f"{path}: cannot be written ({reason}): choose another place") from error


def _mode_of_old(path: str | os.PathLike[str], target: Path, force: bool) -> int | None:
    """Return the mode bits of the file to replace, None without one; FileError if it must stay."""
    try:
        old = target.stat()
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(old.st_mode):
        what = "a folder" if stat.S_ISDIR(old.st_mode) else "not a regular file"
        raise FileError(f"{path}: is {what}, expected the name of a file: choose another name")
    if not force:
        raise FileError(f"{path}: exists already: choose another name, or replace it with --force")
    return stat.S_IMODE(old.st_mode)


def _sync(path: Path) -> None:
    if path.is_dir() and os.name != "posix":
        return  # only POSIX systems can sync a folder
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
