"""What `trial` and `finetune` share: the model with a head for the data, and the data."""

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastplastic.cli.session import device_of, load
from fastplastic.cli.terminal import warn
from fastplastic.cli.training_options import TrainingOptions
from fastplastic.errors import InputError
from fastplastic.naming import ModelName

if TYPE_CHECKING:
    import torch
    from torch import nn

    from fastplastic.sources import LoadedModel, Splits
    from fastplastic.trials import TrainSettings


@dataclass(frozen=True, eq=False)
class Learner:
    """A model to fine-tune, with its data.

    Attributes:
        model: The model on its device, with a head for the classes.
        splits: The data.
        fresh: Seed -> the same architecture with random weights; None where nobody knows how.
        settings: The budget.
        facts: (label, value) pairs of the header.
        digest: Of the weights.
        keywords: Arguments of the model.
        dtypes: In which to write tensors.
    """

    model: "nn.Module"
    splits: "Splits"
    fresh: "Callable[[int], nn.Module] | None"
    settings: "TrainSettings"
    facts: tuple[tuple[str, str], ...]
    digest: str
    keywords: dict[str, Any]
    dtypes: "Mapping[str, torch.dtype]"

    def copy(self) -> "nn.Module":
        """Return a model of its own."""
        return copy.deepcopy(self.model)

    @property
    def metadata(self) -> dict[str, str]:
        """Return what a file of its weights says: the classes, and what images it takes."""
        classes, config = self.splits.classes, dict(self.splits.input_config)
        return {"label_names": json.dumps(classes), "pretrained_cfg": json.dumps(config)}


def learner(options: TrainingOptions, *, validation_share: float = 0.0, place: str = "") -> Learner:
    """Load the model and the data, and give the model a head for the classes.

    Args:
        options: The options.
        validation_share: Share of the training images that are kept apart to choose by.
        place: Where it is trained, in words, if not here.

    Raises:
        InputError: The options do not suit the model or the data.
        FileError: The model or the data cannot be had.
    """
    from fastplastic.sources import split_data, takes_texts
    from fastplastic.trials import digest_of

    if takes_texts(options.model):
        raise InputError(
            f"{options.model}: takes texts, expected a model of images: fine-tune it with a "
            "Trainer of transformers and fastplastic.integrations.transformers.PlasticityCallback; "
            "fastplastic profile, plan and reinit take it"
        )
    # Random weights are not worth fine-tuning: they have to be asked for.
    pretrained = options.pretrained
    if pretrained is None and not options.checkpoint:
        pretrained = True
    loaded = load(options, pretrained=pretrained)
    splits = split_data(
        options.data, model=loaded.model, wanted=options.splits(validation_share),
        img_size=options.img_size, in_chans=options.in_chans, input_size=options.input_size,
    )  # fmt: skip
    for warning in splits.warnings:
        warn(warning)
    head = _fit_classes(options, loaded, splits.num_classes)
    settings = options.settings(new_head=bool(head))
    return Learner(
        model=loaded.model,
        splits=splits,
        # What a function of the user's makes need not be random.
        fresh=None
        if ModelName.of(options.model).kind == "factory"
        else _fresh(options, splits.num_classes),
        settings=settings,
        facts=_facts(
            options, loaded, splits, head, settings, place or str(device_of(options.device))
        ),
        digest=digest_of(loaded.model),
        keywords=options.keywords(),
        dtypes=loaded.dtypes,
    )


def _fit_classes(options: TrainingOptions, loaded: "LoadedModel", classes: int) -> str:
    """Give the model a fresh head where it has none for these classes; return words for it."""
    from fastplastic.sources import fresh_head, put_head

    model: Any = loaded.model
    if model.num_classes == classes:
        return "fresh" if loaded.weights == "random" else loaded.head
    if options.num_classes is not None:
        raise InputError(
            f"--num-classes {options.num_classes}: the data have {classes} classes: leave it out"
        )
    had, device = model.num_classes, next(model.parameters()).device
    put_head(model, classes, options.seed)
    model.to(device).eval()
    return fresh_head(classes, had or None)


def _fresh(options: TrainingOptions, classes: int) -> "Callable[[int], nn.Module]":
    def make(seed: int) -> "nn.Module":
        from fastplastic.sources import create_model

        made = create_model(
            options.model, pretrained=False, num_classes=classes, in_chans=options.in_chans,
            img_size=options.img_size, input_size=options.input_size,
            model_kwargs=options.keywords(), seed=seed,
        )  # fmt: skip
        return made.model.to(device_of(options.device))

    return make


def _facts(
    options: TrainingOptions,
    loaded: "LoadedModel",
    splits: "Splits",
    head: str,
    settings: "TrainSettings",
    place: str,
) -> tuple[tuple[str, str], ...]:
    from fastplastic.trials import norms_of

    sizes = splits.sizes
    images = f"{sizes['train']:,} to train on, {sizes['test']:,} to test on ({splits.tested_on})"
    if "validation" in sizes:
        images += f", {sizes['validation']:,} to choose by"
    amp = f", amp {options.amp_dtype}" if options.amp else ""
    epochs = f"{options.epochs} epoch{'s' * (options.epochs != 1)}"
    budget = (
        f"{epochs} of {options.opt} at {options.lr:g}, {options.sched}, batch "
        f"{options.batch_size}{amp}, on {place}"
    )
    fitted = "fitted to the training images first" if settings.probe_first else "not fitted first"
    norms = [("norms", "BatchNorm measured anew on the training images first")]
    norms *= settings.norms_first and bool(norms_of(loaded.model))
    return (
        ("model", options.model),
        ("weights", loaded.weights),
        ("head", f"{head or 'of the weights'}; {fitted}"),
        *norms,
        ("data", f"{options.data} ({splits.num_classes} classes)"),
        ("images", images),
        ("budget", budget),
    )
