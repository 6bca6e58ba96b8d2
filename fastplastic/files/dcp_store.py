"""Weights in a folder of torch.distributed.checkpoint, whatever number of processes wrote it."""

import io
import pickle
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata
from typing_extensions import Buffer

from fastplastic.errors import FileError
from fastplastic.files.dcp_metadata import SafeReader, places
from fastplastic.files.shard_index import METADATA


class DistributedStore:
    """A checkpoint of torch.distributed.checkpoint (DCP).

    Each file is a row of what `torch.save` wrote: parts of tensors, and other values. In a copy the
    parts that change are written over the old ones; where that does not fit, as of another version
    of torch, at the end of the file.

    Args:
        metadata: The file `.metadata`.

    Attributes:
        folder: Where the files lie.
        says: What they are, in words.
        files: Names of the files that hold tensors.
        tensors: {name: tensor} on the meta device, of all files.
        beside: Names of what is no tensor.

    Raises:
        FileError: A file is missing, cut off or corrupt, or has more than tensors in it.
    """

    copies_all = True

    def __init__(self, metadata: Path) -> None:
        self.folder = metadata.parent
        self._reader = SafeReader(self.folder)
        self._metadata = self._reader.read_metadata()
        known = self._metadata.state_dict_metadata
        self.tensors = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
            for name, entry in known.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        self.beside = tuple(name for name in known if name not in self.tensors)
        self._places = dict(self._metadata.storage_data)
        self.files = tuple(sorted({info.relative_path for info in self._places.values()}))
        count = len(self.files)
        self.says = f"{count} file{'s' * (count != 1)} of torch.distributed.checkpoint"

    def entry_of(self, name: str) -> str:
        """Return the first of the keys by which a value is found in what was saved."""
        told = self._metadata.planner_data
        path = told.get(name) if isinstance(told, dict) else None
        return str(path[0] if path else name).partition(".")[0]

    def group_of(self, name: str) -> str:
        """Return what tensors that lie side by side have in common."""
        return str(next((self._places[at].relative_path for at, _, _ in self._parts(name)), ""))

    def load(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return some of the tensors, on the CPU; no process group is needed or used."""
        return {name: self._whole(name, self.folder) for name in names}

    def value(self, name: str) -> Any:
        """Return what is no tensor; FileError where it holds more than plain values."""
        return self._loaded(self.folder, name, MetadataIndex(name))

    @contextmanager
    def opened(self, name: str, folder: Path) -> Iterator[Tensor]:
        """Give a tensor of a copy of the files to change; it is written when the block ends."""
        parts, whole = self._parts(name), self._whole(name, folder)
        yield whole
        if len(parts) == 1:
            return self._write(folder, parts[0], whole)
        for part in parts:
            self._write(folder, part, self._part(part, folder).copy_(within(whole, part)))

    def finish(self, folder: Path) -> None:
        """Write where the parts are now, if that has changed."""
        if self._places != self._metadata.storage_data:
            changed = replace(self._metadata, storage_data=self._places)
            with (folder / METADATA).open("wb") as file:
                pickle.dump(changed, file)

    def _parts(self, name: str) -> "list[_Part]":
        return [(at, chunk.offsets, chunk.sizes) for chunk, at in places(self._metadata, name)]

    def _whole(self, name: str, folder: Path) -> Tensor:
        parts = self._parts(name)
        if len(parts) == 1:
            return self._part(parts[0], folder)
        whole = torch.empty_like(self.tensors[name], device="cpu")
        for part in parts:
            within(whole, part).copy_(self._part(part, folder))
        return whole

    def _part(self, part: "_Part", folder: Path) -> Tensor:
        """Return a part of a tensor as it is in a copy of the files."""
        index, _, sizes = part
        stored = self._loaded(folder, index.fqn, index)
        if not isinstance(stored, Tensor) or stored.shape != sizes:
            found = tuple(stored.shape) if isinstance(stored, Tensor) else type(stored).__name__
            raise FileError(
                f"{self.folder}: a part of {index.fqn} is {found}, expected {tuple(sizes)} as "
                f"{METADATA} says: get it anew"
            )
        return stored.detach()

    def _loaded(self, folder: Path, name: str, at: MetadataIndex) -> Any:
        info = self._places[at]
        if getattr(info, "transform_descriptors", None):
            raise FileError(
                f"{self.folder}: {name} is stored by an extension "
                f"({', '.join(info.transform_descriptors)}), expected plain tensors: save it anew "
                "without"
            )
        try:
            with (folder / info.relative_path).open("rb") as file:
                view = self._reader._slice_file(file, info)
                return torch.load(view, map_location="cpu", weights_only=True)
        except Exception as error:  # bytes that are no pickle can raise anything
            reason = " ".join(str(error).split())[:120]
            raise FileError(
                f"{folder / info.relative_path}: {name} cannot be read ({reason}): get it anew"
            ) from error

    def _write(self, folder: Path, part: "_Part", tensor: Tensor) -> None:
        at, counter = part[0], _Counter()
        info = self._places[at]
        torch.save(tensor, cast(IO[bytes], counter))
        with (folder / info.relative_path).open("r+b") as file:
            fits = counter.length == info.length
            start = file.seek(info.offset) if fits else file.seek(0, io.SEEK_END)
            torch.save(tensor, file)
        self._places[at] = replace(info, offset=start, length=counter.length)


# By what a part is found, where it begins, and its size.
_Part = tuple[MetadataIndex, torch.Size, torch.Size]


def within(whole: Tensor, part: _Part) -> Tensor:
    """Return the view of a tensor that a part of it has the values of."""
    _, offsets, sizes = part
    return whole[tuple(slice(x, x + n) for x, n in zip(offsets, sizes, strict=True))]


class _Counter(io.RawIOBase):
    """Counts what is written, and keeps nothing."""

    length = 0

    def writable(self) -> bool:
        """Return that it can be written."""
        return True

    def write(self, content: Buffer, /) -> int:
        """Count some bytes."""
        length = memoryview(content).nbytes
        self.length += length
        return length
