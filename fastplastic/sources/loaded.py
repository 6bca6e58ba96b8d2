"""A model that was asked for, and where its weights come from."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fastplastic.errors import FastPlasticError, FileError, InputError
from fastplastic.files import load_into
from fastplastic.sources.hub import reason

if TYPE_CHECKING:
    from fastplastic.sources.folders import ModelFolder
    from fastplastic.sources.text_task import TextTask


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model and where its weights come from.

    Attributes:
        model: The model, on the CPU. It has timm's `num_classes` (0 where it has no classes) and,
            if it takes images, timm's `pretrained_cfg`, wherever it is from.
        name: Its name as it was asked for.
        weights: "pretrained", "random" or "checkpoint: FILE", with a remark in parentheses if any;
            or what made them.
        warning: One line that the user must see, or None: the weights are not what is expected.
        dtypes: {name: dtype} of the tensors in the checkpoint file; empty without one.
        head: "" where the head is that of the weights, or what is to be said of a fresh one.
        beside: What the checkpoint file holds beside these weights.
        texts: How texts become its inputs; None for a model that takes images.
        folder: The folder of a Hugging Face model, or None.
    """

    model: nn.Module
    name: str
    weights: str
    warning: str | None = None
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)
    head: str = ""
    beside: tuple[str, ...] = ()
    texts: "TextTask | None" = None
    folder: "ModelFolder | None" = None


@dataclass(frozen=True, kw_only=True)
class ModelRequest:
    """What was asked for, as in `create_model`; sizes are one way by now.

    Attributes:
        name: The name as it was given.
        pretrained: None where random weights will do if there are no others.
        checkpoint: Weight file to load instead.
        num_classes: Size of the head, or None for that of the weights.
        in_chans: Input channels, or None.
        img_size: (height, width) of the images, or None.
        model_kwargs: More arguments for the model's constructor.
        seed: Of random weights.
    """

    name: str
    pretrained: bool | None = None
    checkpoint: str | PathLike[str] | None = None
    num_classes: int | None = None
    in_chans: int | None = None
    img_size: tuple[int, int] | None = None
    model_kwargs: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0

    @property
    def wants_pretrained(self) -> bool:
        """Whether pretrained weights are tried for."""
        return self.pretrained is not False and self.checkpoint is None

    @property
    def given(self) -> dict[str, Any]:
        """What the constructor of a timm model is given."""
        sizes = {
            "in_chans": self.in_chans, "img_size": self.img_size, "num_classes": self.num_classes,
        }  # fmt: skip
        return dict(self.model_kwargs) | {
            key: value for key, value in sizes.items() if value is not None
        }


def fresh_head(classes: int, had: int | None) -> str:
    """Return what is said of a head that is not that of the weights."""
    others = "the weights have none" if had is None else f"that of the weights has {had}"
    return f"fresh, of {classes} classes: {others}"


def random_warning(name: str, lack: str, *, offered: bool) -> str:
    """Return the warning that weights are random, as those that were wanted cannot be had."""
    advice = "Check the connection, or pass" if offered else "Pass"
    return (
        f"RANDOM WEIGHTS: the pretrained weights of {name} cannot be had ({lack}). Every number "
        f"below is of an untrained network. {advice} --checkpoint FILE"
    )


def no_weights(name: str, lack: str, *, offered: bool) -> FastPlasticError:
    """Return the error for weights that are asked for and cannot be had."""
    if not offered:
        return InputError(
            f"{name}: no pretrained weights ({lack}): pass a checkpoint, or choose a model that "
            "has some"
        )
    return FileError(
        f"{name}: the pretrained weights cannot be had ({lack}): check the connection, or pass "
        "a checkpoint file"
    )


def with_checkpoint(
    request: ModelRequest, model: nn.Module, weights: str = "random", **more: Any
) -> LoadedModel:
    """Load the checkpoint, if one was asked for; `weights` says what the model has without."""
    if request.checkpoint is None:
        return LoadedModel(model, request.name, weights, **more)
    loaded = load_into(model, request.checkpoint, own_head=bool(request.num_classes))
    head = ""
    if loaded.kept:
        head = fresh_head(request.num_classes or 0, loaded.classes)
    elif loaded.unfitted:
        head = "of the weights, which was not fitted yet"
    weights = f"checkpoint: {request.checkpoint}"
    if loaded.remark:
        weights += f" ({loaded.remark})"
    more |= {"head": head, "beside": loaded.beside}
    return LoadedModel(model, request.name, weights, dtypes=loaded.dtypes, **more)


# In all of these ways constructors of models answer arguments that they do not take.
_REFUSALS = (
    TypeError, ValueError, AssertionError, RuntimeError, LookupError, ArithmeticError,
    AttributeError, NotImplementedError,
)  # fmt: skip


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw random weights from the seed alone, and leave the global RNG as it is."""
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed: that also seeds the GPUs, which nothing here would set back.
        torch.default_generator.manual_seed(seed)
        yield


@contextmanager
def refusing(name: str, arguments: Mapping[str, Any]) -> Iterator[None]:
    """Say which arguments a model cannot be made with: InputError."""
    try:
        yield
    except _REFUSALS as error:
        given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        raise InputError(
            f"{name} cannot be made with {given or 'its defaults'} ({reason(error)}): "
            "expected arguments of that model: correct or leave them out"
        ) from error
