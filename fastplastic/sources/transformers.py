"""All that is asked of transformers: models, tokenizers and their files, never with code of others.

The package is an extra: whoever comes here without it is told so.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from fastplastic.errors import FileError, InputError
from fastplastic.sources.folders import FolderTask, ModelFolder
from fastplastic.sources.hub import reason

# Nothing is asked of the hub, and no code of the folder is run.
_LOCAL: Mapping[str, Any] = {"local_files_only": True, "trust_remote_code": False}
_CLASSES: Mapping[FolderTask, str] = {
    "images": "AutoModelForImageClassification",
    "texts": "AutoModelForSequenceClassification",
    "causal": "AutoModelForCausalLM",
    "encoder": "AutoModel",
}


@dataclass(frozen=True, eq=False)
class FolderWeights:
    """A model with the weights of its folder.

    Attributes:
        model: The model.
        fresh: Names of parameters that the folder lacks, or has in another shape.
        left: Names of tensors in the folder that the model does not take.
    """

    model: nn.Module
    fresh: frozenset[str]
    left: frozenset[str]


def require_transformers(name: str) -> None:
    """Raise InputError unless transformers is installed."""
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise InputError(
            f'{name}: needs transformers ({reason(error)}): pip install "fastplastic[transformers]"'
        ) from error


def config_of(folder: ModelFolder) -> Any:
    """Return the configuration; FileError for one that transformers does not know."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder.path, **_LOCAL)
    except Exception as error:  # of many kinds, by what is wrong with the file
        kind = folder.config["model_type"]
        own = " (it brings code of its own, which is never run)" * ("auto_map" in folder.config)
        raise FileError(
            f"{folder.name}: config.json of model_type {kind!r}{own} is not known to the installed "
            f"transformers or not right ({reason(error)}): check it, or take a newer transformers"
        ) from error


def model_class(folder: ModelFolder, config: Any) -> Any:
    """Return the class that makes the model; InputError where transformers has none."""
    import transformers

    automatic = getattr(transformers, _CLASSES[folder.task])
    # Not `in`: the mapping loads what it is asked for.
    if type(config) not in automatic._model_mapping.keys():
        raise InputError(
            f"{folder.name}: transformers has no {_CLASSES[folder.task]} for model_type "
            f"{config.model_type!r}, expected one that it has: use the library: "
            "fastplastic.profile(model, batches)"
        )
    return automatic


def random_model(automatic: Any, config: Any) -> nn.Module:
    """Return the model with random weights, in float32."""
    model: nn.Module = automatic.from_config(config, trust_remote_code=False, dtype=torch.float32)
    return model


def trained_model(automatic: Any, folder: ModelFolder, config: Any) -> FolderWeights:
    """Return the model with the weights of its folder, in float32; FileError where they are bad."""
    try:
        model, told = automatic.from_pretrained(
            folder.path, config=config, dtype=torch.float32, output_loading_info=True,
            ignore_mismatched_sizes=True, weights_only=True, **_LOCAL,
        )  # fmt: skip
    except Exception as error:  # of many kinds, by what is wrong with the file
        raise FileError(
            f"{folder.name}: the weights cannot be read ({reason(error)}): get them anew"
        ) from error
    if told["error_msgs"]:
        raise FileError(
            f"{folder.name}: the weights do not fit ({told['error_msgs'][0]}): get them anew"
        )
    other = {key[0] if isinstance(key, tuple) else key for key in told["mismatched_keys"]}
    fresh = frozenset({*told["missing_keys"], *other})
    return FolderWeights(model, fresh, frozenset(told["unexpected_keys"]))


def tensors_to_write(model: nn.Module) -> dict[str, Tensor]:
    """Return the model's tensors under the names and in the form of its files, tied ones once."""
    from safetensors.torch import load_file

    told: Any = model
    with quiet_transformers(), TemporaryDirectory() as folder:
        # It undoes what loading has renamed and joined.
        told.save_pretrained(folder, max_shard_size="1000TB")
        return dict(load_file(Path(folder, "model.safetensors")))


def config_to_write(model: nn.Module) -> str:
    """Return config.json of a model with a head of its own."""
    told: Any = model
    config = told.config
    config.architectures = [type(model).__name__]
    text: str = config.to_json_string()
    return text


def tokenizer_of(folder: ModelFolder) -> Any:
    """Return the tokenizer of a folder; FileError where there is none that works."""
    from transformers import AutoTokenizer

    try:
        found = AutoTokenizer.from_pretrained(folder.path, **_LOCAL)
    except Exception as error:  # of many kinds, by what is missing
        raise _no_tokenizer(folder, reason(error)) from error
    own = set(found.vocab_files_names.values())
    # Without its files some make one that knows no word.
    if own and not any((folder.path / name).is_file() for name in own | {"tokenizer.json"}):
        raise _no_tokenizer(folder, "none of its files is there")
    return found


def _no_tokenizer(folder: ModelFolder, why: str) -> FileError:
    return FileError(
        f"{folder.name}: has no tokenizer that can be loaded ({why}), expected tokenizer.json and "
        "tokenizer_config.json beside the model: add them"
    )


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep its log and its bars off stderr."""
    from transformers.utils import logging as own

    logger = logging.getLogger("transformers")
    level, bars = logger.level, own.is_progress_bar_enabled()
    try:
        logger.setLevel(logging.CRITICAL + 1)
        own.disable_progress_bar()
        yield
    finally:
        logger.setLevel(level)
        if bars:
            own.enable_progress_bar()
