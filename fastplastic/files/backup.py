"""Keep the old file beside a file that is written in place."""

import os
import shutil
import stat
from pathlib import Path

from fastplastic.files.atomic import atomic_write


def backup_of(path: str | os.PathLike[str]) -> Path:
    """Return the name under which the old file is kept: with .bak after it, beside the file."""
    # A link stays what it is: the file behind it is replaced.
    target = Path(os.path.realpath(path)) if Path(path).is_symlink() else Path(path)
    return target.with_name(f"{target.name}.bak")


def keep_backup(path: str | os.PathLike[str], force: bool = False) -> Path:
    """Copy a file to `backup_of(path)`, with its mode, and return that.

    Raises:
        FileError: The backup exists and `force` is not set, or cannot be written.
    """
    backup = backup_of(path)
    with atomic_write(backup, force, mode=stat.S_IMODE(os.stat(path).st_mode)) as temporary:
        shutil.copyfile(path, temporary)
    return backup
