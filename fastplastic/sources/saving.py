"""Write a model as it can be read again: a weight file, or a folder like that of the model."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from fastplastic.errors import FileError
from fastplastic.files import (
    UNFITTED,
    load_state_dict,
    save_folder,
    save_state_dict,
    save_tensors,
)
from fastplastic.sources import transformers as hf
from fastplastic.sources.folders import ModelFolder
from fastplastic.sources.loaded import LoadedModel


def save_model(
    path: Path,
    loaded: LoadedModel,
    *,
    force: bool,
    metadata: Mapping[str, str] | None = None,
    replacing: Callable[[], object] = lambda: None,
) -> None:
    """Write the weights of a model to a .safetensors file, or to a folder where it is of one.

    The file of a Hugging Face model has the names and dtypes of its folder's weights, so that it
    can take their place; a new folder also gets the other files of the model's.

    Args:
        path: The file or folder.
        loaded: The model.
        force: Replace what there is.
        metadata: More text to store with the weights; by default whether the head was fitted.
        replacing: Called when a new file is complete, before it takes the place of an old one.

    Raises:
        FileError: There is such a file and `force` is not set, it is the model's own folder, or it
            cannot be written.
    """
    if metadata is None:
        metadata = UNFITTED if loaded.head else {}
    if loaded.folder is None:
        save_state_dict(
            path, loaded.model, force, dtypes=loaded.dtypes, metadata=metadata, replacing=replacing
        )
        return
    tensors = _named_as_in(loaded.folder, loaded)
    if path.suffix == ".safetensors":
        save_tensors(path, tensors, force, {"format": "pt", **metadata}, replacing)
        return
    if path.resolve() == loaded.folder.path.resolve():
        raise FileError(f"-o {path}: is the folder of the model itself: name another")
    texts = {"config.json": hf.config_to_write(loaded.model)} if loaded.head else {}
    save_folder(path, loaded.folder.path, tensors, texts, force)


def _named_as_in(folder: ModelFolder, loaded: LoadedModel) -> dict[str, Tensor]:
    """Return the tensors under the names of the folder's files, in their dtypes.

    Where the model has the folder's own head, what the files hold besides is taken along.
    """
    own = hf.tensors_to_write(loaded.model)
    kept = _stored(folder) if folder.weights else {}
    prefix = f"{getattr(loaded.model, 'base_model_prefix', '')}."
    names = {name: _known_as(name, kept, prefix) for name in own}
    usual = next((x.dtype for x in kept.values() if x.is_floating_point()), torch.float32)

    def narrowed(name: str, tensor: Tensor) -> Tensor:
        known = loaded.dtypes.get(name) or (
            kept[names[name]].dtype if names[name] in kept else None
        )
        return tensor.to(known or (usual if tensor.is_floating_point() else tensor.dtype))

    if loaded.head:
        return {name: narrowed(name, tensor) for name, tensor in own.items()}
    left = {name: tensor for name, tensor in kept.items() if name not in names.values()}
    return {names[name]: narrowed(name, tensor) for name, tensor in own.items()} | left


def _known_as(name: str, kept: Mapping[str, Tensor], prefix: str) -> str:
    """Return the name under which the files have a tensor: with or without that of the base."""
    variants = (name, prefix + name, name.removeprefix(prefix))
    return next((variant for variant in variants if variant in kept), name)


def _stored(folder: ModelFolder) -> dict[str, Tensor]:
    """Return the tensors of all files of a folder's weights."""
    assert folder.weights is not None
    found: dict[str, Tensor] = {}
    for file in folder.weight_files:
        found |= load_state_dict(file)
    return found
