"""What a Hugging Face model folder holds, read without transformers and without any code in it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fastplastic.errors import FileError, InputError
from fastplastic.naming import ModelName

# What a model is for: classes of images, of texts, the next token, or features of texts alone.
FolderTask = Literal["images", "texts", "causal", "encoder"]

_WEIGHTS = (
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)  # fmt: skip
_LIBRARY = (
    "for others use the library: fastplastic.profile(model, batches), where batches are mappings "
    "as your training loop has them"
)


@dataclass(frozen=True)
class ModelFolder:
    """A folder with a config.json.

    Attributes:
        name: The model as it was asked for.
        path: The folder.
        config: What config.json says.
        task: What the model is for.
    """

    name: str
    path: Path
    config: Mapping[str, Any]
    task: FolderTask

    @property
    def weights(self) -> Path | None:
        """The file that the weights are in or are listed in, or None."""
        return next((self.path / x for x in _WEIGHTS if (self.path / x).is_file()), None)

    @property
    def weight_files(self) -> tuple[Path, ...]:
        """The files that the weights are in; FileError where the list of them is damaged."""
        file = self.weights
        if file is None or file.suffix != ".json":
            return () if file is None else (file,)
        parts = read_json(file).get("weight_map")
        if not isinstance(parts, dict):
            raise FileError(f"{file}: has no weight_map, expected the file of each tensor")
        return tuple(self.path / str(name) for name in sorted(set(parts.values())))

    @property
    def architecture(self) -> str:
        """The class of the model."""
        return str(self.config["architectures"][0])


def takes_texts(name: str) -> bool:
    """Tell whether a model takes texts; what cannot be told without loading it does not.

    Raises:
        FileError: The name is of a folder that is missing or has no usable config.json.
        InputError: The name has none of the forms, or the folder is of a model of another kind.
    """
    parts = ModelName.of(name)
    return parts.kind == "folder" and read_folder(name).task != "images"


def read_folder(name: str, *, new_head: bool = False) -> ModelFolder:
    """Read what a folder says of its model.

    Args:
        name: "hf:FOLDER".
        new_head: Whether the model is to have a classifier of its own, whatever the folder has.

    Raises:
        FileError: It is missing, or has no usable config.json.
        InputError: The model is of a kind that is not supported.
    """
    path = Path(ModelName.of(name).rest).expanduser()
    file = path / "config.json"
    if not path.is_dir():
        what = "is a file" if path.exists() else "no such folder"
        raise FileError(
            f"{name}: {what}, expected a Hugging Face model folder with config.json and "
            "model.safetensors: check the path (a name on the hub has to be downloaded first: hf "
            "download OWNER/NAME --local-dir FOLDER)"
        )
    if not file.is_file():
        raise FileError(
            f"{name}: has no config.json, expected one beside the weights: check the folder"
        )
    config = read_json(file)
    if not isinstance(config.get("model_type"), str):
        raise FileError(f"{file}: has no model_type, expected that of a Hugging Face model")
    return ModelFolder(name, path, config, _task(name, file, config, new_head=new_head))


def _task(name: str, file: Path, config: Mapping[str, Any], *, new_head: bool) -> FolderTask:
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or not architectures:
        raise FileError(
            f"{file}: names no architectures, expected the class of the model, as "
            '["BertForSequenceClassification"]: add it'
        )
    architecture = str(architectures[0])
    stem, found, head = architecture.partition("For")
    images = "vocab_size" not in config and "text_config" not in config
    if "ImageClassification" in head:
        return "images"
    if head == "SequenceClassification":
        return "texts"
    if config.get("is_encoder_decoder"):
        raise _unsupported(name, architecture)
    if head == "CausalLM" or stem.endswith("LMHeadModel"):
        return "causal"
    if new_head and (head in ("", "MaskedLM", "PreTraining")):
        return "images" if images else "texts"
    if not found and not images:
        return "encoder"
    raise _unsupported(name, architecture, hint=(not found and images) or head == "MaskedLM")


def _unsupported(name: str, architecture: str, *, hint: bool = False) -> InputError:
    head = "with --num-classes N it gets a fresh classifier; " if hint else ""
    return InputError(
        f"{name}: is a {architecture}, expected a model ...ForImageClassification, "
        f"...ForSequenceClassification, ...ForCausalLM or an encoder of texts: {head}{_LIBRARY}"
    )


def read_json(file: Path) -> dict[str, Any]:
    """Return the object that a JSON file holds; FileError where it holds none."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FileError(f"{file}: cannot be read as JSON ({error}): get it anew") from error
    if not isinstance(found, dict):
        raise FileError(f"{file}: holds a {type(found).__name__}, expected an object: get it anew")
    return found
