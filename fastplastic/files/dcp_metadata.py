"""`.metadata` of torch.distributed.checkpoint, read without executing code from it."""

import math
import pathlib
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from fastplastic.errors import FileError
from fastplastic.files.shard_index import part_file

# All that the library itself writes into this file.
_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata",
        "TensorProperties", "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict"},
}  # fmt: skip
_PATHS = {"PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"}


class _Unpickler(pickle.Unpickler):
    """Makes nothing but what such a file consists of."""

    def find_class(self, module: str, name: str) -> Any:
        """Return a class by its name; FileError for one that is not known."""
        if name in _CLASSES.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        # Where the checkpoint was once saved, perhaps on another system.
        if module in ("pathlib", "pathlib._local") and name in _PATHS:
            return getattr(pathlib, f"Pure{name.removeprefix('Pure')}")
        raise FileError(
            f"contains code ({module}.{name}), more than a list of tensors, and could run it on "
            "loading: save it anew with torch.distributed.checkpoint"
        )


class SafeReader(FileSystemReader):
    """Torch's own reader of such folders, which does not run what is in them."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return what `.metadata` says; FileError where that is no list of tensors."""
        file = Path(self.path, ".metadata")
        try:
            with file.open("rb") as stream:
                found: Metadata = _Unpickler(stream).load()
            _check(file, found)
        except FileError as error:
            raise FileError(f"{file}: {error}") from error
        except OSError as error:
            raise FileError(f"{file}: cannot be read ({error.strerror}): check it") from error
        except Exception as error:  # bytes that are no pickle can raise anything
            raise FileError(f"{file}: corrupt ({_line(error)}): get it anew") from error
        return found


def _check(file: Path, found: Metadata) -> None:
    """Refuse what is no list of tensors, or one that cannot be true: FileError."""
    if not isinstance(found, Metadata):
        raise FileError(f"holds a {type(found).__name__}, expected Metadata: get it anew")
    sizes: dict[Path, int] = {}
    for index, info in found.storage_data.items():
        path = part_file(file, index.fqn, info.relative_path)
        size = sizes.setdefault(path, path.stat().st_size)
        if not (0 <= info.offset and 0 < info.length and info.offset + info.length <= size):
            raise FileError(
                f"has {index.fqn} at bytes {info.offset} to {info.offset + info.length} of "
                f"{path.name}, which has {size}: it was cut off, get it anew"
            )
    for name, entry in found.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            _check_chunks(found, name, entry)
        elif MetadataIndex(name) not in found.storage_data:
            raise FileError(f"has {name} nowhere, expected it in a file: get it anew")


def _check_chunks(found: Metadata, name: str, entry: TensorStorageMetadata) -> None:
    covered = 0
    for chunk in entry.chunks:
        ends = [offset + size for offset, size in zip(chunk.offsets, chunk.sizes, strict=True)]
        inside = len(ends) == len(entry.size) and all(
            0 <= low <= high <= whole
            for low, high, whole in zip(chunk.offsets, ends, entry.size, strict=True)
        )
        if not inside:
            raise FileError(
                f"has a part of {name} at {tuple(chunk.offsets)} of size {tuple(chunk.sizes)}, "
                f"expected one inside {tuple(entry.size)}: get it anew"
            )
        if MetadataIndex(name, chunk.offsets) not in found.storage_data:
            raise FileError(
                f"has the part of {name} at {tuple(chunk.offsets)} nowhere, expected it in a file: "
                "get it anew"
            )
        covered += math.prod(chunk.sizes)
    if covered != math.prod(entry.size):
        raise FileError(
            f"has {covered} elements of {name} in parts, expected {math.prod(entry.size)}: get it "
            "anew"
        )


def places(found: Metadata, name: str) -> Iterator[tuple[ChunkStorageMetadata, MetadataIndex]]:
    """Yield the parts of a tensor, and by what each is found in `storage_data`."""
    entry = found.state_dict_metadata[name]
    assert isinstance(entry, TensorStorageMetadata)
    for chunk in entry.chunks:
        yield chunk, MetadataIndex(name, chunk.offsets)


def _line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
