"""Copy the folder of a checkpoint in many files, to change single tensors of the copy."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastplastic.errors import FileError
from fastplastic.files.atomic_folder import atomic_folder
from fastplastic.files.backup import backup_of
from fastplastic.files.folder import EXPORTS, WEIGHTS
from fastplastic.files.shard_index import METADATA
from fastplastic.files.stores import WeightStore


def left_out(store: WeightStore) -> list[str]:
    """Return what a new folder does not get: weights in other forms, which are those of before."""
    if store.copies_all:
        return []
    kept = {*store.files, *(file.name for file in store.folder.glob("*.safetensors.index.json"))}
    return sorted(
        file.name
        for file in store.folder.iterdir()
        if file.name not in kept and (file.name in EXPORTS or any(file.match(x) for x in WEIGHTS))
    )


@contextmanager
def changed_copy(
    store: WeightStore, target: str | os.PathLike[str] | None, *, force: bool = False
) -> Iterator[Path]:
    """Yield a copy of a checkpoint to change; then it becomes the target, whole or not at all.

    The files of weights are copied whatever they are, also what links lead to; modes stay.

    Args:
        store: The checkpoint.
        target: The new folder, which gets all but `left_out` and what is hidden; None to replace
            the checkpoint's own with all that is in it, and keep the old one as NAME.bak.
        force: Replace a checkpoint at the target, or an older NAME.bak.

    Raises:
        FileError: There is such a folder and `force` is not set, it is the checkpoint's own or in
            it, or it cannot be written.
    """
    own = Path(os.path.realpath(store.folder))
    backup = None
    if target is None:
        backup = backup_of(own)
        if os.path.lexists(backup) and not force:
            raise FileError(
                f"{backup}: exists already, an older copy: move it away, or replace it with --force"
            )
    elif own in (found := Path(os.path.realpath(target)), *found.parents) or found in own.parents:
        raise FileError(f"{target}: is the folder that is read, or in it: name another")
    with atomic_folder(
        target or own, force=force or target is None, backup=backup, replaceable=_is_weights
    ) as folder:
        _copy_rest(store, folder, everything=target is None)
        for name in store.files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(store.folder / name, folder / name)
        yield folder
        store.finish(folder)
        for name in store.files:
            shutil.copymode(store.folder / name, folder / name)
        shutil.copymode(own, folder)


def _copy_rest(store: WeightStore, folder: Path, *, everything: bool) -> None:
    """Copy all but the weights."""
    out = set() if everything else set(left_out(store))

    def ignored(parent: str, names: list[str]) -> set[str]:
        inside = Path(parent).relative_to(store.folder)
        hidden = not (everything or store.copies_all)
        return {
            name
            for name in names
            if (inside / name).as_posix() in store.files
            or (not inside.parts and name in out)
            or (hidden and name.startswith("."))
            or not (everything or Path(parent, name).exists())  # links to nowhere
        }

    # In its own place relative links lead where they did.
    shutil.copytree(store.folder, folder, symlinks=everything, ignore=ignored, dirs_exist_ok=True)
    folder.chmod(0o700)


def _is_weights(name: str) -> bool:
    return name == METADATA or any(Path(name).match(x) for x in (*WEIGHTS, "*.distcp"))
