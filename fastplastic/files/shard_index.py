"""The list of a checkpoint in many files: which file holds which tensor."""

import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from fastplastic.errors import FileError
from fastplastic.files.fields import load_json

SAFETENSORS, PICKLES = ".safetensors.index.json", ".bin.index.json"
METADATA = ".metadata"
# By these names transformers looks for them; others are taken where there is one only.
_USUAL = (f"model{SAFETENSORS}", f"pytorch_model{PICKLES}")


def sharded(path: str | os.PathLike[str]) -> Path | None:
    """Return the list of a checkpoint in many files; None where the path is of no such thing.

    Args:
        path: A folder with such a list, or the list itself.

    Returns:
        `.metadata` of torch.distributed.checkpoint, or an index of safetensors or PyTorch files.

    Raises:
        FileError: There are several lists, or it is a folder without any.
    """
    path = Path(path)
    if path.name.endswith((SAFETENSORS, PICKLES)) or path.name == METADATA:
        return path
    if not path.is_dir():
        return None
    if (path / METADATA).is_file():
        return path / METADATA
    found = [path / name for name in _USUAL if (path / name).is_file()]
    found = found[:1] or sorted(path.glob(f"*{SAFETENSORS}")) or sorted(path.glob(f"*{PICKLES}"))
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(file.name for file in found)
        raise FileError(f"{path}: has several lists of tensors ({names}): name the one to read")
    raise FileError(f"{path}: {_what_it_is(path)}")


def _what_it_is(path: Path) -> str:
    parts = sorted(x.name for x in (*path.glob("*.distcp"), *path.glob("__*.metadata")))
    if parts:
        return (
            f"has parts of a distributed checkpoint ({parts[0]}, ...) and no {METADATA}, expected "
            "it beside them: it is written last, so the save was cut off; take another checkpoint"
        )
    files = [x for kind in ("*.safetensors", "*.bin", "*.pth", "*.pt") for x in path.glob(kind)]
    way = f"name the file, as in {min(files)}" if files else "check the path"
    return (
        f"is a folder, expected a file of weights, or a folder with {METADATA} of "
        f"torch.distributed.checkpoint or with model{SAFETENSORS}: {way}"
    )


def read_index(index: Path) -> dict[str, Path]:
    """Return {name of a tensor: its file} of an index, all of which are there.

    Raises:
        FileError: It cannot be read, has no list, or names a file that is missing or elsewhere.
    """
    try:
        content = load_json(index.read_bytes())
    except OSError as error:
        raise FileError(f"{index}: cannot be read ({error.strerror or error}): check it") from error
    except ValueError as error:
        raise FileError(f"{index}: cannot be read as JSON ({error}): get it anew") from error
    listed = content.get("weight_map") if isinstance(content, Mapping) else None
    if not isinstance(listed, Mapping) or not listed:
        raise FileError(f"{index}: has no weight_map, expected the file of each tensor")
    return {name: part_file(index, name, file) for name, file in listed.items()}


def part_file(index: Path, name: str, file: object) -> Path:
    """Return the file of a checkpoint that its list names for a tensor.

    Raises:
        FileError: It is missing, or outside of the folder.
    """
    parts = PurePosixPath(file).parts if isinstance(file, str) else ()
    if not parts or parts[0] == "/" or ".." in parts or "\\" in str(file):
        raise FileError(
            f"{index}: has {name} in {file!r}, expected a file in the same folder: get it anew"
        )
    path = index.parent.joinpath(*parts)
    if not path.is_file():
        raise FileError(
            f"{index}: has {name} in {file}, which is not there: a part of the checkpoint is "
            "missing, get it anew"
        )
    return path
