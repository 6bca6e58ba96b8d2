"""Checkpoints in many files: find out what they are, and which of their tensors a model's are."""

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from fastplastic.errors import FileError
from fastplastic.files.names import AVERAGED, WRAPPERS
from fastplastic.files.shard_index import METADATA, PICKLES, sharded

# Any one of a model's first names may be missing from the files.
_TRIED = 8


class WeightStore(Protocol):
    """Tensors in many files, of which one at a time is read or changed."""

    folder: Path
    says: str
    files: tuple[str, ...]
    tensors: dict[str, Tensor]
    beside: tuple[str, ...]
    # Whether whatever else is in the folder belongs to it.
    copies_all: bool

    def group_of(self, name: str) -> str:
        """Return what tensors that lie side by side have in common."""

    def entry_of(self, name: str) -> str:
        """Return under which name a user knows what is beside the weights."""

    def value(self, name: str) -> Any:
        """Return one of what is `beside`."""

    def load(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return some of the tensors, on the CPU."""

    def opened(self, name: str, folder: Path) -> AbstractContextManager[Tensor]:
        """Give a tensor of a copy of the files to change in place."""

    def finish(self, folder: Path) -> None:
        """Do what is left to do in the copy when all is written."""


def open_store(path: str | os.PathLike[str]) -> WeightStore:
    """Return the tensors of a checkpoint in many files; none of them is read yet.

    Raises:
        FileError: It is none, a file is missing or damaged, or its files are pickles.
    """
    found = sharded(path)
    if found is None:
        what = "is one file" if Path(path).exists() else "no such folder"
        raise FileError(
            f"{path}: {what}, expected a folder of torch.distributed.checkpoint, or of sharded "
            "safetensors with their index: check the path"
        )
    if found.name.endswith(PICKLES):
        raise FileError(
            f"{found}: lists PyTorch files, which cannot be written piece by piece; expected "
            "safetensors or torch.distributed.checkpoint: load the model and write one file"
        )
    # Only here: the one loads much of torch.distributed.
    if found.name == METADATA:
        from fastplastic.files.dcp_store import DistributedStore

        return DistributedStore(found)
    from fastplastic.files.safetensors_store import SafetensorsStore

    return SafetensorsStore(found)


@dataclass(frozen=True, eq=False)
class StoredWeights:
    """Which tensors of a checkpoint are those of a model.

    Attributes:
        names: {name in the model: name in the files}.
        copies: The same for other weights of the same model, such as those not averaged.
        others: Names of tensors beside those of the model, where there should be none.
        said: What was chosen or removed of names, or "".
    """

    names: Mapping[str, str]
    copies: tuple[Mapping[str, str], ...] = ()
    others: tuple[str, ...] = ()
    said: str = ""

    @property
    def used(self) -> frozenset[str]:
        """Names in the files of all these weights."""
        return frozenset(name for names in (self.names, *self.copies) for name in names.values())


def find_weights(store: WeightStore, model: nn.Module) -> StoredWeights:
    """Find the weights of a model among the tensors of a checkpoint.

    They stand under their names, or behind a prefix that all have, as of the dictionary that was
    saved ("model."), of wrappers ("module.") or both. Whether all are there is not looked at.

    Raises:
        FileError: They stand there several times, and it is not known which to take.
    """
    own = list(model.state_dict(keep_vars=True))
    prefixes = sorted(sorted(_prefixes(store.tensors, own)), key=_rank)
    if not prefixes:
        bare = _without_base(store.tensors, own, model)
        others = set(store.tensors) - set(bare.values())
        return StoredWeights(bare, (), tuple(sorted(others)))
    first = prefixes[0]
    if len({_rank(prefix) for prefix in prefixes}) < len(prefixes) or (
        len(prefixes) > 1 and _rank(prefixes[-1]) > len(WRAPPERS)
    ):
        raise FileError(
            f"{store.folder}: holds the weights several times, under "
            f"{', '.join(map(repr, prefixes))}: save the one that you want by itself"
        )
    names, *copies = (_behind(prefix, store.tensors, own) for prefix in prefixes)
    said = f"prefix {first!r} removed" if first else ""
    if first.partition(".")[0] in AVERAGED:
        said = f"averaged weights, {first!r} removed"
    # Beside bare names there may be anything.
    anything = store.copies_all and not first
    used = set(names.values())
    behind = [name for name in store.tensors if name.startswith(first) and name not in used]
    return StoredWeights(names, tuple(copies), () if anything else tuple(behind), said)


def _prefixes(stored: Mapping[str, Tensor], own: Sequence[str]) -> set[str]:
    """Return what stands before the names of most tensors of a model."""
    found: set[str] = set()
    for name in own[:_TRIED]:
        found |= {x.removesuffix(name) for x in stored if x == name or x.endswith(f".{name}")}
    return {p for p in found if sum(p + name in stored for name in own) > len(own) // 2}


def _rank(prefix: str) -> int:
    """Return which weights to take first, as timm does."""
    outer = prefix.partition(".")[0]
    return (*WRAPPERS, "").index(outer) if outer in (*WRAPPERS, "") else len(WRAPPERS) + 1


def _behind(prefix: str, stored: Mapping[str, Tensor], own: Sequence[str]) -> dict[str, str]:
    return {name: prefix + name for name in own if prefix + name in stored}


def _without_base(
    stored: Mapping[str, Tensor], own: Sequence[str], model: nn.Module
) -> dict[str, str]:
    """Return the names of a base model, which Hugging Face's files may have without its prefix."""
    base = f"{getattr(model, 'base_model_prefix', '')}."
    bare = {name: name.removeprefix(base) for name in own}
    return {name: short for name, short in bare.items() if short in stored}
