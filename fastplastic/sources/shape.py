"""The form in which a model takes images: channels, size, and timm's data configuration."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from fastplastic.errors import InputError
from fastplastic.sources.images import Pipeline


@dataclass(frozen=True, eq=False)
class InputShape:
    """How an image becomes a tensor.

    Attributes:
        channels: Of the tensor; where they are not 3, a grey image is repeated to them.
        config: timm's data configuration.
    """

    channels: int
    config: dict[str, Any]

    @classmethod
    def of(
        cls,
        model: nn.Module,
        img_size: int | tuple[int, int] | None,
        in_chans: int | None,
        input_size: tuple[int, int, int] | None,
    ) -> "InputShape":
        """Return the shape of a model's inputs, or another that was asked for; InputError."""
        own = _own_input_size(model)
        channels, *side = input_size or own
        if img_size is not None:
            side = [img_size, img_size] if isinstance(img_size, int) else list(img_size)
        channels = in_chans or (channels if input_size else own[0])
        if min(channels, *side) < 1:
            raise InputError(
                f"input size {[channels, *side]}: expected numbers above 0: correct it"
            )
        args = {"input_size": (channels, *side)}
        known = getattr(model, "pretrained_cfg", {})
        return cls(channels, timm_data().resolve_data_config(args, pretrained_cfg=known))

    def transform_config(self) -> dict[str, Any]:
        """Return the arguments of `timm.data.create_transform` for one image."""
        config = dict(self.config)
        if self.channels != 3:  # one channel, repeated: the statistics of the three are averaged
            config["input_size"] = (1, *config["input_size"][1:])
            for key in ("mean", "std"):
                config[key] = (sum(config[key]) / len(config[key]),)
        return config

    def pipeline(self) -> Pipeline:
        """Return what turns an image into a tensor for evaluation."""
        transform = timm_data().create_transform(**self.transform_config(), is_training=False)
        return Pipeline(transform, self.channels)


def timm_data() -> Any:
    """Return the module `timm.data`, loaded when first needed."""
    import timm.data

    return timm.data


def _own_input_size(model: nn.Module) -> tuple[int, ...]:
    """Return the model's (channels, height, width), which may differ from the pretrained one's."""
    import timm.models

    get = getattr(timm.models, "get_model_input_config", None)  # newer versions of timm
    if get is not None:
        return tuple(get(model)["input_size"])
    size = getattr(model, "pretrained_cfg", {}).get("input_size", (3, 224, 224))
    return (getattr(model, "in_chans", size[0]), *size[1:])
