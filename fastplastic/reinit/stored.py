"""Write to tensors that are in files, one after the other."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from fastplastic.errors import FileError
from fastplastic.files import StoredWeights, WeightStore
from fastplastic.kernels import DTYPES
from fastplastic.reinit.optimizer_state import StateTensor
from fastplastic.reinit.places import Where
from fastplastic.reinit.regions import Tensors
from fastplastic.reinit.transaction import Place, StateWrites, Undo, Writes, apply, place_of


class StoredTensors(Tensors):
    """The parameters and buffers of a model, whose values are in files.

    Args:
        outline: The model, without values.
        store: The files.
        stored: Which of their tensors are the model's.
    """

    def __init__(self, outline: nn.Module, store: WeightStore, stored: StoredWeights) -> None:
        super().__init__(outline)
        self._store, self._names = store, stored.names
        self._held: dict[str, Tensor] = {}
        self._read = False

    def __getitem__(self, name: str) -> Tensor:
        """Return a tensor that may be written: a stand-in, or its values while they are held."""
        outlined = super().__getitem__(name)
        if name in self._held:
            return self._held[name]
        known = self._store.tensors.get(self._names.get(name, ""))
        if known is None or known.dtype not in DTYPES:
            found = "not in the files" if known is None else f"stored as {known.dtype}"
            raise FileError(
                f"{self._store.folder}: {name!r} is {found}, expected it as floating-point numbers "
                "under the name that the model has: load the model, and write one file instead"
            )
        if not self._read:
            return outlined
        loaded = self._store.load([self._names[name]])[self._names[name]].to(outlined.dtype)
        self._held = {name: loaded}
        return loaded

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Give values inside the block, of one tensor at a time."""
        self._read = True
        try:
            yield
        finally:
            self._read, self._held = False, {}

    @contextmanager
    def opened(self, name: str, folder: Path, places: Sequence[Where]) -> Iterator[Tensor]:
        """Hold a tensor inside the block; what is then written to places of it is in the files."""
        outlined = self[name]
        with self._store.opened(self._names[name], folder) as tensor:
            # Drawn in the precision of the model, as where it is loaded.
            held = tensor.to(outlined.dtype)
            self._held = {name: held}
            try:
                yield held
            finally:
                self._held = {}
            if held is not tensor:
                _write(tensor, held, places)


class _NothingToUndo(Undo):
    """Keeps nothing: a copy of the files is thrown away where anything fails."""

    def keep_place(self, tensor: Tensor, where: Where) -> Place:
        """Return the place."""
        return place_of(tensor, where)


def write_stored(
    tensors: StoredTensors,
    writes: Writes,
    store: WeightStore,
    stored: StoredWeights,
    memory: Mapping[str, Sequence[tuple[StateTensor, str]]],
    folder: Path,
    seed: int,
) -> None:
    """Write everything to a copy of the files: to one tensor, its copies and state, at a time.

    Args:
        tensors: The tensors of the model.
        writes: What is written to them.
        store: The files.
        stored: Which of their tensors are the model's.
        memory: {parameter: [(what an optimizer remembers of it, name of that in the files)]}.
        folder: The copy of the files.
        seed: Of fresh values.
    """
    by_name: dict[str, list[Where]] = {}
    for place in writes.places:
        by_name.setdefault(place.name, []).append(place)
    for name in sorted(by_name, key=lambda name: store.group_of(stored.names[name])):
        places = by_name[name]
        with tensors.opened(name, folder, places) as tensor:
            apply(tensors, _only(writes, name), StateWrites(), seed, _NothingToUndo())
            for copy in stored.copies:
                with store.opened(copy[name], folder) as other:
                    _write(other, tensor, places)
            for state, stored_name in memory.get(name, ()):
                with store.opened(stored_name, folder) as values:
                    held = replace(state, tensor=values)
                    states = StateWrites([(held, where) for where in places])
                    apply(tensors, Writes([]), states, seed, _NothingToUndo())


def _only(writes: Writes, name: str) -> Writes:
    return Writes(
        [draw for draw in writes.fresh if draw.where.name == name],
        [fill for fill in writes.fills if fill.region.name == name],
        [draw for draw in writes.columns if draw.where.name == name],
    )


def _write(tensor: Tensor, values: Tensor, places: Sequence[Where]) -> None:
    """Give a tensor the values of another one at some places."""
    with torch.no_grad():
        for where in places:
            place_of(tensor, where).write(place_of(values, where).read().to(tensor.dtype))
