"""Worked examples of every command, shown by --help; a test reads each as the program does."""

import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from typer.core import TyperCommand, TyperGroup

from fastplastic.cli.terminal import console

# What it is for, and what to type: short enough for a terminal of 80 columns.
Example = tuple[str, str]

EXAMPLES: Mapping[str, Sequence[Example]] = {
    "profile": (
        ("Where has it lost plasticity, on your images?", "profile resnet50 --data DIR"),
        (
            "Your own weights; all layers, those with most dead units first.",
            "profile resnet50 --checkpoint my.pth --data DIR --sort dead",
        ),
        (
            "For programs, and a page to pass on (pip install 'fastplastic[report]').",
            "profile resnet50 --data DIR --json before.json --html before.html",
        ),
        (
            "In CI: exit code 4 if more than 5 % of all units are dead.",
            "profile resnet50 --data DIR --quiet --fail-if 'dead>5%'",
        ),
    ),
    "compare": (
        ("What changed from one profile (--json) to the other?", "compare before.json after.json"),
        (
            "Over the epochs of a training, all layers, and as a page to pass on.",
            "compare epoch1.json epoch2.json epoch3.json --layers --html changes.html",
        ),
        (
            "In CI: exit code 4 if more than 5 % of all units are dead in the last.",
            "compare before.json after.json --quiet --fail-if 'dead>5%'",
        ),
        (
            "Or if the share of dormant units of a layer in layer4 rose by over 0.1.",
            "compare before.json after.json --fail-if 'change:layer4.*:dormant>0.1'",
        ),
    ),
    "plan": (
        ("Look at the 5 % of all units that would be taken.", "plan resnet50 --ratio 0.05"),
        (
            "Write the plan for reinit; only units of the last stage.",
            "plan resnet50 --data DIR --ratio 0.05 --include 'layer4.*' -o plan.json",
        ),
        (
            "Units by a score instead of a share: what the source calls dormant.",
            "plan resnet50 --data DIR --criterion dormant --threshold 0.025",
        ),
        (
            "Single weights instead of units.",
            "plan resnet50 --granularity weight --ratio 0.05 -o plan.safetensors",
        ),
    ),
    "reinit": (
        ("Apply a plan.", "reinit resnet50 --plan plan.json -o resnet50-fresh.safetensors"),
        (
            "Only look: profile, plan, and say what would be written.",
            "reinit resnet50 --data DIR --ratio 0.05 --dry-run",
        ),
        (
            "Keep the outputs as they are on average, and measure BatchNorm anew.",
            "reinit resnet50 --data DIR --ratio 0.05 --compensate --recalibrate -o a.safetensors",
        ),
    ),
    "trial": (
        (
            "Does the usual dose of re-initialisation help on your task?",
            "trial resnet50 --data DIR",
        ),
        (
            "Two doses and two rivals, five seeds each; the curves as a picture.",
            "trial resnet50 --data DIR --arm dormant@0.3:zero+compensate --arm swr@0.05 "
            "--arm remove --arm shrink-perturb --seeds 5 --plot curves.png",
        ),
        (
            "Train as you do, and keep the weights of the best arm.",
            "trial resnet50 --data DIR --epochs 20 --lr 5e-4 --mixup 0.2 -o best.safetensors",
        ),
        (
            "Two runs at once on each GPU of a Ray cluster.",
            "trial resnet50 --data DIR --engine ray --address auto --gpus-per-run 0.5",
        ),
    ),
    "finetune": (
        (
            "Re-initialise by the usual dose, train, and write the weights.",
            "finetune resnet50 --data DIR -o tuned.safetensors",
        ),
        (
            "A dose of your own.",
            "finetune resnet50 --data DIR --ratio 0.3 --compensate -o tuned.safetensors",
        ),
        (
            "Only train, to have something to compare it with.",
            "finetune resnet50 --data DIR --no-reinit -o plain.safetensors",
        ),
    ),
    "explain": (
        ("Why can its units be reset, or not?", "explain resnet50 layer1.0.conv3"),
        (
            "Of a model with another head, for programs.",
            "explain vit_tiny_patch16_224 blocks.0.mlp.fc1 --num-classes 10 --json",
        ),
    ),
    "list": (
        ("What can --criterion be?", "list criteria"),
        ("Names of models.", "list models 'resnet*'"),
        ("Laws of --init, for programs.", "list initializers --json"),
    ),
}
# What stands under --help of the program: the way from a profile to a fine-tuned model.
WAY: Sequence[Example] = (
    EXAMPLES["profile"][0],
    ("What changed between two profiles?", EXAMPLES["compare"][0][1]),
    (
        "Choose 5 % of the units.",
        "plan resnet50 --ratio 0.05 -o plan.json",
    ),
    ("Write weights that are fresh there.", EXAMPLES["reinit"][0][1]),
    EXAMPLES["trial"][0],
    ("Train with it.", EXAMPLES["finetune"][0][1]),
    EXAMPLES["explain"][0],
    EXAMPLES["list"][0],
    ("Options from a file (docs/reports.md).", "profile --config exp.toml"),
)
_WIDTH = 80
# An option stays with its value.
_PARTS = re.compile(r" (?=-)")


class CommandWithExamples(TyperCommand):
    """A command whose help ends with its examples, as they are to be typed."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help, then the examples."""
        super().format_help(ctx, formatter)
        _show(EXAMPLES[str(self.name)])


class ProgramWithExamples(TyperGroup):
    """The program, whose help ends with the way through its commands."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help, then the examples."""
        super().format_help(ctx, formatter)
        _show(WAY)


def _show(examples: Sequence[Example]) -> None:
    from rich.text import Text

    out = console(sys.stdout)
    # Not as typer's epilog, whose lines are wrapped, or joined, or set apart, version by version.
    out.print(Text(" Examples", style="bold"))
    for purpose, command in examples:
        out.print(Text(f"\n   # {purpose}", style="dim"), soft_wrap=True)
        out.print(Text("\n".join(lines_of(command))), soft_wrap=True)


def lines_of(command: str) -> list[str]:
    """Return a command in lines that fit, each but the last ending as a shell wants it."""
    lines, line = [], "   fastplastic"
    for part in _PARTS.split(command):
        if len(f"{line} {part} \\") > _WIDTH:
            lines.append(f"{line} \\")
            line = f"       {part}"
        else:
            line = f"{line} {part}"
    return [*lines, line]
