"""Read and write weight files: the only code of the package that does.

Files are read without ever executing code from them: safetensors, or `torch.load` with
`weights_only=True`.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastplastic.errors import FileError, InputError
from fastplastic.files.atomic import atomic_write
from fastplastic.files.formats import check_names, is_safetensors
from fastplastic.files.many_files import read_many
from fastplastic.files.names import AVERAGED, fitted, without_wrappers
from fastplastic.files.pickled import EXPECTED, first_of, load_pickled, unwrap
from fastplastic.files.shard_index import sharded
from fastplastic.model import fingerprint, output_layers

# What the metadata say of weights whose head was never trained.
UNFITTED = {"head": "not fitted"}


def load_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read the weights of a checkpoint to the CPU, without executing code from it.

    Takes safetensors and PyTorch files, folders of many such files with their index, and those of
    torch.distributed.checkpoint, of which all tensors are read.

    Weights inside a training checkpoint are found under timm's
    keys ("state_dict_ema", "model_ema", "state_dict", "model") and "model_state_dict", and the
    prefixes that data-parallel and compiled models put before names ("module.", "_orig_mod.") are
    removed, as in timm.

    Raises:
        FileError: The file is missing, corrupt, holds no weights, or more than plain tensors.
    """
    return _read(Path(path))[0]


def _read(
    path: Path, model: nn.Module | None = None
) -> tuple[dict[str, Tensor], list[str], tuple[str, ...]]:
    """Return the weights in a file, what was chosen or changed of them, and what is beside them.

    With a model those that it does not have may be without values.
    """
    listed = sharded(path)
    if listed is not None:
        return read_many(listed, model)
    if not path.is_file():
        raise FileError(f"{path}: no such file; {EXPECTED}: check the path")
    try:
        checkpoint = _load_safetensors(path) if is_safetensors(path) else load_pickled(path)
    except OSError as error:
        raise FileError(f"{path}: cannot be read ({error.strerror or error}): check it") from error
    except SafetensorError as error:
        raise FileError(f"{path}: corrupt safetensors ({_line(error)}): get it anew") from error
    state, key = unwrap(checkpoint, path)
    state, removed = without_wrappers(state, path)
    said = [f"averaged weights, {key}"] if key in AVERAGED else []
    said += [f"prefix {removed!r} removed"] if removed else []
    return state, said, tuple(str(name) for name in checkpoint if key and name != key)


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    state = load_file(path)
    check_names(path)
    return state


@dataclass(frozen=True)
class Loaded:
    """What `load_into` found.

    Attributes:
        dtypes: {name: dtype} of the tensors in the file; those of the model keep their own.
        kept: Names of the head's tensors that the model keeps, as those of the file do not fit.
        classes: Number of classes of the file's head, where it does not fit; None without one.
        unfitted: Whether the file says of its head that it was never fitted.
        remark: Which weights of the file these are, where that is not plain; or "".
        beside: What a training checkpoint holds beside these weights.
    """

    dtypes: Mapping[str, torch.dtype]
    kept: tuple[str, ...] = ()
    classes: int | None = None
    unfitted: bool = False
    remark: str = ""
    beside: tuple[str, ...] = ()


def load_into(model: nn.Module, path: str | os.PathLike[str], *, own_head: bool = False) -> Loaded:
    """Load a checkpoint file into the model: every tensor, or none when one does not fit.

    A name that is missing from the file is filled where it is tied to one that is there. The
    counters of BatchNorm ("num_batches_tracked"), which old files lack, may be missing. A prefix
    before all names, such as Lightning's "model.", is removed.

    Args:
        model: The model.
        path: The file.
        own_head: Where the layers that make the outputs do not fit, or are missing from the file,
            let the model keep its own.

    Raises:
        FileError: As in `load_state_dict`, or tensors are missing, unexpected or of another shape;
            the first of each kind are named. The model is then as before.
    """
    state, said, beside = _read(Path(path), model)
    own = model.state_dict()
    state, done = fitted(state, own, path)
    remark = "; ".join([*said, *([done] if done else [])])
    dtypes = {name: tensor.dtype for name, tensor in state.items()}
    kept: tuple[str, ...] = ()
    classes = None
    if own_head:
        kept, classes = _unfit_head(model, own, state)
        state = {name: value for name, value in state.items() if name not in kept}
        state |= {name: own[name] for name in kept if name in own}
    check_fit(model, own, state, path)
    # Names were compared above: what strict loading would still refuse is tied or a counter.
    model.load_state_dict(state, strict=False)
    kept = tuple(name for name in kept if name in own)
    unfitted = UNFITTED.items() <= read_metadata(path).items()
    return Loaded(dtypes, kept, classes, unfitted, remark, beside)


