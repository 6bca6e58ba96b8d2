"""Read PyTorch files without executing code from them, and find the weights in what they hold."""

import argparse
import pickletools
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastplastic.errors import FileError
from fastplastic.files.names import WRAPPERS

# Operations of a pickle that call something.
_CALLS = {"GLOBAL", "STACK_GLOBAL", "REDUCE", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX"}
EXPECTED = "expected a state dict in safetensors or PyTorch format"
_SHOWN, _LONGEST = 3, 120


def load_pickled(path: Path) -> Any:
    """Return what a PyTorch file holds; FileError where it is corrupt or has code in it."""
    try:
        # timm's training script stores its arguments beside the weights; a Namespace runs no code.
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # bytes that are no pickle can make the unpickler raise anything
        if code := _code_in(path, str(error)):
            raise FileError(
                f"{path}: contains code ({code}), more than tensors and plain values, and could "
                "run it on loading: save only the model's state_dict(), best as safetensors"
            ) from error
        raise FileError(f"{path}: corrupt or not a checkpoint; {EXPECTED}: get it anew") from error


def _code_in(path: Path, error: str) -> str:
    """Return what a file that was refused would call on loading; "" where nothing is known."""
    if match := re.search(r"GLOBAL (\S+)", error):
        return match[1]
    if "TorchScript" in error:
        return "TorchScript"
    try:
        with path.open("rb") as file:
            # Reads the operations, and runs none. Newer ones the loader stops at.
            found = {operation.name for operation, _, _ in pickletools.genops(file)}
    except Exception:  # as above
        return ""
    return "a pickle that calls functions" if found & _CALLS else ""


def keys_of_weights(checkpoint: Mapping[Any, Any]) -> list[str]:
    """Return under which keys a training checkpoint may have weights, the ones to take first."""
    return [key for key in WRAPPERS if isinstance(checkpoint.get(key), Mapping)]


def unwrap(checkpoint: Any, path: Path) -> tuple[dict[str, Tensor], str]:
    """Return the weights in what a file holds, and their key in it; FileError without any."""
    if isinstance(checkpoint, Mapping):
        key = next(iter(keys_of_weights(checkpoint)), "")
        state = checkpoint[key] if key else checkpoint
        others = [str(name) for name, value in state.items() if not isinstance(value, Tensor)]
        if others:
            raise FileError(
                f"{path}: not weights: {first_of(others)}; {EXPECTED}, "
                "bare or under the key 'state_dict' or 'model': save it that way"
            )
        if state:
            return {str(name): value for name, value in state.items()}, key
    raise FileError(f"{path}: holds no weights; {EXPECTED}: save the model's state_dict()")


def first_of(names: list[str]) -> str:
    """Return the first of some names, cut where they are long."""
    shown = (name if len(name) <= _LONGEST else f"{name[:_LONGEST]}..." for name in names[:_SHOWN])
    return ", ".join(shown) + (", ..." if len(names) > _SHOWN else "")
