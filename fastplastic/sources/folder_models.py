"""Models of a Hugging Face folder: what is asked for is checked here, `transformers` does it."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from fastplastic.errors import FileError, InputError
from fastplastic.sources import transformers as hf
from fastplastic.sources.folders import ModelFolder, read_folder, read_json
from fastplastic.sources.loaded import (
    LoadedModel,
    ModelRequest,
    fresh_head,
    refusing,
    seeded,
    with_checkpoint,
)
from fastplastic.sources.tell import IMAGENET, tell
from fastplastic.sources.text_task import TextTask

# Of PIL, in timm's words.
_INTERPOLATIONS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
# A tokenizer that has no limit says a number as large as this, or larger.
_NO_LIMIT = 10**6


def from_folder(request: ModelRequest) -> LoadedModel:
    """Make the model of a Hugging Face folder, in float32, without ever running code of the folder.

    Raises:
        InputError: transformers is not installed, the model is of a kind that is not supported,
            or does not take the arguments.
        FileError: The folder, its weights or its tokenizer are missing or corrupt, or the
            checkpoint does not fit.
    """
    folder = read_folder(request.name, new_head=request.num_classes is not None)
    hf.require_transformers(request.name)
    _check_arguments(request, folder)
    with hf.quiet_transformers():
        config = _changed(request, folder, hf.config_of(folder))
        texts = None if folder.task == "images" else _texts(request, folder, config)
        automatic = hf.model_class(folder, config)
        if request.wants_pretrained:
            loaded = _pretrained(request, folder, automatic, config)
        else:
            with refusing(request.name, request.model_kwargs), seeded(request.seed):
                model = hf.random_model(automatic, config)
            loaded = LoadedModel(model, request.name, "random")
    model = loaded.model
    if folder.task == "images":
        tell(model, request.name, _image_config(request, folder, config))
    else:
        told: Any = model
        told.num_classes = len(texts.labels) if texts is not None else 0
    more: dict[str, Any] = {"texts": texts, "folder": folder, "head": loaded.head}
    return with_checkpoint(request, model, loaded.weights, **more)


def _check_arguments(request: ModelRequest, folder: ModelFolder) -> None:
    """Refuse what a model of this kind does not take: InputError."""
    if folder.task != "images":
        for flag, value in {"--in-chans": request.in_chans, "--img-size": request.img_size}.items():
            if value is not None:
                raise InputError(f"{flag}: {request.name} takes texts: leave it out")
    if folder.task == "causal" and request.num_classes is not None:
        raise InputError(
            f"--num-classes {request.num_classes}: {request.name} predicts tokens and has no "
            "classes: leave it out"
        )


def _changed(request: ModelRequest, folder: ModelFolder, config: Any) -> Any:
    """Return the configuration with what was asked for; InputError for what it does not have."""
    changes = dict(request.model_kwargs)
    for key in changes:
        if not hasattr(config, key):
            raise InputError(
                f"--model-kwargs {key}: config.json of {request.name} has no such entry, expected "
                "one of its own: correct or leave it out"
            )
    if request.num_classes is not None:
        changes["num_labels"] = request.num_classes
    side = request.img_size
    if side is not None and hasattr(config, "image_size"):
        changes["image_size"] = side[0] if side[0] == side[1] else list(side)
    channels = getattr(config, "num_channels", 3)
    if request.in_chans not in (None, channels):
        raise InputError(
            f"--in-chans {request.in_chans}: {request.name} takes {channels} channels (grey "
            "images are repeated to them): leave it out"
        )
    with refusing(request.name, changes):
        for key, value in changes.items():
            setattr(config, key, value)
    if folder.task == "texts" and (config.num_labels < 2 or _many_labels(config)):
        raise InputError(
            f"{request.name}: is for regression or for several labels at once, expected one class "
            "of each text: use the library: fastplastic.profile(model, batches)"
        )
    return config


def _many_labels(config: Any) -> bool:
    return getattr(config, "problem_type", None) not in (None, "single_label_classification")


def _pretrained(
    request: ModelRequest, folder: ModelFolder, automatic: Any, config: Any
) -> LoadedModel:
    if folder.weights is None:
        raise FileError(
            f"{folder.name}: has no weights, expected model.safetensors (or "
            "model.safetensors.index.json, pytorch_model.bin): add them, or pass --checkpoint "
            "FILE, or --no-pretrained for random ones"
        )
    with seeded(request.seed):
        found = hf.trained_model(automatic, folder, config)
    head = ""
    lacking = sorted(found.fresh)
    if request.num_classes is not None and lacking:
        lacking = [name for name in lacking if not _of_head(found.model, name)]
        head = fresh_head(request.num_classes, _classes(folder))
    elif folder.task == "encoder" and all("pooler" in name for name in lacking):
        head, lacking = "" if not lacking else "the pooler is random: the weights have none", []
    if lacking:
        others = f" and {len(lacking) - 1} more" * (len(lacking) > 1)
        raise FileError(
            f"{folder.name}: the weights lack {lacking[0]}{others}, or have it in another shape, "
            f"expected all that a {folder.architecture} has: check the folder, or the arguments"
        )
    return LoadedModel(found.model, request.name, "pretrained", head=head)


def _labels(folder: ModelFolder, config: Any) -> dict[str, int]:
    """Return {name of a class: number}, by whichever of the two mappings is written down."""
    found = {str(config.id2label.get(i, i)): i for i in range(config.num_labels)}
    written = folder.config.get("label2id")
    if "id2label" not in folder.config and isinstance(written, dict):
        if sorted(written.values()) == list(found.values()):
            found = {str(name): int(number) for name, number in written.items()}
    return dict(sorted(found.items(), key=lambda pair: pair[1]))


def _classes(folder: ModelFolder) -> int | None:
    """Return the number of classes that the weights of a folder have, or None without a head."""
    if not folder.architecture.endswith("Classification"):
        return None
    # Two are not written down.
    return len(folder.config.get("id2label") or "ab")


def _of_head(model: nn.Module, name: str) -> bool:
    """Tell whether a parameter is of what stands on the base of a model."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    return not name.startswith(prefix) or "pooler" in name


