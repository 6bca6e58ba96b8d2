"""What the commands share: the model, the data and the device that options name, and a profile."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from fastplastic.cli.agreement import agree
from fastplastic.cli.launch import heard_of_all, own_gpu, place
from fastplastic.cli.options import (
    DataOptions,
    MeasureOptions,
    ModelOptions,
    ReinitOptions,
    SelectOptions,
)
from fastplastic.cli.terminal import progress, say, waiting, warn
from fastplastic.errors import FileError, InputError, NoBatchesError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from fastplastic import Plan, Profile
    from fastplastic.model import LentHead
    from fastplastic.sources import DataSource, LoadedModel
    from fastplastic.wiring import UnitGraph


@dataclass(frozen=True, eq=False)
class Measured:
    """A model, its profile, the data, and the words for where the numbers come from."""

    loaded: "LoadedModel"
    profile: "Profile"
    source: "DataSource"
    facts: tuple[tuple[str, str], ...]


def device_of(name: str | None) -> "torch.device":
    """Return the torch device with this name, by default a GPU where there is one; InputError."""
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    chosen = own_gpu(gpus) if gpus and name in (None, "cuda") else name or "cpu"
    try:
        device = torch.device(chosen)
        torch.empty(1, device=device)
    # Torch raises these for a name it does not know and for a device that is not there.
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0][:80]
        raise InputError(
            f"--device {chosen}: not usable here ({reason}): try --device cpu"
        ) from None
    return device


def load(options: ModelOptions, *, pretrained: bool | None) -> "LoadedModel":
    """Build the model on its device, in eval mode; say on stderr when its weights are random."""
    import torch

    from fastplastic.sources import create_model

    device = device_of(options.device)
    loaded = create_model(
        options.model,
        pretrained=pretrained,
        checkpoint=options.checkpoint,
        num_classes=options.num_classes,
        in_chans=options.in_chans,
        img_size=options.img_size,
        input_size=options.input_size,
        model_kwargs=options.keywords(),
        seed=options.seed,
    )
    if loaded.warning:
        warn(loaded.warning)
    layout = torch.channels_last if options.channels_last else torch.contiguous_format
    loaded.model.to(device).to(memory_format=layout).eval()
    _check_finite(options, loaded)
    return loaded


def outlined(options: ModelOptions) -> "LoadedModel":
    """Build the model without values, for its structure."""
    from fastplastic.sources import create_outline

    return create_outline(
        options.model,
        num_classes=options.num_classes,
        in_chans=options.in_chans,
        img_size=options.img_size,
        input_size=options.input_size,
        model_kwargs=options.keywords(),
        seed=options.seed,
    )


def _check_finite(options: ModelOptions, loaded: "LoadedModel") -> None:
    """Name tensors with NaN or infinity on stderr; FileError where they would be written anew."""
    from fastplastic.model import nonfinite_tensors
    from fastplastic.planning import some_of

    names = nonfinite_tensors(loaded.model)
    if not names:
        return
    found = f"{loaded.weights}: NaN or infinity in {len(names)} tensors: {some_of(names)}"
    if isinstance(options, ReinitOptions) and not options.force:
        raise FileError(
            f"{found}; expected finite weights: take another checkpoint, or pass --force to "
            "re-initialise this one all the same"
        )
    warn(f"{found}. Layers that they reach cannot be measured, and no unit of them is planned")


def precision(options: DataOptions) -> AbstractContextManager[object]:
    """Return the context in which the model runs."""
    import torch

    if not options.amp:
        return nullcontext()
    return torch.autocast(device_of(options.device).type, getattr(torch, options.amp_dtype))


def source_of(options: DataOptions, loaded: "LoadedModel") -> "DataSource":
    """Return the data that the options name, in the form that the model takes: this process's."""
    from fastplastic.sources import Share

    source, found = _whole_source(options, loaded), place()
    return source if found is None else replace(source, share=Share(found.rank, found.size))


