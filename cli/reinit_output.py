"""The file that `fastplastic reinit` writes, and what becomes of all else in the old one."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from fastplastic.cli.options import ReinitOptions
from fastplastic.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

    from fastplastic.files import TrainingFile
    from fastplastic.sources import LoadedModel

# What the metadata of a file say of its weights that is not true of others.
_OF_OLD_WEIGHTS = ("validation", "seed")


class WeightFile:
    """Where re-initialised weights go.

    Args:
        options: The options.
        loaded: The model with the old weights.

    Attributes:
        training: What else goes into a PyTorch file; None for safetensors.

    Raises:
        InputError: A PyTorch file cannot hold these weights.
        FileError: The checkpoint cannot be read.
    """

    def __init__(self, options: ReinitOptions, loaded: "LoadedModel") -> None:
        self._options, self._loaded = options, loaded
        self.training: TrainingFile | None = None
        self._torch = _is_torch(options)
        if self._torch and loaded.head:
            raise InputError(
                f"{options.target}: the head is {loaded.head}; a PyTorch file cannot say so: "
                "pass -o with a name that ends in .safetensors"
            )
        if self._torch and options.checkpoint and not _is_safetensors(options.checkpoint):
            from fastplastic import files

            self.training = files.TrainingFile(options.checkpoint, loaded.model)

    @property
    def copies(self) -> "list[nn.Module]":
        """Models with other weights of the checkpoint, to be re-initialised alike."""
        return self.training.copies if self.training else []

    @property
    def optimizer(self) -> "Optimizer | None":
        """What the checkpoint remembers of an optimizer, if it can be told."""
        return self.training.optimizer if self.training else None

    def write(self) -> None:
        """Write the file, and keep the old one where it is the same."""
        from fastplastic.files import keep_backup, save_torch
        from fastplastic.sources import save_model

        target, force = self._options.target, self._options.force
        assert target is not None
        replacing = partial(keep_backup, target, force) if self._options.in_place else _nothing
        force = force or self._options.in_place
        if self.training:
            self.training.save(target, force, replacing)
        elif self._torch:
            save_torch(target, self._state(), force, replacing)
        else:
            save_model(
                target, self._loaded, force=force, metadata=self._metadata(), replacing=replacing
            )

    def facts(self) -> tuple[tuple[str, str], ...]:
        """Return the name of the file, and what became of all else in the checkpoint."""
        from fastplastic.files import backup_of

        target = self._options.target
        assert target is not None
        kept = f"; the old one is kept as {backup_of(target)}" * self._options.in_place
        file = ("file", f"{target}{kept}")
        if self.training:
            return (file, *_rest(self.training.said()))
        if not self._loaded.beside:
            return (file,)
        text = (
            f"left out: {', '.join(self._loaded.beside)}; a file of this kind holds weights only, "
            "-o FILE.pth keeps the rest"
        )
        return (file, ("rest", text))

    def _state(self) -> "dict[str, Tensor]":
        dtypes = self._loaded.dtypes
        state = self._loaded.model.state_dict()
        return {name: x.cpu().to(dtypes.get(name, x.dtype)) for name, x in state.items()}

    def _metadata(self) -> dict[str, str]:
        """Return what the old file says beside its weights, as far as it is still true."""
        from fastplastic.files import UNFITTED, read_metadata

        if self._loaded.head:
            return UNFITTED
        if self._options.checkpoint is None:
            return {}
        found = read_metadata(self._options.checkpoint)
        # The last two are written anew.
        dropped = (*_OF_OLD_WEIGHTS, "format", "fingerprint")
        return {key: text for key, text in found.items() if key not in dropped}


def _nothing() -> None:
    pass


def _is_torch(options: ReinitOptions) -> bool:
    target = options.target
    if options.folder_read:
        return False
    if options.in_place and target:
        return not _is_safetensors(target)
    return target is not None and target.suffix != ".safetensors" and not options.writes_folder


def _is_safetensors(path: Path) -> bool:
    from fastplastic.files import is_safetensors

    return is_safetensors(path)


def _rest(said: dict[str, str]) -> tuple[tuple[str, str], ...]:
    """Return what became of all entries, those together that the same became of."""
    by_text: dict[str, list[str]] = {}
    for key, text in said.items():
        by_text.setdefault(text, []).append(key)
    parts = [f"{', '.join(keys)}: {text}" for text, keys in by_text.items()]
    return (("rest", "; ".join(parts)),) if parts else ()
