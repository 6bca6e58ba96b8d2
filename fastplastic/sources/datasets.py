"""Open folders and named datasets through timm, and say what their classes are."""

import io
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastplastic.errors import FileError, InputError
from fastplastic.sources.hub import quiet, reason
from fastplastic.sources.image_folders import Folder, look_into, notes_of
from fastplastic.sources.images import Files, ImageSet, Indexed
from fastplastic.sources.shape import timm_data

# Prefixes that timm.data.create_dataset knows; other names are folders.
_LIBRARIES = ("torch", "hfds", "hfids", "tfds", "wds")
# Small enough to be downloaded unasked, once.
_SMALL = ("cifar10", "cifar100", "mnist", "kmnist", "fashion_mnist", "qmnist")
_CHOICES = "expected a folder of class folders, 'sample', 'noise' or a name such as hfds/NAME"


@dataclass(frozen=True, eq=False)
class Opened:
    """A dataset of timm.

    Attributes:
        name: How it was asked for.
        dataset: The dataset.
        warnings: What a user must know of its folder.
    """

    name: str
    dataset: Any
    warnings: tuple[str, ...] = ()


def open_dataset(spec: str, split: str, batch_size: int) -> Opened:
    """Return the dataset of timm for a folder, a tar file or a name with prefix.

    Args:
        spec: A folder of class folders, or with a folder for each split; a tar of one; or a name as
            for `timm.data.create_dataset`, with "@FOLDER" after it to say where it lies.
        split: Name of the split, where there are several.
        batch_size: Some libraries read ahead by it.

    Raises:
        InputError: The library that a name needs is not installed.
        FileError: There are no images, or it cannot be opened or read in full.
    """
    prefix, slash, rest = spec.partition("/")
    library = prefix.lower() if slash and prefix.lower() in _LIBRARIES else None
    options: dict[str, Any] = {"split": split, "batch_size": batch_size}
    folders: dict[str, Folder] = {}
    if library and not Path(spec).exists():
        name, _, root = spec.partition("@")
        options |= {"name": name, "root": root or None}
        if library == "torch":
            options["root"] = root or str(Path(torch.hub.get_dir()).with_name("datasets"))
            options["download"] = rest.partition("@")[0].lower() in _SMALL
    else:
        options |= {"name": "", "root": _existing(spec)}
        folders = look_into(options["root"]) if Path(spec).is_dir() else {}
        if options["root"].endswith(".tar"):
            options["cache_tarinfo"] = False  # timm would unpickle the cache, with all code in it
    try:
        with quiet(), redirect_stdout(io.StringIO()):
            dataset = timm_data().create_dataset(**options)
    except ImportError as error:
        raise InputError(f"{spec}: needs a library ({reason(error)}): install it") from error
    except Exception as error:  # many libraries stand behind this call, each with its own errors
        if not library and "Found 0 images" in str(error):
            raise FileError(
                f"{spec}: no images found, expected class folders with .jpg, .jpeg or .png "
                "files: check the folder"
            ) from error
        raise FileError(
            f"{spec}: cannot be opened ({reason(error)}), {_CHOICES}: check the name"
        ) from error
    return Opened(spec, dataset, notes_of(folders, dataset.reader.root) if folders else ())


def _existing(name: str) -> str:
    path = Path(name)
    if path.is_dir() or (path.is_file() and path.suffix == ".tar"):
        return str(path)
    what = "is a file" if path.exists() else "no such folder"
    way = "check the path"
    if path.is_file() and path.suffix.lower() in (".txt", ".jsonl", ".ndjson"):
        way = "the model takes images, and texts are for models of texts (hf:FOLDER)"
    raise FileError(f"{name}: {what}, {_CHOICES}: {way}")


def class_names_of(holder: Any) -> tuple[str, ...] | None:
    """Return the names of the classes in the order of the labels, or None where unknown."""
    classes = getattr(holder, "classes", None)
    if isinstance(classes, list | tuple):  # first: torchvision's ImageNet maps synonyms too
        return tuple(str(name) for name in classes)
    names = getattr(holder, "class_to_idx", None) or getattr(holder, "class_name_to_idx", None)
    if isinstance(names, dict) and names:
        return tuple(str(name) for name in sorted(names, key=names.__getitem__))
    return None


def image_set_of(opened: Opened) -> tuple[ImageSet, tuple[str, ...]]:
    """Return the images of a dataset, which are read by index, and the names of its classes.

    Raises:
        FileError: There are fewer than two classes, or images in no class.
    """
    name, dataset = opened.name, opened.dataset
    reader = getattr(dataset, "reader", None)
    names = class_names_of(reader or dataset)
    image_set = Files(reader, opened.warnings) if reader is not None else Indexed(dataset)
    found = names or tuple(str(label) for label in range(1 + max(image_set.labels or [-1])))
    if len(found) < 2:
        raise FileError(
            f"{name}: has {_classes(found)}, expected at least two class folders with images in "
            "each: rearrange the images, or name the folder that holds the class folders"
        )
    if "" in found:
        raise FileError(
            f"{name}: images lie beside the class folders, expected all in one of them: move them"
        )
    return image_set, found


def _classes(names: Sequence[str]) -> str:
    if not names:
        return "0 classes"
    return f"1 class ({names[0]})" if names[0] else "no class folders, only images"
