"""The options of every command, as frozen dataclasses: timm's names wherever timm has one.

Nothing here imports torch: what can be refused is refused before anything slow starts.
"""

from ast import literal_eval
from dataclasses import dataclass, field, fields
from math import isfinite
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from fastplastic.cli.parsing import given
from fastplastic.cli.terminal import require_writable
from fastplastic.errors import FileError, InputError, no_such

STDOUT = Path("-")
_MODEL, _DATA, _SELECT, _OUTPUT = "Model", "Data and device", "Selection", "Output"


def _option(*names: str, panel: str, help: str, **more: Any) -> Any:
    return typer.Option(*names, rich_help_panel=panel, help=help, **more)


def _strings(*names: str, panel: str, help: str, metavar: str) -> Any:
    return _option(*names, panel=panel, help=help, metavar=metavar, show_default=False)


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which model, with which weights."""

    model: Annotated[str, typer.Argument(metavar="MODEL", help="Name of a timm model.")]
    pretrained: Annotated[
        bool | None,
        _option(
            "--pretrained/--no-pretrained",
            panel=_MODEL,
            help="Pretrained or random weights. (default: pretrained)",
        ),
    ] = None
    checkpoint: Annotated[
        Path | None,
        _option("--checkpoint", panel=_MODEL, metavar="FILE", help="Take the weights from FILE."),
    ] = None
    num_classes: Annotated[
        int | None,
        _option("--num-classes", panel=_MODEL, min=1, help="Give the model a head of this size."),
    ] = None
    in_chans: Annotated[
        int | None, _option("--in-chans", panel=_MODEL, min=1, help="Input channels of the model.")
    ] = None
    img_size: Annotated[
        int | None, _option("--img-size", panel=_MODEL, min=1, help="Side of the images in pixels.")
    ] = None
    input_size: Annotated[
        tuple[int, int, int] | None,
        _option("--input-size", panel=_MODEL, metavar="C H W", help="Size of the input."),
    ] = None
    model_kwargs: Annotated[
        list[str],
        _strings(
            "--model-kwargs", panel=_MODEL, metavar="KEY=VALUE...", help="More for the model."
        ),
    ] = field(default_factory=list)
    seed: Annotated[int, _option("--seed", panel=_MODEL, min=0, help="Seed of every draw.")] = 0

    def check(self) -> None:
        """Refuse what needs no model to be refused: InputError or FileError."""
        if self.checkpoint and self.pretrained:
            raise InputError("--pretrained and --checkpoint both name weights: give one of them")
        if self.checkpoint and not self.checkpoint.is_file():
            raise FileError(f"--checkpoint {self.checkpoint}: no such file: check the path")
        if self.input_size and min(self.input_size) < 1:
            size = " ".join(map(str, self.input_size))
            raise InputError(f"--input-size {size}: expected three numbers above 0: C H W")
        self.keywords()

    def keywords(self) -> dict[str, Any]:
        """Return --model-kwargs as values: Python literals, and text where they are none."""
        pairs = [pair.partition("=") for pair in self.model_kwargs]
        for (key, equals, _), pair in zip(pairs, self.model_kwargs, strict=True):
            if not (key.isidentifier() and equals):
                raise InputError(f"--model-kwargs {pair}: expected KEY=VALUE, as in drop_rate=0.1")
        return {key: _literal(value) for key, _, value in pairs}


@dataclass(frozen=True, kw_only=True)
class DataOptions(ModelOptions):
    """Which data to run through the model, and how."""

    data: Annotated[
        str,
        _option(
            "--data",
            panel=_DATA,
            metavar="DATA",
            help="Folder of class folders, timm dataset, 'sample' (Fashion-MNIST) or 'noise'.",
        ),
    ] = "sample"
    batches: Annotated[
        int, _option("--batches", panel=_DATA, min=1, help="Run at most this many batches.")
    ] = 16
    batch_size: Annotated[
        int, _option("-b", "--batch-size", panel=_DATA, min=1, help="Images in a batch.")
    ] = 16
    workers: Annotated[
        int, _option("-j", "--workers", panel=_DATA, min=0, help="Processes that load images.")
    ] = 0
    device: Annotated[
        str | None, _option("--device", panel=_DATA, help="As in torch. (default: cuda if there)")
    ] = None
    amp: Annotated[bool, _option("--amp", panel=_DATA, help="Run in mixed precision.")] = False
    amp_dtype: Annotated[
        Literal["bfloat16", "float16"],
        _option("--amp-dtype", panel=_DATA, help="The lower precision of --amp."),
    ] = "bfloat16"
    channels_last: Annotated[
        bool, _option("--channels-last", panel=_DATA, help="Use the channels_last memory layout.")
    ] = False
    quiet: Annotated[
        bool, _option("--quiet", "-q", panel=_OUTPUT, help="Print errors and warnings only.")
    ] = False


@dataclass(frozen=True, kw_only=True)
class ProfileOptions(DataOptions):
    """The options of `fastplastic profile`."""

    ranks: Annotated[
        bool, _option("--ranks", panel=_OUTPUT, help="Also show how many directions a layer uses.")
    ] = False
    json: Annotated[
        Path | None,
        _option("--json", panel=_OUTPUT, metavar="FILE|-", help="Write the profile as JSON."),
    ] = None
    force: Annotated[
        bool, _option("--force", panel=_OUTPUT, help="Overwrite a file that exists.")
    ] = False

    def check(self) -> None:
        """Refuse what needs no model to be refused: InputError or FileError."""
        super().check()
        if self.json and self.json != STDOUT:
            require_writable(self.json, force=self.force)


@dataclass(frozen=True, kw_only=True)
class SelectOptions(DataOptions):
    """Which units to re-initialise."""

    ratio: Annotated[
        float | None,
        _option("--ratio", panel=_SELECT, help="Take this share of the eligible units, in (0, 1]."),
    ] = None
    threshold: Annotated[
        float | None,
        _option("--threshold", panel=_SELECT, help="Take every unit beyond this score."),
    ] = None
    criterion: Annotated[
        str | None,
        _option(
            "--criterion",
            panel=_SELECT,
            metavar="NAME",
            help="The score that ranks them: see fastplastic list criteria. "
            "(default: dormant, of weights swr)",
        ),
    ] = None
    granularity: Annotated[
        Literal["unit", "weight"],
        _option("--granularity", panel=_SELECT, help="Take whole units, or single weights."),
    ] = "unit"
    scope: Annotated[
        Literal["global", "layer"],
        _option("--scope", panel=_SELECT, help="Rank over all layers, or take a share of each."),
    ] = "global"
    include: Annotated[
        list[str],
        _strings("--include", panel=_SELECT, metavar="PATTERN", help="Only layers like PATTERN."),
    ] = field(default_factory=list)
    exclude: Annotated[
        list[str],
        _strings("--exclude", panel=_SELECT, metavar="PATTERN", help="No layers like PATTERN."),
    ] = field(default_factory=list)
    max_layer_fraction: Annotated[
        float,
        _option("--max-layer-fraction", panel=_SELECT, help="Never more than this of a layer."),
    ] = 0.5

    def check(self) -> None:
        """Refuse what needs no model to be refused: InputError or FileError."""
        super().check()
        self.check_selection()

    def check_selection(self) -> None:
        """Refuse a selection that no model can fulfil: InputError."""
        if (self.ratio is None) == (self.threshold is None):
            given = "neither" if self.ratio is None else "both"
            raise InputError(
                f"{given} of --ratio and --threshold given: give one, for example --ratio 0.05"
            )
        if self.threshold is not None and not isfinite(self.threshold):
            raise InputError(f"--threshold {self.threshold}: expected a finite number")
        if self.criterion is not None:
            self._check_criterion(self.criterion)
        for name in ("ratio", "max_layer_fraction"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                flag = "--" + name.replace("_", "-")
                raise InputError(f"{flag} {value:g}: expected a share in (0, 1], for example 0.05")

    def _check_criterion(self, name: str) -> None:
        # Only here: the registry loads torch.
        from fastplastic.criteria import CRITERIA, WEIGHT_CRITERIA

        if name not in {**CRITERIA, **WEIGHT_CRITERIA}:
            names = dict.fromkeys([*CRITERIA, *WEIGHT_CRITERIA])
            raise InputError(f"--criterion: {no_such('criterion', name, names)}")
        known = CRITERIA if self.granularity == "unit" else WEIGHT_CRITERIA
        if name not in known:
            raise InputError(
                f"--criterion: criterion {name!r} is unknown for granularity "
                f"{self.granularity!r}, expected one of {', '.join(known)}"
            )


@dataclass(frozen=True, kw_only=True)
class PlanOptions(SelectOptions):
    """The options of `fastplastic plan`."""

    output: Annotated[
        Path | None,
        _option("-o", "--output", panel=_OUTPUT, metavar="FILE", help="Write the plan to FILE."),
    ] = None
    force: Annotated[
        bool, _option("--force", panel=_OUTPUT, help="Overwrite a file that exists.")
    ] = False

    def check(self) -> None:
        """Refuse what needs no model to be refused: InputError or FileError."""
        super().check()
        if self.output:
            masks = self.granularity == "weight"
            if masks != (self.output.suffix == ".safetensors"):
                raise InputError(
                    f"-o {self.output}: expected plan.json for units, plan.safetensors for single "
                    "weights, or other names that end so"
                )
            require_writable(self.output, force=self.force)


@dataclass(frozen=True, kw_only=True)
class ReinitOptions(SelectOptions):
    """The options of `fastplastic reinit`."""

    plan: Annotated[
        Path | None,
        _option(
            "--plan", panel=_SELECT, metavar="FILE", help="Apply this plan instead of making one."
        ),
    ] = None
    init: Annotated[
        Literal[
            "default", "kaiming_uniform", "kaiming_normal", "xavier_uniform", "trunc_normal",
            "empirical",
        ],
        _option("--init", panel=_SELECT, help="Distribution of the fresh incoming weights."),
    ] = "default"  # fmt: skip
    outgoing: Annotated[
        Literal["zero", "small", "fresh", "keep"],
        _option("--outgoing", panel=_SELECT, help="What becomes of the outgoing weights (README)."),
    ] = "zero"
    compensate: Annotated[
        bool,
        _option(
            "--compensate",
            panel=_SELECT,
            help="Add what the outgoing weights contributed on average to the biases.",
        ),
    ] = False
    recalibrate: Annotated[
        bool,
        _option(
            "--recalibrate",
            panel=_SELECT,
            help="Measure the running statistics of fresh BatchNorm channels on the data.",
        ),
    ] = False
    output: Annotated[
        Path | None,
        _option("-o", "--output", panel=_OUTPUT, metavar="FILE", help="Write safetensors weights."),
    ] = None
    dry_run: Annotated[
        bool, _option("--dry-run", panel=_OUTPUT, help="Show what would be done; write nothing.")
    ] = False
    force: Annotated[
        bool, _option("--force", panel=_OUTPUT, help="Overwrite a file; take non-finite weights.")
    ] = False

    def check(self) -> None:
        """Refuse what needs no model to be refused: InputError or FileError."""
        super().check()
        if self.output is None and not self.dry_run:
            raise InputError("no -o/--output: name a .safetensors file, or add --dry-run")
        if self.granularity == "weight" and self.outgoing != "zero":
            raise InputError(
                f"--outgoing {self.outgoing}: single weights have no outgoing ones: drop it"
            )
        for flag in ("compensate", "recalibrate"):
            if self.granularity == "weight" and getattr(self, flag):
                raise InputError(f"--{flag}: only for units, not for single weights: drop it")
        if self.compensate and self.outgoing not in ("zero", "small"):
            raise InputError(
                f"--compensate with --outgoing {self.outgoing}: expected zero or small: drop one"
            )
        if self.output and self.checkpoint and self.output.resolve() == self.checkpoint.resolve():
            raise InputError(f"-o {self.output} is the checkpoint itself: name another file")
        if self.output and self.output.suffix != ".safetensors":
            raise InputError(f"-o {self.output}: expected a name that ends in .safetensors")
        if self.output and not self.dry_run:
            require_writable(self.output, force=self.force)

    def check_selection(self) -> None:
        """Refuse a selection that no model can fulfil, or two of them: InputError."""
        if self.plan is None:
            return super().check_selection()
        own = {item.name for item in fields(SelectOptions)} - {f.name for f in fields(DataOptions)}
        other = sorted(own & given(self).keys())
        if other:
            flag = "--" + other[0].replace("_", "-")
            raise InputError(f"{flag} beside --plan: the plan already says which units: drop one")
        if not self.plan.is_file():
            raise FileError(f"--plan {self.plan}: no such file: make one with fastplastic plan")

    @property
    def needs_data(self) -> bool:
        """Whether data are read even if the plan is there already."""
        own = {item.name for item in fields(DataOptions)} - {f.name for f in fields(ModelOptions)}
        named = own & given(self).keys() - {"device", "quiet", "channels_last"}
        return self.plan is None or self.compensate or self.recalibrate or bool(named)


def _literal(text: str) -> object:
    try:
        return literal_eval(text)
    except (ValueError, SyntaxError):
        return text
