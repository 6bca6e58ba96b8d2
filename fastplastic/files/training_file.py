"""PyTorch files written anew: with other weights, and with all else that was in them."""

import copy
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastplastic.errors import FileError
from fastplastic.files.atomic import atomic_write
from fastplastic.files.checkpoint import check_fit
from fastplastic.files.names import fitted, without_wrappers
from fastplastic.files.pickled import keys_of_weights, load_pickled
from fastplastic.files.stored_optimizer import StoredOptimizer


class TrainingFile:
    """A checkpoint with all that a training script keeps in it.

    Args:
        path: A PyTorch file whose weights were loaded into the model.
        model: The model, which has the names and shapes of the weights.

    Attributes:
        left_out: {entry: why} of what will not be written again.

    Raises:
        FileError: The file cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str], model: nn.Module) -> None:
        self.path, self._model = Path(path), model
        self._content: Any = load_pickled(self.path)
        self.left_out: dict[str, str] = {}
        self._keys = keys_of_weights(self._content)
        self._copies: dict[str, nn.Module] = {}
        for key in self._keys[1:]:
            self._add_copy(key)
        self._stored: dict[str, StoredOptimizer] = {}
        for key, saved in _optimizers(self._content if self._keys else {}):
            self._add_optimizer(key, saved)

    @property
    def copies(self) -> list[nn.Module]:
        """Models with the other weights of the file, such as those that were not averaged."""
        return list(self._copies.values())

    @property
    def optimizer(self) -> Optimizer | None:
        """An optimizer of the model's parameters that remembers what the file says, if it does."""
        return next((stored.optimizer for stored in self._stored.values()), None)

    def save(
        self,
        path: str | os.PathLike[str],
        force: bool = False,
        replacing: Callable[[], object] = lambda: None,
    ) -> None:
        """Write everything, with the weights and the state as they are in models and optimizer.

        Args:
            path: The file to write.
            force: Replace an existing file.
            replacing: Called when the new file is complete, before it takes the old one's place.

        Raises:
            FileError: The file exists and `force` is not set, or cannot be written.
        """
        models: dict[str | None, nn.Module] = {next(iter(self._keys), None): self._model}
        for key, model in (models | self._copies).items():
            self._write(key, model)
        for stored in self._stored.values():
            stored.write()
        content = self._content
        if self.left_out:
            content = {key: x for key, x in content.items() if key not in self.left_out}
        save_torch(path, content, force, replacing)

    def said(self) -> dict[str, str]:
        """Return {entry: what became of it} for all entries beside the weights that were taken."""
        entries = [str(key) for key in self._content if key != self._keys[0]] if self._keys else []
        known = dict.fromkeys(self._copies, "re-initialised alike")
        known |= dict.fromkeys(self._stored, "begins anew for what was re-initialised")
        known |= {key: f"left out, {why}" for key, why in self.left_out.items()}
        return {key: known.get(key, "kept") for key in entries}

    def _add_copy(self, key: str) -> None:
        """Make a model of other weights, which are re-initialised too."""
        if not any(isinstance(value, Tensor) for value in self._content[key].values()):
            return  # settings of a model, say
        model = copy.deepcopy(self._model)
        try:
            state = self._tensors(key)
            check_fit(model, model.state_dict(), state, self.path)
        except FileError:
            self.left_out[key] = "does not fit the model"
            return
        model.load_state_dict(state, strict=False)
        self._copies[key] = model

    def _add_optimizer(self, key: str, saved: Any) -> None:
        """Give the model an optimizer with this state, where it is known what belongs to what."""
        stored = None if self._stored else StoredOptimizer.of(saved, self._model)
        if stored is None:
            self.left_out[key] = "as it is not known which state belongs to which weight"
        else:
            self._stored[key] = stored

    def _tensors(self, key: str | None) -> dict[str, Tensor]:
        """Return the tensors of the file themselves, under the names that the model has."""
        state = self._content if key is None else self._content[key]
        if not all(isinstance(value, Tensor) for value in state.values()):
            raise FileError(f"{self.path}: {key} has other values than tensors")
        state, _ = without_wrappers(state, self.path)
        return fitted(state, self._model.state_dict(), self.path)[0]

    def _write(self, key: str | None, model: nn.Module) -> None:
        values = model.state_dict()
        with torch.no_grad():
            for name, tensor in self._tensors(key).items():
                tensor.copy_(values[name])  # in the dtype that it has in the file


def save_torch(
    path: str | os.PathLike[str],
    content: Any,
    force: bool = False,
    replacing: Callable[[], object] = lambda: None,
) -> None:
    """Write a PyTorch file; the arguments are those of `TrainingFile.save`."""
    with atomic_write(path, force) as temporary:
        try:
            with temporary.open("wb") as file:
                torch.save(content, file)
        except RuntimeError as error:
            # What torch's own writer makes of a full disk; it leaves out why.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
        replacing()


def _optimizers(content: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the entries that hold the state of an optimizer, or several of them (Lightning)."""
    for key, value in content.items():
        several = value if isinstance(value, list) else [value]
        if several and all(_is_optimizer(entry) for entry in several):
            yield key, several[0] if len(several) == 1 else None


def _is_optimizer(value: Any) -> bool:
    return isinstance(value, Mapping) and {"state", "param_groups"} <= value.keys()