def _texts(request: ModelRequest, folder: ModelFolder, config: Any) -> TextTask:
    tokenizer = hf.tokenizer_of(folder)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
        if config.pad_token_id is None:
            config.pad_token_id = tokenizer.pad_token_id
    if tokenizer.pad_token is None and folder.task != "causal":
        raise FileError(
            f"{folder.name}: its tokenizer has neither a pad_token nor an eos_token, expected one "
            "to fill short texts with: add it to tokenizer_config.json"
        )
    if len(tokenizer) > config.get_text_config().vocab_size:
        raise FileError(
            f"{folder.name}: its tokenizer has {len(tokenizer)} tokens, the model "
            f"{config.get_text_config().vocab_size}: expected that of the model: replace it"
        )
    limits = [tokenizer.model_max_length, getattr(config, "max_position_embeddings", None)]
    longest = min((x for x in limits if x is not None and 0 < x < _NO_LIMIT), default=_NO_LIMIT)
    labels = _labels(folder, config) if folder.task == "texts" else {}
    named = request.num_classes is None or _classes(folder) == request.num_classes
    return TextTask(folder.name, folder.task, tokenizer, labels, named, longest)


def _image_config(request: ModelRequest, folder: ModelFolder, config: Any) -> dict[str, Any]:
    """Return timm's data configuration for preprocessor_config.json, or ImageNet's without one."""
    file = folder.path / "preprocessor_config.json"
    known = read_json(file) if file.is_file() else {}
    for key, usual in (("do_flip_channel_order", False), ("rescale_factor", 1 / 255)):
        if key in known and abs(float(known[key] or 0) - usual) > 1e-6:
            raise InputError(
                f"{file}: {key} is {known[key]}, which is not supported: use the library, with "
                "batches of its own processor: fastplastic.profile(model, batches)"
            )
    found = dict(IMAGENET) | (_geometry(known) if "size" in known else {})
    own = getattr(config, "image_size", None)
    if own is not None and "size" not in known:
        found["input_size"] = (3, *(own if isinstance(own, list | tuple) else (own, own)))
    if known:
        plain = not known.get("do_normalize", True)
        found["mean"] = (0.0,) * 3 if plain else tuple(known.get("image_mean") or found["mean"])
        found["std"] = (1.0,) * 3 if plain else tuple(known.get("image_std") or found["std"])
        found["interpolation"] = _INTERPOLATIONS.get(known.get("resample", 2), "bilinear")
    side = request.img_size or tuple(found["input_size"][1:])
    found["input_size"] = (getattr(config, "num_channels", 3), *side)
    return found


def _geometry(known: Mapping[str, Any]) -> dict[str, Any]:
    """Return size and way of cutting: to the shortest edge and cut, or squashed to the size."""
    size, crop = known["size"], known.get("crop_size")
    edge = size.get("shortest_edge") if isinstance(size, dict) else None
    height, width = _sides(size)
    if edge is None and not known.get("do_center_crop"):
        return {"input_size": (3, height, width), "crop_pct": 1.0, "crop_mode": "squash"}
    if known.get("do_center_crop") and crop is not None:
        cut = _sides(crop)
        return {"input_size": (3, *cut), "crop_pct": cut[0] / height}
    # As of ConvNeXt: the edge is that of what is cut out.
    return {"input_size": (3, height, width), "crop_pct": known.get("crop_pct") or 1.0}


def _sides(size: Any) -> tuple[int, int]:
    if isinstance(size, dict):
        edge = size.get("shortest_edge")
        return (edge, edge) if edge else (size["height"], size["width"])
    return tuple(size) if isinstance(size, list) else (size, size)
