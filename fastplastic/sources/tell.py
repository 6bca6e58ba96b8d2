"""Let models of others tell what timm models tell: their classes, their head, their images."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastplastic.errors import FastPlasticError, InputError
from fastplastic.model import Batch, give_head, output_layers, outputs_of, undisturbed
from fastplastic.sources.hub import reason
from fastplastic.sources.loaded import seeded

# timm's own defaults: what ImageNet models are mostly trained with.
IMAGENET: Mapping[str, Any] = {
    "input_size": (3, 224, 224),
    "interpolation": "bilinear",
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "crop_pct": 0.875,
}
# Where torchvision and transformers keep the layers that make the logits.
_HEADS = ("fc", "classifier", "heads", "head", "cls_classifier", "distillation_classifier")


def tell(model: nn.Module, name: str, config: Mapping[str, Any]) -> None:
    """Set `num_classes` and `pretrained_cfg` of a model, by running it once on two random images.

    A model that already tells both keeps what it says. The global RNG is not touched.

    Args:
        model: A classifier of images.
        name: Its name, for errors.
        config: timm's data configuration; "input_size" is that of the random images.

    Raises:
        InputError: It does not run on such images, or gives no logits [images, classes].
    """
    told: Any = model
    if isinstance(getattr(model, "num_classes", None), int) and hasattr(model, "pretrained_cfg"):
        return
    generator = torch.Generator().manual_seed(0)
    batch = Batch((torch.randn(2, *config["input_size"], generator=generator),), {}, None, False)
    logits = _logits(model, name, batch)
    told.num_classes = logits.shape[1]
    told.pretrained_cfg = dict(config) | {"classifier": _heads(model, batch, logits.shape[1])}


def put_head(model: nn.Module, classes: int, seed: int) -> None:
    """Give a model that tells its head a fresh one for other classes, drawn from the seed alone.

    Raises:
        InputError: The model has no layer that makes its logits.
    """
    told: Any = model
    if hasattr(model, "reset_classifier"):
        with seeded(seed):
            told.reset_classifier(classes)
        return
    give_head(model, classes, seed)
    told.num_classes = classes
    config: Any = getattr(model, "config", None)
    if hasattr(config, "num_labels"):  # of transformers
        config.num_labels = classes
        told.num_labels = classes


def _logits(model: nn.Module, name: str, batch: Batch) -> Tensor:
    size = " x ".join(map(str, batch.args[0].shape[1:]))
    try:
        with undisturbed(model), torch.no_grad():
            model.eval()
            found = outputs_of(model, batch)
    except FastPlasticError as error:
        raise InputError(f"{name}: {error}; {_WAY_OUT}") from error
    except Exception as error:  # the code of others
        raise InputError(
            f"{name} does not run on images of {size} ({reason(error)}): expected a classifier of "
            "such images: pass its --input-size C H W"
        ) from error
    if found.ndim != 2 or len(found) != 2:
        raise InputError(
            f"{name}: returns {tuple(found.shape)} for 2 images of {size}, expected logits [2, "
            f"classes]; {_WAY_OUT}"
        )
    return found


_WAY_OUT = (
    "for segmentation, detection and the like use the library: fastplastic.profile(model, "
    "batches, loss_fn=...)"
)


def _heads(model: nn.Module, batch: Batch, classes: int) -> tuple[str, ...]:
    """Return the names of the layers that make the logits; those seen to, or those named so."""
    seen = [id(layer) for layer in output_layers(model, batch)]
    if not seen:
        blocks = [block for name in _HEADS if (block := getattr(model, name, None)) is not None]
        for block in blocks if all(isinstance(b, nn.Module) for b in blocks) else []:
            last = [m for m in block.modules() if isinstance(m, nn.Linear | nn.Conv2d)][-1:]
            seen += [id(layer) for layer in last if len(layer.weight) == classes]
    return tuple(name for name, module in model.named_modules() if id(module) in seen)
