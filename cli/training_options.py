"""The options of `trial` and `finetune`: how to train, under timm's names."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastplastic.cli.engine_options import EngineOptions
from fastplastic.cli.options import ModelOptions
from fastplastic.cli.outputs import check_outputs, check_suffix
from fastplastic.cli.parsing import given, option, strings
from fastplastic.cli.selection_options import LayerChoice, Treatment, UnitSelection
from fastplastic.errors import FileError, InputError
from fastplastic.naming import ModelName

if TYPE_CHECKING:
    from fastplastic.sources import WantedSplits
    from fastplastic.trials import Arm, TrainSettings

_DATA, _TRAIN, _AUGMENT = "Data and device", "Training", "Augmentation"
_ARMS, _SELECT, _OUTPUT = "Arms", "Selection", "Output"


@dataclass(frozen=True, kw_only=True)
class TrainingOptions(ModelOptions):
    """Which data to train on, and how."""

    data: Annotated[
        str,
        option(
            "--data",
            panel=_DATA,
            metavar="DATA",
            help="Folder with train and val folders, or class folders; a timm dataset; 'sample'.",
        ),
    ]
    train_split: Annotated[
        str, option("--train-split", panel=_DATA, help="Split or folder to train on.")
    ] = "train"
    val_split: Annotated[
        str | None,
        option(
            "--val-split",
            panel=_DATA,
            metavar="NAME|SHARE",
            help="Split to test on, or a share of the training images. (default: a folder, or 0.2)",
        ),
    ] = None
    batch_size: Annotated[
        int, option("-b", "--batch-size", panel=_DATA, min=1, help="Training images in a batch.")
    ] = 32
    workers: Annotated[
        int, option("-j", "--workers", panel=_DATA, min=0, help="Processes that load images.")
    ] = 0
    epochs: Annotated[
        int, option("--epochs", panel=_TRAIN, min=1, help="Passes over the training images.")
    ] = 5
    opt: Annotated[str, option("--opt", panel=_TRAIN, help="Optimizer of timm.")] = "adamw"
    lr: Annotated[float, option("--lr", panel=_TRAIN, help="Learning rate.")] = 1e-3
    weight_decay: Annotated[
        float, option("--weight-decay", panel=_TRAIN, help="Not for norms and biases.")
    ] = 0.01
    momentum: Annotated[
        float, option("--momentum", panel=_TRAIN, help="Of optimizers that have one.")
    ] = 0.9
    layer_decay: Annotated[
        float | None,
        option("--layer-decay", panel=_TRAIN, help="Factor of the rate from layer to layer."),
    ] = None
    sched: Annotated[
        str, option("--sched", panel=_TRAIN, help="Schedule of timm; moves at every update.")
    ] = "cosine"
    warmup_epochs: Annotated[
        float, option("--warmup-epochs", panel=_TRAIN, help="Epochs of warm-up.")
    ] = 0
    warmup_lr: Annotated[
        float, option("--warmup-lr", panel=_TRAIN, help="Learning rate at its start.")
    ] = 1e-5
    min_lr: Annotated[float, option("--min-lr", panel=_TRAIN, help="Learning rate at the end.")] = (
        0.0
    )
    clip_grad: Annotated[
        float | None, option("--clip-grad", panel=_TRAIN, help="Largest norm of the gradient.")
    ] = None
    smoothing: Annotated[float, option("--smoothing", panel=_TRAIN, help="Label smoothing.")] = 0.0
    mixup: Annotated[float, option("--mixup", panel=_TRAIN, help="Alpha of mixup; 0 is off.")] = 0.0
    cutmix: Annotated[
        float, option("--cutmix", panel=_TRAIN, help="Alpha of cutmix; 0 is off.")
    ] = 0.0
    drop: Annotated[float | None, option("--drop", panel=_TRAIN, help="Dropout rate.")] = None
    drop_path: Annotated[
        float | None, option("--drop-path", panel=_TRAIN, help="Rate of stochastic depth.")
    ] = None
    amp: Annotated[bool, option("--amp", panel=_TRAIN, help="Train in mixed precision.")] = False
    amp_dtype: Annotated[
        Literal["bfloat16", "float16"],
        option("--amp-dtype", panel=_TRAIN, help="The lower precision of --amp."),
    ] = "bfloat16"
    evals: Annotated[
        int, option("--evals", panel=_TRAIN, min=1, help="Points of the curve after the start.")
    ] = 10
    profile_images: Annotated[
        int, option("--profile-images", panel=_TRAIN, min=1, help="Training images to profile.")
    ] = 256
    norms_first: Annotated[
        bool | None,
        option(
            "--norms-first/--no-norms-first",
            panel=_TRAIN,
            help="Measure BatchNorm anew before anything else. (default: where the head is new)",
        ),
    ] = None
    probe_first: Annotated[
        bool | None,
        option(
            "--probe-first/--no-probe-first",
            panel=_TRAIN,
            help="Fit the head before anything is measured. (default: where the head is new)",
        ),
    ] = None
    no_aug: Annotated[
        bool, option("--no-aug", panel=_AUGMENT, help="Only resize and normalise.")
    ] = False
    scale: Annotated[
        tuple[float, float],
        option(
            "--scale", panel=_AUGMENT, metavar="LOW HIGH", help="Share of the image to cut out."
        ),
    ] = (0.35, 1.0)
    hflip: Annotated[float, option("--hflip", panel=_AUGMENT, help="Probability of mirroring.")] = (
        0.5
    )
    vflip: Annotated[
        float, option("--vflip", panel=_AUGMENT, help="Probability of turning upside down.")
    ] = 0.0
    color_jitter: Annotated[
        float, option("--color-jitter", panel=_AUGMENT, help="Size of random changes of colour.")
    ] = 0.0
    aa: Annotated[
        str | None, option("--aa", panel=_AUGMENT, help="Policy such as rand-m9-mstd0.5.")
    ] = None
    reprob: Annotated[
        float, option("--reprob", panel=_AUGMENT, help="Probability of erasing a part.")
    ] = 0.0
    quiet: Annotated[
        bool, option("--quiet", "-q", panel=_OUTPUT, help="Print errors and warnings only.")
    ] = False
    force: Annotated[bool, option("--force", panel=_OUTPUT, help="Overwrite files that exist.")] = (
        False
    )

    def check(self) -> None:
        """Refuse what needs no model to be refused: InputError or FileError."""
        super().check()
        if self.data == "noise":
            raise InputError("--data noise: has no labels to learn: pass a folder of images")

    def settings(self, *, new_head: bool = True) -> "TrainSettings":
        """Return the budget; InputError for numbers that nothing can be trained with.

        Args:
            new_head: Whether the head is not that of the weights.
        """
        from fastplastic.trials import TrainSettings

        values = {item.name: getattr(self, item.name) for item in fields(TrainSettings)}
        for name in ("norms_first", "probe_first"):
            values[name] = new_head if values[name] is None else values[name]
        found = TrainSettings(**values)
        found.check()
        return found

    def splits(self, validation_share: float = 0.0) -> "WantedSplits":
        """Return how the data are to be split and augmented."""
        from fastplastic.sources import Augmentation, WantedSplits

        augmentation = Augmentation(
            no_aug=self.no_aug, scale=self.scale, hflip=self.hflip, vflip=self.vflip,
            color_jitter=self.color_jitter, auto_augment=self.aa, re_prob=self.reprob,
        )  # fmt: skip
        return WantedSplits(
            train_split=self.train_split, val_split=self.val_split,
            validation_share=validation_share, batch_size=self.batch_size, workers=self.workers,
            seed=self.seed, augmentation=augmentation,
        )  # fmt: skip

    def keywords(self) -> dict[str, Any]:
        """Return --model-kwargs as values, with --drop and --drop-path among them."""
        rates = {"drop_rate": self.drop, "drop_path_rate": self.drop_path}
        return super().keywords() | {name: rate for name, rate in rates.items() if rate is not None}


@dataclass(frozen=True, kw_only=True)
class TrialOptions(EngineOptions, LayerChoice, TrainingOptions):
    """The options of `fastplastic trial`."""

    arm: Annotated[
        list[str],
        strings(
            "--arm",
            panel=_ARMS,
            metavar="ARM",
            help="CRITERION@RATIO[:OPTION+OPTION...], recalibrate, remove, shrink-perturb or "
            "fresh; again for more. The baseline and a random control of each dose always run.",
        ),
    ] = field(default_factory=list)
    seeds: Annotated[
        int, option("--seeds", panel=_ARMS, help="Runs of every arm, from --seed on.")
    ] = 3
    results: Annotated[
        Path | None,
        option(
            "--results",
            panel=_OUTPUT,
            metavar="FILE",
            help="Keep finished runs here, to go on later. (default: trial-MODEL.jsonl)",
        ),
    ] = None
    json: Annotated[
        Path | None,
        option("--json", panel=_OUTPUT, metavar="FILE|-", help="Write the outcome as JSON."),
    ] = None
    plot: Annotated[
        Path | None,
        option("--plot", panel=_OUTPUT, metavar="FILE", help="Draw the curves: .png or .svg."),
    ] = None
    output: Annotated[
        Path | None,
        option(
            "-o",
            "--output",
            panel=_OUTPUT,
            metavar="FILE",
            help="Write the weights of the best arm by a validation split as safetensors.",
        ),
    ] = None
    choose_split: Annotated[
        float,
        option(
            "--choose-split", panel=_OUTPUT, help="Share of the training images to choose by (-o)."
        ),
    ] = 0.1

    def check(self) -> None:
        """Refuse what needs no model to be refused: InputError or FileError."""
        super().check()
        self.check_layers()
        self.check_engine(self.device)
        if self.seeds < 1:
            raise InputError(
                f"--seeds {self.seeds}: expected 1 or more; for an interval, 3 or more"
            )
        if not 0 < self.choose_split < 1:
            raise InputError(
                f"--choose-split {self.choose_split:g}: expected a share between 0 and 1"
            )
        check_suffix("--plot", self.plot, ".png", ".svg")
        check_suffix("-o", self.output, ".safetensors")
        inputs = [self.checkpoint, self.results_file]
        check_outputs([self.json, self.plot, self.output], force=self.force, inputs=inputs)
        if not self.results_file.exists():
            check_outputs([self.results_file], force=False)

    @property
    def results_file(self) -> Path:
        """Return where finished runs are kept."""
        return self.results or Path(f"trial-{ModelName.of(self.model).stem}.jsonl")

    def common(self) -> dict[str, object]:
        """Return what holds for every dose."""
        return {
            "include": tuple(self.include), "exclude": tuple(self.exclude), "scope": self.scope,
            "max_layer_fraction": self.max_layer_fraction,
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions(Treatment, LayerChoice, UnitSelection, TrainingOptions):
    """The options of `fastplastic finetune`."""

    reinit: Annotated[
        bool,
        option("--reinit/--no-reinit", panel=_SELECT, help="Re-initialise before training."),
    ] = True
    plan: Annotated[
        Path | None,
        option(
            "--plan", panel=_SELECT, metavar="FILE", help="Apply this plan instead of making one."
        ),
    ] = None
    arm: Annotated[
        str | None,
        option(
            "--arm",
            panel=_SELECT,
            metavar="ARM",
            help="All of it in one, as in trial: CRITERION@RATIO[:OPTION+OPTION...].",
        ),
    ] = None
    shrink: Annotated[
        float | None,
        option("--shrink", panel=_SELECT, help="Shrink all other weights but the head by this."),
    ] = None
    refit: Annotated[
        bool, option("--refit", panel=_SELECT, help="Fit the head once more after it.")
    ] = False
    json: Annotated[
        Path | None,
        option("--json", panel=_OUTPUT, metavar="FILE|-", help="Write the report as JSON."),
    ] = None
    output: Annotated[
        Path,
        option("-o", "--output", panel=_OUTPUT, metavar="FILE", help="Write safetensors weights."),
    ]

    def check(self) -> None:
        """Refuse what needs no model to be refused: InputError or FileError."""
        super().check()
        self._check_one_way()
        if self.plan and not self.plan.is_file():
            raise FileError(f"--plan {self.plan}: no such file: make one with fastplastic plan")
        if self._selected or (self._treated and not self.plan):
            self.check_selection()
        self.check_layers()
        self.check_treatment(self.granularity)
        if self.shrink is not None and not 0 <= self.shrink < 1:
            raise InputError(f"--shrink {self.shrink:g}: expected from 0 to less than 1, as 0.5")
        check_suffix("-o", self.output, ".safetensors")
        inputs = [self.checkpoint, self.plan]
        check_outputs([self.output, self.json], force=self.force, inputs=inputs)

    @property
    def _selected(self) -> list[str]:
        """Return the options that were given of those that say which units."""
        own = {item.name for item in (*fields(UnitSelection), *fields(LayerChoice))}
        return sorted(own & given(self).keys())

    @property
    def _treated(self) -> list[str]:
        """Return the options that were given of those that say what is done to them."""
        own = {item.name for item in fields(Treatment)} | {"shrink", "refit"}
        return sorted(own & given(self).keys())

    def _check_one_way(self) -> None:
        """Refuse two ways to say what is re-initialised: InputError."""
        both = [*self._selected, *self._treated]
        ways = {
            "--no-reinit": (not self.reinit, [*both, *["plan"] * bool(self.plan)]),
            "--arm": (self.arm is not None, [*both, *["plan"] * bool(self.plan)]),
            "--plan": (self.plan is not None, self._selected),
        }
        if not self.reinit and self.arm is not None:
            raise InputError("--arm beside --no-reinit: nothing is re-initialised: drop one")
        for way, (taken, others) in ways.items():
            if taken and others:
                flag = "--" + others[0].replace("_", "-")
                raise InputError(f"{flag} beside {way}: both say what is re-initialised: drop one")

    def treatment(self) -> "Arm":
        """Return what is done before training; where nothing is named, the default of `trial`."""
        from fastplastic.planning import DEFAULT_CRITERIA
        from fastplastic.trials import BASELINE, DEFAULT_ARMS, Arm, Dose, parse_arm

        if not self.reinit:
            return Arm(BASELINE)
        if self.arm is not None or not (self.plan or self._selected or self._treated):
            return parse_arm(self.arm or DEFAULT_ARMS[0])
        values = {item.name: getattr(self, item.name) for item in fields(Dose)}
        values |= {"include": tuple(self.include), "exclude": tuple(self.exclude)}
        values["criterion"] = self.criterion or DEFAULT_CRITERIA[self.granularity]
        # A plan has no dose that could be written in short.
        return Arm("reinit", Dose(**values), name=str(self.plan) if self.plan else "")