def _whole_source(options: DataOptions, loaded: "LoadedModel") -> "DataSource":
    from fastplastic.sources import batches, text_batches

    if loaded.texts is not None:
        return text_batches(
            options.data, model=loaded.model, texts=loaded.texts, batch_size=options.batch_size,
            max_batches=options.batches, max_length=options.max_length, seed=options.seed,
        )  # fmt: skip
    if options.max_length is not None:
        raise InputError(
            f"--max-length {options.max_length}: {options.model} takes images, expected a model of "
            "texts (hf:FOLDER): leave it out"
        )
    source = batches(
        options.data,
        model=loaded.model,
        batch_size=options.batch_size,
        max_batches=options.batches,
        img_size=options.img_size,
        in_chans=options.in_chans,
        input_size=options.input_size,
        workers=options.workers,
        seed=options.seed,
    )
    for warning in source.warnings:
        warn(warning)
    return source


def warn_of_left_out(source: "DataSource") -> None:
    """Say on stderr how many images could not be read, and name the first."""
    if not source.left_out:
        return
    first = list(source.left_out.items())[:3]
    names = ", ".join(f"{name} ({why})" for name, why in first)
    many = len(source.left_out)
    warn(
        f"{many} of {source.samples} images cannot be read and {'are' if many > 1 else 'is'} left "
        f"out: {names}{', ...' * (many > len(first))}"
    )


def _take_in_left_out(source: "DataSource") -> None:
    """Take in what the other processes could not read."""
    found = heard_of_all(dict(source.left_out))
    # In the same order in all of them.
    source.left_out.clear()
    for left_out in found:
        source.left_out.update(left_out)


def measure(
    options: MeasureOptions,
    *,
    pretrained: bool | None,
    gradients: bool = False,
    ranks: bool = False,
    watch: "Callable[[DataSource], DataSource] | None" = None,
    check: Callable[[Sequence[str]], None] | None = None,
) -> Measured:
    """Load model and data, and profile the one on the other, or on what `watch` makes of it.

    What `check` refuses, by the names of the layers, is refused before anything is measured.
    """
    with waiting(f"loading {options.model}", quiet=options.quiet):
        import torch

        import fastplastic
        from fastplastic.model import loss_head

        loaded, source = _loaded(options, pretrained=pretrained)
        source = source if watch is None else watch(source)
    if gradients:
        _require_labels(options.data, source)
    model = loaded.model
    head: AbstractContextManager[LentHead | None] = nullcontext()
    if loaded.texts is None and source.num_classes != model.num_classes:
        head = loss_head(model, source.num_classes, options.seed)
    # Random units of the model itself, such as dropout, draw from torch's own generator.
    torch.manual_seed(options.seed)
    bar = progress(len(source), quiet=options.quiet, before="tracing the model")
    agree(options, loaded, source)
    with head as lent, precision(options), bar as done, _named_unreadable(source):
        profile = fastplastic.profile(
            model, source, gradients=gradients, ranks=ranks, progress=done, lent_head=lent,
            sample_positions=options.sample_positions, backward=source.labelled,
            loss_fn=source.loss_fn,
            example_inputs=None if check is None else _checked_wiring(model, source, check),
        )  # fmt: skip
    _take_in_left_out(source)
    warn_of_left_out(source)
    return Measured(loaded, profile, source, _facts(options, loaded, source, profile))


@contextmanager
def _named_unreadable(source: "DataSource") -> Iterator[None]:
    """Say which images cannot be read where no process has one that can: FileError."""
    try:
        yield
    except NoBatchesError:
        _take_in_left_out(source)
        if source.left_out:
            raise source.unreadable() from None
        raise


def _require_labels(data: str, source: "DataSource") -> None:
    """Refuse texts without labels where single weights are to be chosen: InputError."""
    if not source.labelled:
        raise InputError(
            f"--granularity weight: the texts in {data} have no labels, expected some to compute "
            "gradients from: pass a .jsonl file with labels, or choose units"
        )


