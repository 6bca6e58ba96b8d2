"""Make the models that the command line names; those of timm here."""

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from os import PathLike
from typing import Any

from torch import nn

from fastplastic.errors import FileError, InputError
from fastplastic.naming import ModelName
from fastplastic.sources.factories import from_factory
from fastplastic.sources.folder_models import from_folder
from fastplastic.sources.hub import HUB_PREFIXES, Source, find_weights, quiet, reason, tensors_only
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
from fastplastic.sources.torchvision_models import from_torchvision, torchvision_names


def create_model(
    name: str,
    *,
    pretrained: bool | None = None,
    checkpoint: str | PathLike[str] | None = None,
    num_classes: int | None = None,
    in_chans: int | None = None,
    img_size: int | tuple[int, int] | None = None,
    input_size: tuple[int, int, int] | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> LoadedModel:
    """Make a model. Random weights depend on the seed alone; the global RNG is not touched.

    Args:
        name: In one of `fastplastic.naming.MODEL_FORMS`: of a timm model ("resnet50",
            "resnet50.a1_in1k"), "torchvision:NAME", "hf:FOLDER", "package.module:factory", ...
        pretrained: None tries for pretrained weights, and falls back to random ones with a warning
            when they cannot be had; whether the hub answers is decided within 5 s. True refuses
            instead. False takes random weights.
        checkpoint: Weight file to load instead.
        num_classes: Size of the head; by default that of the pretrained weights. Where that of the
            weights has another, the model has a fresh one.
        in_chans: Input channels.
        img_size: Side of the images, or (height, width), in pixels.
        input_size: (channels, height, width) in one.
        model_kwargs: More arguments for the model's constructor.
        seed: Of random weights.

    Raises:
        InputError: Unknown name, arguments that contradict each other or that the model does not
            take, or `pretrained=True` for a model for which nobody offers weights.
        FileError: With `pretrained=True`, weights that exist cannot be had (hub out of reach, file
            corrupt); or `checkpoint` does not fit.
    """
    if checkpoint is not None and pretrained:
        raise InputError(f"{name}: pretrained and checkpoint both name weights: give one of them")
    if num_classes is not None and num_classes < 0:
        raise InputError(f"num_classes {num_classes}: expected 0 (no head) or more: correct it")
    sizes = _sizes(in_chans, img_size, input_size)
    request = ModelRequest(
        name=name, pretrained=pretrained, checkpoint=checkpoint, num_classes=num_classes,
        model_kwargs=model_kwargs or {}, seed=seed, **sizes,
    )  # fmt: skip
    with quiet(), tensors_only():
        return _MAKERS[ModelName.of(name).kind](request)


def _from_timm(request: ModelRequest) -> LoadedModel:
    name, arguments, seed = request.name, request.given, request.seed
    _check_name(name)
    hub_only = name.partition(":")[0] in HUB_PREFIXES
    source = find_weights(name) if request.wants_pretrained or hub_only else Source(name)
    if request.wants_pretrained:
        refuse = bool(request.pretrained)
        return _try_pretrained(name, source, arguments, refuse=refuse, seed=seed)
    return with_checkpoint(request, _random(name, source, arguments, seed))


def _try_pretrained(
    name: str, source: Source, arguments: dict[str, Any], *, refuse: bool, seed: int
) -> LoadedModel:
    lack = source.lack
    if lack is None:
        try:
            model = _call(source, arguments, seed, pretrained=True)
        # Download, file formats, timm's adaptations: each has exceptions of its own, and a mistake
        # in the arguments shows again just below.
        except Exception as error:
            lack = reason(error)
        else:
            wanted = arguments.get("num_classes")
            had = getattr(model, "pretrained_cfg", {}).get("num_classes")
            head = fresh_head(wanted, had) if wanted and wanted != had else ""
            return LoadedModel(model, name, "pretrained", head=head)
    model = _random(name, source, arguments, seed)
    if refuse:
        raise no_weights(name, lack, offered=source.offered)
    return LoadedModel(model, name, "random", random_warning(name, lack, offered=source.offered))


def _random(name: str, source: Source, arguments: dict[str, Any], seed: int) -> nn.Module:
    """Make the model with random weights; InputError when the arguments do not suit it."""
    try:
        with refusing(name, arguments):
            return _call(source, arguments, seed, pretrained=False)
    except OSError as error:
        raise FileError(f"{name}: cannot be read ({reason(error)}): check the name") from error


def _call(source: Source, arguments: dict[str, Any], seed: int, *, pretrained: bool) -> nn.Module:
    import timm

    given: dict[str, Any] = {"pretrained": pretrained}
    if pretrained and source.overlay:
        given["pretrained_cfg_overlay"] = source.overlay
    with seeded(seed):
        try:
            model: nn.Module = timm.create_model(source.name, **given, **arguments)
        except TypeError as error:
            # Convolutional networks take images of any size, and have no such argument.
            if "img_size" not in arguments or "'img_size'" not in str(error):
                raise
            others = {key: value for key, value in arguments.items() if key != "img_size"}
            model = timm.create_model(source.name, **given, **others)
    return model


def _check_name(name: str) -> None:
    """Refuse a name that timm does not know, with names near to it."""
    import timm

    if ":" in name:
        return
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        near = get_close_matches(architecture.lower(), timm.list_models(), cutoff=0.6)
        if architecture in torchvision_names():
            near = [f"torchvision:{name}", *near]
        hint = f"did you mean {', '.join(near)}?" if near else "timm.list_models() has the names"
        raise InputError(f"unknown model '{name}': expected the name of a timm model: {hint}")
    try:
        timm.models.get_pretrained_cfg(name)
    except RuntimeError as error:
        known = timm.list_models(f"{architecture}.*", pretrained=True)
        near = get_close_matches(name, known, cutoff=0) or [architecture]
        raise InputError(
            f"unknown weights '{tag}' of {architecture}: expected a tag of that model: "
            f"did you mean {', '.join(near)}?"
        ) from error


def _sizes(
    in_chans: int | None,
    img_size: int | tuple[int, int] | None,
    input_size: tuple[int, int, int] | None,
) -> dict[str, Any]:
    """Return the arguments in_chans and img_size, whichever way they were given."""
    side: tuple[int, ...] | None
    side = (img_size, img_size) if isinstance(img_size, int) else img_size
    if input_size is not None:
        channels = input_size[0] if in_chans is None else in_chans
        if (channels, *(side or input_size[1:])) != tuple(input_size):
            raise InputError(
                f"input size {tuple(input_size)} contradicts in_chans {in_chans} or img_size "
                f"{img_size}: give (channels, height, width) alone"
            )
        in_chans, side = input_size[0], input_size[1:]
    sizes = {"in_chans": in_chans, "img_size": side}
    given = {key: value for key, value in sizes.items() if value is not None}
    for key, value in given.items():
        if min(value if isinstance(value, tuple) else (value,)) < 1:
            raise InputError(f"{key} {value}: expected numbers above 0: correct it")
    return given


_MAKERS: Mapping[str, Callable[[ModelRequest], LoadedModel]] = {
    "timm": _from_timm,
    "torchvision": from_torchvision,
    "folder": from_folder,
    "factory": from_factory,
}
