"""Names of weights as training scripts write them, and as the model has them."""

import os
from collections.abc import Mapping

from torch import Tensor

from fastplastic.errors import FileError

# Where timm, and most training scripts after it, put the weights inside a checkpoint; the averaged
# weights come first, as in timm.
AVERAGED = ("state_dict_ema", "model_ema")
WRAPPERS = (*AVERAGED, "state_dict", "model_state_dict", "model")
# The counter that torch's AveragedModel keeps beside the weights.
_COUNTER = "n_averaged"


def without_wrappers(
    state: Mapping[str, Tensor], path: str | os.PathLike[str]
) -> tuple[dict[str, Tensor], str]:
    """Return the weights without what data-parallel and compiled models put before names.

    Returns:
        The weights, and what was removed of the first name that was changed; "" for nothing.

    Raises:
        FileError: Two names would become one.
    """
    from timm.models import clean_state_dict

    found = dict(clean_state_dict(dict(state)))
    if len(found) < len(state):
        raise FileError(
            f"{path}: holds the same weights with and without a prefix such as 'module.': save the "
            "ones that you want by themselves"
        )
    pairs = zip(state, found, strict=False)
    return found, next((old.removesuffix(new) for old, new in pairs if old != new), "")


def fitted(
    state: Mapping[str, Tensor], own: Mapping[str, Tensor], path: str | os.PathLike[str]
) -> tuple[dict[str, Tensor], str]:
    """Return the weights under the names of a model, and what was done for it; "" for nothing.

    A prefix before all names of the model is removed, as that of Lightning's modules ("model."),
    and tensors without it are left out. Nothing is done where names fit as they are.

    Raises:
        FileError: There are several such prefixes.
    """
    found = dict(state)
    done = []
    if _COUNTER in found and _COUNTER not in own:
        del found[_COUNTER]
        done.append("averaged weights")
    if not own or any(name in found for name in own):
        return found, ", ".join(done)
    first = next(iter(own))
    prefixes = [name.removesuffix(first) for name in found if name.endswith(f".{first}")]
    prefixes = [p for p in prefixes if sum(p + name in found for name in own) > len(own) // 2]
    if len(prefixes) > 1:
        raise FileError(
            f"{path}: holds the weights several times, under {', '.join(map(repr, prefixes))}: "
            "save the one that you want by itself"
        )
    for prefix in prefixes:
        kept = {n.removeprefix(prefix): v for n, v in found.items() if n.startswith(prefix)}
        done.append(f"prefix {prefix!r} removed")
        if others := len(found) - len(kept):
            done.append(f"{others} tensor{'s' * (others > 1)} without it left out")
        found = kept
    return found, ", ".join(done)