def check_fit(
    model: nn.Module,
    own: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    path: str | os.PathLike[str],
) -> None:
    """Raise FileError where tensors are missing, unexpected or of another shape."""
    missing = _missing(own, state)
    unexpected = [name for name in state if name not in own]
    mismatched = [
        f"{name} {_shape(state[name])} instead of {_shape(own[name])}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    found = {"missing": missing, "unexpected": unexpected, "of another shape": mismatched}
    problems = [
        f"{len(names)} {kind} ({first_of(names)})" for kind, names in found.items() if names
    ]
    if problems:
        raise FileError(
            f"{path} does not fit the model: of {len(own)} tensors expected, "
            f"{', '.join(problems)}: {_way_out(model, mismatched, missing + unexpected)}"
        )


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """Return the metadata of a weight file; none for what is not one file of safetensors.

    Raises:
        FileError: The file is missing or corrupt.
    """
    path = Path(path)
    if sharded(path) is not None:
        return {}
    try:
        if not is_safetensors(path):
            return {}
        with safe_open(path, "pt") as file:
            return dict(file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise FileError(f"{path}: cannot be read ({_line(error)}): get it anew") from error


def _unfit_head(
    model: nn.Module, own: Mapping[str, Tensor], state: Mapping[str, Tensor]
) -> tuple[tuple[str, ...], int | None]:
    """Return the names of a head that does not fit, in the model or the file, and its classes."""
    layers = output_layers(model)
    modules = model.named_modules(remove_duplicate=False)
    heads = tuple(f"{name}." for name, module in modules if any(module is x for x in layers))
    names = {name for name in (*own, *state) if heads and name.startswith(heads)}

    def fits(name: str) -> bool:
        return name in own and name in state and own[name].shape == state[name].shape

    if all(fits(name) for name in names):
        return (), None
    sizes = {state[name].shape[0] for name in names if name in state and state[name].ndim}
    return tuple(sorted(names)), max(sizes, default=None)


def save_state_dict(
    path: str | os.PathLike[str],
    model: nn.Module,
    force: bool = False,
    metadata: Mapping[str, str] | None = None,
    dtypes: Mapping[str, torch.dtype] | None = None,
    replacing: Callable[[], object] = lambda: None,
) -> None:
    """Write the model's weights and buffers as safetensors, under every name of its state dict.

    Tensors that share memory (tied weights) are written once for each name, so that the file loads
    with `strict=True`. The metadata hold "format": "pt", the fingerprint, and what is passed.

    Args:
        path: The file to write.
        model: The model, on any device.
        force: Replace an existing file.
        metadata: More text to store with the weights.
        dtypes: {name: dtype} to write tensors in, such as those of the file that was loaded; others
            are written as they are.
        replacing: Called when the new file is complete, before it takes the place of an old one.

    Raises:
        FileError: The file exists and `force` is not set, or cannot be written.
        InputError: The model's state holds something that is not a tensor.
    """
    tensors = _separate(model.state_dict(), dtypes or {})
    header = {"format": "pt", "fingerprint": fingerprint(model), **(metadata or {})}
    save_tensors(path, tensors, force, header, replacing)


def save_tensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    force: bool,
    header: dict[str, str],
    replacing: Callable[[], object] = lambda: None,
) -> None:
    """Write tensors, each with memory of its own, as safetensors, like `save_state_dict`."""
    with atomic_write(path, force) as temporary:
        try:
            save_file(dict(tensors), temporary, header)
        except SafetensorError as error:
            raise FileError(f"{path}: cannot be written ({_line(error)}): free space?") from error
        replacing()


def _way_out(model: nn.Module, mismatched: list[str], others: list[str]) -> str:
    """Say how the file could fit: only the head differs, or it belongs to another model."""
    head = getattr(model, "pretrained_cfg", {}).get("classifier")
    heads = tuple(f"{name}." for name in ([head] if isinstance(head, str) else head or ()))
    if heads and not others and all(name.startswith(heads) for name in mismatched):
        classes = mismatched[0].partition("[")[2].partition("]")[0].partition(", ")[0]
        return (
            f"only the classifier differs: pass --num-classes {classes} for that of the file, or "
            "the number of your own classes for a fresh one"
        )
    return "pass the checkpoint of this very model"


def _missing(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[str]:
    """Return the names that the model needs and the file lacks."""
    present = {_storage(own[name]) for name in own.keys() & state.keys()}
    return [
        name
        for name, tensor in own.items()
        if name not in state
        and _storage(tensor) not in present
        and not name.endswith("num_batches_tracked")
    ]


def _separate(state: Mapping[str, Any], dtypes: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
    """Return the tensors on the CPU, each with memory of its own; InputError for anything else."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in state.items():
        if not isinstance(value, Tensor):
            kind = type(value).__name__
            raise InputError(f"{name}: {kind} cannot be saved, expected a tensor: remove it first")
        tensor = value.detach().cpu().to(dtypes.get(name, value.dtype)).contiguous()
        if tensor.untyped_storage().data_ptr() in seen:  # safetensors refuses shared memory
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        tensors[name] = tensor
    return tensors


def _storage(tensor: Tensor) -> tuple[int, int, torch.Size]:
    """Return a key that tied tensors share; empty and meta tensors have no address of their own."""
    pointer = tensor.untyped_storage().data_ptr() or id(tensor)
    return pointer, int(tensor.storage_offset()), tensor.shape


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
