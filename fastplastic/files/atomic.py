"""Write files so that a kill at any moment leaves the old file or the new one."""

import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fastplastic.errors import FileError

# Temporary files and folders, to be removed where the process ends.
UNFINISHED = set[Path]()


@contextmanager
def atomic_write(
    path: str | os.PathLike[str], force: bool = False, *, mode: int | None = None
) -> Iterator[Path]:
    """Yield a temporary file to write; on success it becomes `path`, on failure it is removed.

    The temporary file stands in the folder of `path`. It is synced to disk, then renamed, then the
    folder is synced: whoever reads `path` at any moment sees the old file or the new one. A
    symbolic link is followed. Of several programs that write one file at once the last one wins
    with `force`, and the first one without.

    Args:
        path: The file.
        force: Replace an existing file.
        mode: Of the file; by default that of the file that is replaced, or as usual for new files.

    Raises:
        FileError: The file exists and `force` is not set, is not a regular file, or cannot be
            written. Nothing is left behind.
    """
    target = Path(os.path.realpath(path))
    # Names may be as long as the file system takes, and this one is longer.
    temporary = target.with_name(f".{target.name[:50]}.{secrets.token_hex(8)}.tmp")
    try:
        old = _mode_of_old(path, target, force)
        bits = old if mode is None else mode
        try:
            UNFINISHED.add(temporary)
            _create(temporary, 0o666 if bits is None else 0o600)
            bits = stat.S_IMODE(temporary.stat().st_mode) if bits is None else bits
            yield temporary
            sync(temporary)
            temporary.chmod(bits)  # safetensors makes files that only their owner can read
            _mode_of_old(path, target, force)  # another program may have written it meanwhile
            if not _take_name(temporary, target, path, force):
                os.replace(temporary, target)
        finally:  # also after Ctrl-C: no temporary file may stay
            with suppress(OSError):
                temporary.unlink()
            UNFINISHED.discard(temporary)
        sync(target.parent)
    except OSError as error:
        reason = error.strerror or error
        raise FileError(f"{path}: cannot be written ({reason}): choose another place") from error


def remove_unfinished() -> None:
    """Remove all temporary files, where the process is about to end."""
    for temporary in list(UNFINISHED):
        with suppress(OSError):
            # What is written to a folder appears in it one by one, and may still do so.
            shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink()


def _create(path: Path, mode: int) -> None:
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode))


def _take_name(temporary: Path, target: Path, path: str | os.PathLike[str], force: bool) -> bool:
    """Give the file its name where no other has it; FileError where another program was faster."""
    if force:
        return False
    try:
        os.link(temporary, target)
    except FileExistsError:
        raise _exists(path) from None
    except OSError:  # some file systems have no second names
        return False
    return True


def _exists(path: str | os.PathLike[str]) -> FileError:
    return FileError(f"{path}: exists already: choose another name, or replace it with --force")


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
        raise _exists(path)
    return stat.S_IMODE(old.st_mode)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if path.is_dir() and os.name != "posix":
        return  # only POSIX systems can sync a folder
    only_read = path.is_dir() or not os.access(path, os.W_OK)
    descriptor = os.open(path, os.O_RDONLY if only_read else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
