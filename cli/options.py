"""The options of every command, as frozen dataclasses: timm's names wherever timm has one.

Nothing here imports torch: what can be refused is refused before anything slow starts.
"""

from ast import literal_eval
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from fastplastic.cli.gates import GateOptions
from fastplastic.cli.many_files import check_many_files, refuse_batches
from fastplastic.cli.outputs import (
    TORCH,
    check_in_place,
    check_outputs,
    check_suffix,
    is_same,
    require_folder,
)
from fastplastic.cli.parsing import given, option, strings
from fastplastic.cli.selection_options import LayerChoice, Treatment, UnitSelection
from fastplastic.errors import FileError, InputError
from fastplastic.files import sharded
from fastplastic.naming import ModelName

SortColumn = Literal["units", "reset", "dead", "frozen", "dormant", "sat", "h", "g"]
_MODEL, _DATA, _SELECT, _OUTPUT = "Model", "Data and device", "Selection", "Output"


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which model, with which weights, on which device."""

    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="timm name, torchvision:NAME, hf:FOLDER or package.module:factory.",
        ),
    ]
    pretrained: Annotated[
        bool | None,
        option(
            "--pretrained/--no-pretrained",
            panel=_MODEL,
            help="Pretrained or random weights. (default: pretrained)",
        ),
    ] = None
    checkpoint: Annotated[
        Path | None,
        option(
            "--checkpoint",
            panel=_MODEL,
            metavar="FILE",
            help="Take the weights from FILE, or a folder of many.",
        ),
    ] = None
    num_classes: Annotated[
        int | None,
        option("--num-classes", panel=_MODEL, min=1, help="Give the model a head of this size."),
    ] = None
    in_chans: Annotated[
        int | None, option("--in-chans", panel=_MODEL, min=1, help="Input channels of the model.")
    ] = None
    img_size: Annotated[
        int | None, option("--img-size", panel=_MODEL, min=1, help="Side of the images in pixels.")
    ] = None
    input_size: Annotated[
        tuple[int, int, int] | None,
        option("--input-size", panel=_MODEL, metavar="C H W", help="Size of the input."),
    ] = None
    model_kwargs: Annotated[
        list[str],
        strings("--model-kwargs", panel=_MODEL, metavar="KEY=VALUE...", help="More for the model."),
    ] = field(default_factory=list)
    seed: Annotated[int, option("--seed", panel=_MODEL, min=0, help="Seed of every draw.")] = 0
    device: Annotated[
        str | None, option("--device", panel=_DATA, help="As in torch. (default: cuda if there)")
    ] = None
    channels_last: Annotated[
        bool, option("--channels-last", panel=_DATA, help="Use the channels_last memory layout.")
    ] = False

    def check(self) -> None:
        """Refuse what needs no model to be refused: InputError or FileError."""
        if self.checkpoint and self.pretrained:
            raise InputError("--pretrained and --checkpoint both name weights: give one of them")
        if self.checkpoint and not self.checkpoint.exists():
            raise FileError(f"--checkpoint {self.checkpoint}: no such file: check the path")
        if self.checkpoint and not self.checkpoint.is_file():
            # A folder has to be one of a checkpoint.
            sharded(self.checkpoint)
        if self.input_size and min(self.input_size) < 1:
            size = " ".join(map(str, self.input_size))
            raise InputError(f"--input-size {size}: expected three numbers above 0: C H W")
        ModelName.of(self.model)
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
        option(
            "--data",
            panel=_DATA,
            metavar="DATA",
            help="Folder of class folders, timm dataset, 'sample' (Fashion-MNIST) or 'noise'; for "
            "texts a file.",
        ),
    ] = "sample"
    max_length: Annotated[
        int | None,
        option("--max-length", panel=_DATA, min=2, help="Tokens of a text. (default: 128)"),
    ] = None
    batches: Annotated[
        int, option("--batches", panel=_DATA, min=1, help="Run at most this many batches.")
    ] = 16
    batch_size: Annotated[
        int, option("-b", "--batch-size", panel=_DATA, min=1, help="Images in a batch.")
    ] = 16
    workers: Annotated[
        int, option("-j", "--workers", panel=_DATA, min=0, help="Processes that load images.")
    ] = 0
    amp: Annotated[bool, option("--amp", panel=_DATA, help="Run in mixed precision.")] = False
    amp_dtype: Annotated[
        Literal["bfloat16", "float16"],
        option("--amp-dtype", panel=_DATA, help="The lower precision of --amp."),
    ] = "bfloat16"
    quiet: Annotated[
        bool, option("--quiet", "-q", panel=_OUTPUT, help="Print errors and warnings only.")
    ] = False


@dataclass(frozen=True, kw_only=True)
class MeasureOptions(DataOptions):
    """How a profile is measured."""

    sample_positions: Annotated[
        int | None,
        option(
            "--sample-positions",
            panel=_DATA,
            metavar="K",
            min=1,
            help="Read large tensors at K positions, drawn at random. (default: everywhere)",
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class ProfileOptions(GateOptions, MeasureOptions):
    """The options of `fastplastic profile`."""

    layers: Annotated[
        bool, option("--layers", panel=_OUTPUT, help="Also show a table of all layers.")
    ] = False
    sort: Annotated[
        SortColumn | None,
        option("--sort", panel=_OUTPUT, help="Sort that table, largest first; h, g: mean sizes."),
    ] = None
    top: Annotated[
        int | None,
        option("--top", panel=_OUTPUT, metavar="N", min=1, help="Show N rows of it at most."),
    ] = None
    ranks: Annotated[
        bool, option("--ranks", panel=_OUTPUT, help="Also show how many directions a layer uses.")
    ] = False
    json: Annotated[
        Path | None,
        option("--json", panel=_OUTPUT, metavar="FILE|-", help="Write the profile as JSON."),
    ] = None
    csv: Annotated[
        Path | None,
        option("--csv", panel=_OUTPUT, metavar="FILE|-", help="Write a line for every layer."),
    ] = None
    html: Annotated[
        Path | None,
        option("--html", panel=_OUTPUT, metavar="FILE", help="Write a page to read and pass on."),
    ] = None
    plot: Annotated[
        Path | None,
        option("--plot", panel=_OUTPUT, metavar="FILE", help="Draw all layers: .png or .svg."),
    ] = None
    force: Annotated[
        bool, option("--force", panel=_OUTPUT, help="Overwrite a file that exists.")
    ] = False

    def check(self) -> None:
        """Refuse what needs no model to be refused: InputError or FileError."""
        super().check()
        check_suffix("--html", self.html, ".html", ".htm")
        check_suffix("--plot", self.plot, ".png", ".svg")
        outputs = [self.json, self.csv, self.html, self.plot]
        check_outputs(outputs, force=self.force, inputs=[self.checkpoint])


@dataclass(frozen=True, kw_only=True)
class SelectOptions(LayerChoice, UnitSelection, MeasureOptions):
    """Which units to re-initialise."""

    def check(self) -> None:
        """Refuse what needs no model to be refused: InputError or FileError."""
        super().check()
        self.check_selection()
        self.check_layers()


@dataclass(frozen=True, kw_only=True)
class PlanOptions(SelectOptions):
    """The options of `fastplastic plan`."""

    output: Annotated[
        Path | None,
        option("-o", "--output", panel=_OUTPUT, metavar="FILE", help="Write the plan to FILE."),
    ] = None
    force: Annotated[
        bool, option("--force", panel=_OUTPUT, help="Overwrite a file that exists.")
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
            check_outputs([self.output], force=self.force, inputs=[self.checkpoint])


@dataclass(frozen=True, kw_only=True)
class ReinitOptions(Treatment, SelectOptions):
    """The options of `fastplastic reinit`."""

    plan: Annotated[
        Path | None,
        option(
            "--plan", panel=_SELECT, metavar="FILE", help="Apply this plan instead of making one."
        ),
    ] = None
    output: Annotated[
        Path | None,
        option(
            "-o",
            "--output",
            panel=_OUTPUT,
            metavar="FILE",
            help="Write FILE.safetensors, or FILE.pth with all that --checkpoint holds; a folder "
            "where that is one.",
        ),
    ] = None
    in_place: Annotated[
        bool,
        option(
            "--in-place", panel=_OUTPUT, help="Write --checkpoint; the old one is kept as FILE.bak."
        ),
    ] = False
    dry_run: Annotated[
        bool, option("--dry-run", panel=_OUTPUT, help="Show what would be done; write nothing.")
    ] = False
    force: Annotated[
        bool, option("--force", panel=_OUTPUT, help="Overwrite a file; take non-finite weights.")
    ] = False

    def check(self) -> None:
        """Refuse what needs no model to be refused: InputError or FileError."""
        super().check()
        if self.many_files:
            self.check_treatment(self.granularity)
            if named := [x for x in ("compensate", "recalibrate") if getattr(self, x)] or (
                self._data_named if self.plan else []
            ):
                refuse_batches(f"--{named[0].replace('_', '-')}", self.many_files)
            return check_many_files(
                self.many_files, self.output, in_place=self.in_place, force=self.force
            )
        if self.in_place:
            check_in_place(self.checkpoint, self.output, force=self.force)
        elif self.output is None and not self.dry_run:
            raise InputError("no -o/--output: name a .safetensors file, or add --dry-run")
        self.check_treatment(self.granularity)
        if self.output and is_same(self.output, self.checkpoint):
            raise InputError(
                f"-o {self.output} is the checkpoint itself: name another file, or pass --in-place "
                "instead, which keeps the old one"
            )
        if self.writes_folder:
            assert self.output is not None
            return require_folder(self.output, force=self.force or self.dry_run)
        check_suffix("-o", self.output, ".safetensors", *TORCH)
        if self.folder_read and self.output and self.output.suffix != ".safetensors":
            raise InputError(
                f"-o {self.output}: one file with all that a folder holds cannot be written: pass "
                "-o with the name of a folder, or with one that ends in .safetensors, for the "
                "weights alone"
            )
        if not self.dry_run:
            check_outputs([self.output], force=self.force, inputs=[self.plan])

    @property
    def folder_read(self) -> Path | None:
        """The folder of many files (or their index) that the weights are read from, if any."""
        if self.checkpoint is not None:
            return self.checkpoint if sharded(self.checkpoint) else None
        if ModelName.of(self.model).kind != "folder" or self.num_classes is not None:
            return None
        # Where the model is measured, it is in memory anyway.
        folder = Path(ModelName.of(self.model).rest).expanduser()
        listed = (folder / "model.safetensors.index.json").is_file()
        single = (folder / "model.safetensors").is_file()
        return folder if listed and not single and self.plan and not self.needs_data else None

    @property
    def many_files(self) -> Path | None:
        """The same where a folder is written: file by file, without the weights in memory."""
        one = self.output is not None and self.output.name.endswith((".safetensors", *TORCH))
        return None if self.dry_run or one or not self._folder_named else self.folder_read

    @property
    def _folder_named(self) -> bool:
        return self.output is not None or (self.in_place and self.checkpoint is not None)

    @property
    def target(self) -> Path | None:
        """The file to write, if any."""
        return self.checkpoint if self.in_place else self.output

    @property
    def writes_folder(self) -> bool:
        """Whether the output is a folder like that of the model."""
        folder = ModelName.of(self.model).kind == "folder" and not (
            self.checkpoint and sharded(self.checkpoint)
        )
        return folder and self.output is not None and self.output.suffix not in (
            ".safetensors", *TORCH
        )  # fmt: skip

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
        return self.plan is None or self.compensate or self.recalibrate or bool(self._data_named)

    @property
    def _data_named(self) -> list[str]:
        own = {item.name for item in fields(DataOptions)} - {f.name for f in fields(ModelOptions)}
        return sorted(own & given(self).keys() - {"device", "quiet", "channels_last"})


def _literal(text: str) -> object:
    try:
        return literal_eval(text)
    except (ValueError, SyntaxError):
        return text
