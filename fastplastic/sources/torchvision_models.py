"""Classifiers of torchvision by name, with its weights from its cache or its server."""

from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastplastic.errors import InputError
from fastplastic.naming import ModelName
from fastplastic.sources.hub import answers_not, reason
from fastplastic.sources.loaded import (
    LoadedModel,
    ModelRequest,
    fresh_head,
    no_weights,
    random_warning,
    refusing,
    seeded,
    with_checkpoint,
)
from fastplastic.sources.tell import IMAGENET, put_head, tell

# Rooms of torchvision with models of other kinds, and what they do.
_OTHERS = {
    "detection": "finds objects", "segmentation": "labels pixels", "video": "takes videos",
    "optical_flow": "estimates motion", "quantization": "is quantised",
}  # fmt: skip


def torchvision_names() -> list[str]:
    """Return the names of the classifiers that torchvision has."""
    models = _models()
    return list(models.list_models(module=models))


def torchvision_tags(name: str) -> list[str]:
    """Return the names of the weights that torchvision offers for a model, the default first."""
    known = _models().get_model_weights(name)
    default = getattr(known, "DEFAULT", None)
    return [own.name for own in sorted(known, key=lambda own: own is not default)]


def from_torchvision(request: ModelRequest) -> LoadedModel:
    """Make a model of torchvision.

    Raises:
        InputError: Unknown name or weights, no classifier, arguments that it does not take, or
            weights are asked for that nobody offers.
        FileError: Weights that are asked for cannot be had, or the checkpoint does not fit.
    """
    name, _, tag = ModelName.of(request.name).rest.partition(".")
    _check_name(name)
    weights = _weights(name, tag)
    config = _config(request, weights)
    if not request.wants_pretrained:
        return with_checkpoint(request, _random(request, name, config))
    lack = "torchvision offers none for this model" if weights is None else _lack(weights)
    if lack is None:
        try:
            return _pretrained(request, name, weights, config)
        except (TypeError, ValueError) as error:  # of its arguments
            raise InputError(
                f"{request.name} with pretrained weights does not take these arguments "
                f"({reason(error)}): leave them out, or pass --no-pretrained or a checkpoint"
            ) from error
        # Of the download, of the file, of the disk: each has exceptions of its own.
        except Exception as error:
            lack = reason(error)
    model, offered = _random(request, name, config), weights is not None
    if request.pretrained:
        raise no_weights(request.name, lack, offered=offered)
    warning = random_warning(request.name, lack, offered=offered)
    return LoadedModel(model, request.name, "random", warning)


def _pretrained(
    request: ModelRequest, name: str, weights: Any, config: dict[str, Any]
) -> LoadedModel:
    model = _call(request, name, weights=weights)
    tell(model, request.name, config)
    told: Any = model
    had, wanted, head = told.num_classes, request.num_classes, ""
    if wanted and wanted != had:
        put_head(model, wanted, request.seed)
        head = fresh_head(wanted, had)
    return LoadedModel(model, request.name, "pretrained", head=head)


def _random(request: ModelRequest, name: str, config: dict[str, Any]) -> nn.Module:
    classes = {} if request.num_classes is None else {"num_classes": request.num_classes}
    with refusing(request.name, dict(request.model_kwargs) | classes):
        model = _call(request, name, weights=None, **classes)
    tell(model, request.name, config)
    return model


def _call(request: ModelRequest, name: str, **more: Any) -> nn.Module:
    arguments = dict(request.model_kwargs) | more
    side = {} if request.img_size is None else {"image_size": request.img_size[0]}
    with seeded(request.seed):
        try:
            model: nn.Module = _models().get_model(name, **arguments, **side)
        except TypeError as error:
            # Convolutional networks take images of any size, and have no such argument.
            if not side or "'image_size'" not in str(error):
                raise
            model = _models().get_model(name, **arguments)
    return model


def _check_name(name: str) -> None:
    """Refuse what is no classifier of torchvision: InputError."""
    models = _models()
    if name not in models.list_models():
        near = get_close_matches(name.lower(), torchvision_names(), cutoff=0.6)
        hint = "fastplastic list models torchvision: has the names"
        hint = f"did you mean {', '.join(f'torchvision:{own}' for own in near)}?" if near else hint
        raise InputError(
            f"unknown model 'torchvision:{name}': expected a model of torchvision: {hint}"
        )
    room = models.get_model_builder(name).__module__.removeprefix("torchvision.models.")
    kind = room.partition(".")[0]
    if kind in _OTHERS:
        raise InputError(
            f"torchvision:{name} {_OTHERS[kind]}, expected a classifier of images: for others use "
            "the library: fastplastic.profile(model, batches, loss_fn=...)"
        )


def _weights(name: str, tag: str) -> Any:
    """Return the weights with this tag, or the default ones; None where torchvision has none."""
    known, tags = _models().get_model_weights(name), torchvision_tags(name)
    if not tag:
        return known[tags[0]] if tags else None
    if tag not in tags:
        hint = f"did you mean {', '.join(tags)}?" if tags else "it has none"
        raise InputError(
            f"unknown weights '{tag}' of torchvision:{name}: expected a tag of that model: {hint}"
        )
    return known[tag]


def _lack(weights: Any) -> str | None:
    """Return why weights cannot be had, or None where they are there or the server answers."""
    kept = Path(torch.hub.get_dir(), "checkpoints", weights.url.rpartition("/")[2])
    return None if kept.is_file() else answers_not(weights.url)


def _config(request: ModelRequest, weights: Any) -> dict[str, Any]:
    """Return timm's data configuration for the transforms of the weights, or ImageNet's."""
    if request.in_chans not in (None, 3):
        raise InputError(
            f"--in-chans {request.in_chans}: {request.name} takes 3 channels (grey images are "
            "repeated to them): leave it out"
        )
    config = dict(IMAGENET)
    if weights is not None:
        known = weights.transforms()
        side = known.crop_size[0]
        config |= {
            "input_size": (3, side, side), "crop_pct": side / known.resize_size[0],
            "mean": tuple(known.mean), "std": tuple(known.std),
            "interpolation": known.interpolation.value,
        }  # fmt: skip
    if request.img_size is not None:
        config["input_size"] = (3, *request.img_size)
    return config


def _models() -> Any:
    """Return the module `torchvision.models`, loaded when first needed."""
    return import_module("torchvision.models")
