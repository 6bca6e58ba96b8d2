"""What lies in a folder of images, and would be left out of it, or counted twice, in silence."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from fastplastic.errors import FileError

_SHOWN = 3
# Pictures too, which timm does not take for images.
_OTHERS = (
    ".apng", ".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".pgm", ".pnm", ".ppm", ".tga",
    ".tif", ".tiff", ".webp",
)  # fmt: skip


@dataclass(eq=False)
class Folder:
    """What was found in one folder, without those inside of it.

    Attributes:
        images: Number of files that are read as images.
        others: Number of files that are images too, but of a kind that is not read, by ending.
    """

    images: int = 0
    others: Counter[str] = field(default_factory=Counter)


def look_into(root: str) -> dict[str, Folder]:
    """Return {folder: what is in it} of a folder and all inside it.

    Raises:
        FileError: A folder cannot be read, or a link leads back to a folder around it.
    """
    from timm.data.readers.img_extensions import get_img_extensions

    taken = set(get_img_extensions())  # type: ignore[no-untyped-call]
    found: dict[str, Folder] = {}
    # With each folder, where it and those around it really are.
    left: list[tuple[str, tuple[str, ...]]] = [(root, (os.path.realpath(root),))]
    while left:
        path, places = left.pop()
        found[path] = Folder()
        for entry in _entries(path):
            if _is_folder(entry):
                left.append((entry.path, _inside(entry, places)))
            else:
                ending = os.path.splitext(entry.name)[1].lower()
                found[path].images += ending in taken
                found[path].others.update([ending] * (ending in _OTHERS))
    return found


def notes_of(found: dict[str, Folder], root: str) -> tuple[str, ...]:
    """Return what to say of all folders in `root`: images and classes that are left out."""
    inside = {path: x for path, x in found.items() if _open(path).startswith(_open(root))}
    notes = []
    others: Counter[str] = sum((x.others for x in inside.values()), Counter())
    if others:
        kinds = ", ".join(f"{number} {ending}" for ending, number in others.most_common())
        some = "1 image is" if others.total() == 1 else f"{others.total()} images are"
        notes.append(f"{root}: {some} left out, as only .jpg, .jpeg and .png are read: {kinds}")
    without = inside.keys() - _around_images(inside)
    # Of an empty folder in an empty one, the outer one says all.
    outer = [path for path in without if os.path.dirname(path) not in without]
    empty = sorted(path for path in outer if not _is_hidden(path))
    if empty:
        some = f"{len(empty)} folder{'s' * (len(empty) > 1)} without images"
        notes.append(f"{root}: {some}, so no class of that name: {_some(empty)}")
    hidden = sorted(path for path, x in inside.items() if x.images and _is_hidden(path))
    if hidden:
        notes.append(f"{root}: hidden folders are classes too: {_some(hidden)}")
    return tuple(notes)


def _entries(path: str) -> Iterator["os.DirEntry[str]"]:
    try:
        with os.scandir(path) as entries:
            yield from entries
    except OSError as error:
        raise FileError(
            f"{path}: cannot be read ({error.strerror or error}), so its images would be left "
            "out: correct its permissions, or take it away"
        ) from error


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _inside(entry: "os.DirEntry[str]", places: Sequence[str]) -> tuple[str, ...]:
    """Return where a folder and those around it really are; FileError where it is around itself."""
    if not entry.is_symlink():
        return (*places, os.path.join(places[-1], entry.name))
    real = os.path.realpath(entry.path)
    if any(_open(place).startswith(_open(real)) for place in places):
        raise FileError(
            f"{entry.path}: is a link to a folder around it, {real}, so its images would be "
            "counted again and again: remove the link"
        )
    return (*places, real)


def _open(path: str) -> str:
    return path if path.endswith(os.sep) else path + os.sep


def _around_images(inside: dict[str, Folder]) -> set[str]:
    """Return the folders that hold images, themselves or in folders inside of them."""
    found = set[str]()
    for path, folder in inside.items():
        while folder.images and path in inside and path not in found:
            found.add(path)
            path = os.path.dirname(path)
    return found


def _is_hidden(path: str) -> bool:
    return os.path.basename(path).startswith(".")


def _some(paths: Sequence[str]) -> str:
    names = ", ".join(os.path.basename(path) for path in paths[:_SHOWN])
    return names + ", ..." * (len(paths) > _SHOWN)
