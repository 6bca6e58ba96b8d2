"""Weights in several safetensors files and an index."""

import mmap
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastplastic.errors import FileError
from fastplastic.files.fields import load_json
from fastplastic.files.shard_index import read_index

# Those of the format that torch has, by their names in headers.
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U64": torch.uint64,
    "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
    "C64": torch.complex64,
}  # fmt: skip


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies: in which file, from which byte on."""

    file: str
    start: int


class SafetensorsStore:
    """A checkpoint of several safetensors files.

    Args:
        index: The file that lists them.

    Attributes:
        folder: Where they lie.
        says: What they are, in words.
        files: Names of the files that hold tensors.
        tensors: {name: tensor} on the meta device, of all files.
        beside: Nothing; other checkpoints have other values beside tensors.

    Raises:
        FileError: A file is missing, corrupt, or does not hold what the index says.
    """

    copies_all = False
    beside: tuple[str, ...] = ()

    def __init__(self, index: Path) -> None:
        self.folder = index.parent
        listed = read_index(index)
        paths = sorted(set(listed.values()))
        self.files = tuple(str(path.relative_to(self.folder)) for path in paths)
        self.says = f"{len(paths)} file{'s' * (len(paths) != 1)} of safetensors"
        self.tensors: dict[str, Tensor] = {}
        self._places: dict[str, _Place] = {}
        for path, file in zip(paths, self.files, strict=True):
            self._add(path, file)
        for name, path in listed.items():
            place = self._places.get(name)
            if place is None or self.folder / place.file != path:
                raise FileError(
                    f"{index}: has {name} in {path.name}, which does not hold it: get them anew"
                )

    def group_of(self, name: str) -> str:
        """Return what tensors that lie side by side have in common."""
        return self._places[name].file

    def entry_of(self, name: str) -> str:
        """Return the name itself."""
        return name

    def value(self, name: str) -> Any:
        """Refuse to look: there are only tensors."""
        raise KeyError(name)

    def load(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return some of the tensors, on the CPU."""
        found: dict[str, Tensor] = {}
        for name in sorted(names, key=self.group_of):
            with safe_open(self.folder / self._places[name].file, "pt") as file:
                found[name] = file.get_tensor(name)
        return found

    @contextmanager
    def opened(self, name: str, folder: Path) -> Iterator[Tensor]:
        """Give a tensor of a copy of the files to change in place; that is mapped, not read."""
        meta, place = self.tensors[name], self._places[name]
        stop = place.start + meta.nbytes
        if not meta.numel():
            yield torch.empty(meta.shape, dtype=meta.dtype)
            return
        with (folder / place.file).open("r+b") as file:
            memory = mmap.mmap(file.fileno(), 0)
        if place.start % meta.itemsize:
            # Nobody promises that tensors can be read where their bytes do not line up.
            raw = bytearray(memory[place.start : stop])
            yield torch.frombuffer(raw, dtype=meta.dtype).view(meta.shape)
            memory[place.start : stop] = raw
        else:
            yield torch.frombuffer(
                memory, dtype=meta.dtype, count=meta.numel(), offset=place.start
            ).view(meta.shape)
        memory.flush()

    def finish(self, folder: Path) -> None:
        """Do what is left to do when all is written: nothing, the index is as it was."""

    def _add(self, path: Path, file: str) -> None:
        """Note the tensors of a file."""
        if sys.byteorder != "little":
            raise FileError(f"{path}: is little-endian, expected that of this machine: load it")
        start, header = _header(path)
        for name, entry in header.items():
            if name in self._places:
                raise FileError(
                    f"{path}: holds {name}, as {self._places[name].file} does, expected it in one "
                    "file: get them anew"
                )
            dtype = _DTYPES.get(entry["dtype"])
            if dtype is None:
                raise FileError(
                    f"{path}: {name} has dtype {entry['dtype']}, expected one of "
                    f"{', '.join(_DTYPES)}: load it with a newer version"
                )
            self.tensors[name] = torch.empty(entry["shape"], dtype=dtype, device="meta")
            self._places[name] = _Place(file, start + entry["data_offsets"][0])


def _header(path: Path) -> tuple[int, dict[str, Any]]:
    """Return where the data of a file begin, and its header, which is right."""
    try:
        # The library compares all that a header says with the file.
        with safe_open(path, "numpy"), path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header: dict[str, Any] = load_json(file.read(length))
    except (OSError, SafetensorError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise FileError(f"{path}: corrupt safetensors ({reason}): get it anew") from error
    header.pop("__metadata__", None)
    return 8 + length, header