def _checked_wiring(
    model: "nn.Module", source: "DataSource", check: Callable[[Sequence[str]], None]
) -> "UnitGraph | None":
    """Return the wiring of a model whose layers pass a check; None without a batch to trace."""
    from fastplastic.graph import build_graph
    from fastplastic.model import read_batches, undisturbed

    # Which restores the random state too: reading draws from it.
    with undisturbed(model):
        first = next(read_batches(source, next(model.parameters()).device), None)
        if first is None:
            return None
        graph = build_graph(model, first.example())
    check([layer.name for layer in graph.layers])
    return graph


def _loaded(options: DataOptions, *, pretrained: bool | None) -> "tuple[LoadedModel, DataSource]":
    from fastplastic.kernels import tell_of_compiling

    if not options.quiet and device_of(options.device).type == "cpu":
        tell_of_compiling(_say_compiling)
    loaded = load(options, pretrained=pretrained)
    if options.checkpoint and options.data == "sample" and loaded.texts is None:
        warn(
            "the images are the Fashion-MNIST sample of the package, not those of your task: units "
            "that are dead there may be needed here. Pass --data"
        )
    return loaded, source_of(options, loaded)


def _say_compiling() -> None:
    say("compiling kernels that no run here needed before: this one takes some seconds longer")


def _facts(
    options: DataOptions,
    loaded: "LoadedModel",
    source: "DataSource",
    profile: "Profile",
) -> tuple[tuple[str, str], ...]:
    head = loaded.model.num_classes
    batches = f"{profile.batches} batch{'es' * (profile.batches != 1)}"
    amp = f" with amp {options.amp_dtype}" if options.amp else ""
    pairs = [
        ("model", options.model),
        ("weights", loaded.weights),
        ("data", source.says),
        ("samples", f"{profile.samples} in {batches}{_spread()}, seed {options.seed}"),
        ("mode", f"{profile.mode}, {profile.dtype}{amp} on {profile.device}"),
    ]
    if loaded.weights == "random":
        text = (
            "the weights are not trained; where the last norm of a block starts at zero, as in "
            "timm, its layer shows as dead and the layers before it get no gradient"
        )
        pairs.append(("note", text))
    if loaded.head:
        pairs.append(("head", f"{loaded.head}; gradients say little until it is fitted"))
    elif source.head:
        pairs.append(("head", source.head))
    elif head != source.num_classes:
        text = (
            f"the model has {head} classes: a fresh head of {source.num_classes} was used for the "
            "loss only, so gradients say little until a head is fitted"
        )
        pairs.append(("head", text))
    if loaded.weights != "random" and norms_of_other_data(loaded, source):
        text = (
            "the statistics of BatchNorm are those of the weights; trial and finetune measure them "
            "anew on your images first, and count other units then"
        )
        pairs.append(("norms", text))
    return tuple(pairs)


def _spread() -> str:
    found = place()
    return "" if found is None else f" on {found.size} processes"


def norms_of_other_data(loaded: "LoadedModel", source: "DataSource") -> bool:
    """Return whether fine-tuning on these data begins by measuring the norms anew."""
    from fastplastic.trials import norms_of

    new_head = bool(loaded.head or loaded.model.num_classes != source.num_classes)
    return new_head and bool(norms_of(loaded.model))


def measure_for(options: SelectOptions, *, pretrained: bool | None) -> Measured:
    """Measure what the granularity needs."""
    return measure(options, pretrained=pretrained, gradients=options.granularity == "weight")


def choose(options: SelectOptions, measured: Measured) -> "Plan":
    """Return the plan that the options ask for; InputError when the model cannot fulfil it."""
    import fastplastic

    return fastplastic.plan(
        measured.profile,
        criterion=options.criterion,
        ratio=options.ratio,
        threshold=options.threshold,
        granularity=options.granularity,
        scope=options.scope,
        include=options.include,
        exclude=options.exclude,
        max_layer_fraction=options.max_layer_fraction,
        seed=options.seed,
    )
