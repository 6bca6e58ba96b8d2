"""Make the models that the command line names, and lend them a head for other classes."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from os import PathLike
from typing import Any

import torch
from torch import nn

from fastplastic.errors import FileError, InputError
from fastplastic.files import load_into
from fastplastic.sources.hub import HUB_PREFIXES, Source, find_weights, quiet, reason, tensors_only

# In all of these ways constructors of models answer arguments that they do not take.
_REFUSALS = (
    TypeError, ValueError, AssertionError, RuntimeError, LookupError, ArithmeticError,
    AttributeError, NotImplementedError,
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model and where its weights come from.

    Attributes:
        model: The model, on the CPU.
        name: Its name as it was asked for.
        weights: "pretrained", "random" or "checkpoint: FILE", with a remark in parentheses if any.
        warning: One line that the user must see, or None: the weights are not what is expected.
        dtypes: {name: dtype} of the tensors in the checkpoint file; empty without one.
        head: "" where the head is that of the weights, or what is to be said of a fresh one.
        beside: What the checkpoint file holds beside these weights.
    """

    model: nn.Module
    name: str
    weights: str
    warning: str | None = None
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)
    head: str = ""
    beside: tuple[str, ...] = ()


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
    """Make a timm model. Random weights depend on the seed alone; the global RNG is not touched.

    Args:
        name: Of a timm model ("resnet50", "resnet50.a1_in1k"), or "hf-hub:OWNER/NAME", or
            "local-dir:FOLDER".
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
    _check_name(name)
    sizes = _sizes(in_chans, img_size, input_size)
    arguments = dict(model_kwargs or {}) | sizes
    if num_classes is not None:
        if num_classes < 0:
            raise InputError(f"num_classes {num_classes}: expected 0 (no head) or more: correct it")
        arguments["num_classes"] = num_classes
    with quiet(), tensors_only():
        wanted = pretrained is not False and checkpoint is None
        hub_only = name.partition(":")[0] in HUB_PREFIXES
        source = find_weights(name) if wanted or hub_only else Source(name)
        if wanted:
            return _try_pretrained(name, source, arguments, refuse=bool(pretrained), seed=seed)
        model = _random(name, source, arguments, seed)
        if checkpoint is None:
            return LoadedModel(model, name, "random")
        loaded = load_into(model, checkpoint, own_head=bool(num_classes))
        head = ""
        if loaded.kept:
            head = fresh_head(num_classes or 0, loaded.classes)
        elif loaded.unfitted:
            head = "of the weights, which was not fitted yet"
        weights = f"checkpoint: {checkpoint}"
        if loaded.remark:
            weights += f" ({loaded.remark})"
        return LoadedModel(
            model, name, weights, dtypes=loaded.dtypes, head=head, beside=loaded.beside
        )


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
    if refuse and not source.offered:
        raise InputError(
            f"{name}: no pretrained weights ({lack}): pass a checkpoint, or choose a model that "
            "has some"
        )
    if refuse:
        raise FileError(
            f"{name}: the pretrained weights cannot be had ({lack}): check the connection, or pass "
            "a checkpoint file"
        )
    advice = "Check the connection, or pass" if source.offered else "Pass"
    warning = (
        f"RANDOM WEIGHTS: the pretrained weights of {name} cannot be had ({lack}). Every number "
        f"below is of an untrained network. {advice} --checkpoint FILE"
    )
    return LoadedModel(model, name, "random", warning)


def fresh_head(classes: int, had: int | None) -> str:
    """Return what is said of a head that is not that of the weights."""
    others = "the weights have none" if had is None else f"that of the weights has {had}"
    return f"fresh, of {classes} classes: {others}"


def _random(name: str, source: Source, arguments: dict[str, Any], seed: int) -> nn.Module:
    """Make the model with random weights; InputError when the arguments do not suit it."""
    try:
        return _call(source, arguments, seed, pretrained=False)
    except OSError as error:
        raise FileError(f"{name}: cannot be read ({reason(error)}): check the name") from error
    except _REFUSALS as error:
        given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        raise InputError(
            f"{name} cannot be made with {given or 'its defaults'} ({reason(error)}): "
            "expected arguments of that model: correct or leave them out"
        ) from error


def _call(source: Source, arguments: dict[str, Any], seed: int, *, pretrained: bool) -> nn.Module:
    import timm

    given: dict[str, Any] = {"pretrained": pretrained}
    if pretrained and source.overlay:
        given["pretrained_cfg_overlay"] = source.overlay
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed: that also seeds the GPUs, which nothing here would set back.
        torch.default_generator.manual_seed(seed)
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

    prefix, colon, rest = name.partition(":")
    if colon and prefix in (*HUB_PREFIXES, "local-dir") and rest:
        return
    if colon or "/" in name:
        raise InputError(
            f"unknown model '{name}': expected a timm model name or hf-hub:OWNER/NAME: "
            "timm.list_models() has the names"
        )
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        near = get_close_matches(architecture.lower(), timm.list_models(), cutoff=0.6)
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
