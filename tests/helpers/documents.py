"""What the tests of the pages share: their blocks, and small things in the place of large ones."""

import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from markdown_it import MarkdownIt
from safetensors.torch import save_file
from timm.models.resnet import Bottleneck

from fastplastic.sources.hub import Source
from helpers.folders import save_folder_model, write_texts
from helpers.many_files import save_sharded
from helpers.pictures import folder

REPOSITORY = Path(__file__).parents[2]
PAGES = [
    "README.md",
    *sorted(str(path.relative_to(REPOSITORY)) for path in REPOSITORY.glob("docs/**/*.md")),
]
# The folder of images that the pages call DIR: three classes of eight images.
# (A file of options names its own.)
IMAGES, CLASSES = ("DIR", "photos"), ("a", "b", "c")
# Models that the pages name, and the small ones that are made in their place. They have the same
# names of layers as far as the pages use them.
STAND_INS: dict[str, Callable[..., torch.nn.Module]] = {
    "resnet50": partial(
        timm.create_model, "test_resnet", block=Bottleneck, layers=(1, 1, 1, 3), channels=(8,) * 4
    ),
    "tf_efficientnet_lite0": partial(timm.create_model, "test_efficientnet"),
}
# What makes commands shorter and changes nothing else: these are put behind what a page says.
_LOOK = "--img-size 32 --batches 2 -b 4 --quiet"
_TRAIN = "--img-size 32 --epochs 1 --evals 1 --profile-images 8 -b 16 --quiet"
_TEXTS = "--batches 2 -b 4"
SHORTER = {
    "profile": _LOOK,
    "plan": _LOOK,
    "reinit": _LOOK,
    "trial": f"{_TRAIN} --seeds 1",
    "finetune": _TRAIN,
}


def shorter(words: list[str]) -> list[str]:
    """Return what is put behind a command of the program."""
    if "step-1000" in words and "--plan" in words:
        return ["--quiet"]
    if "hf:my-bert" not in words:
        return SHORTER.get(words[1], "").split()
    return ["--quiet", *(_TEXTS.split() if "--data" in words else ())]


# Files that a page takes as given, and what makes them.
_TUNED = {"model": "resnet50", "num_classes": len(CLASSES)}
_LITE = {"model": "tf_efficientnet_lite0", "num_classes": 1000}
_LARGE = {"model": "resnet50", "num_classes": 1000}
GIVEN = {
    "README.md": {"lite0.safetensors": _LITE},
    "docs/tutorial.md": {"lite0.safetensors": _LITE},
    "docs/checkpoints.md": {"step-1000": _LARGE},
    "docs/howto/timm.md": {"resnet50-tuned.safetensors": _TUNED},
    "docs/reports.md": {"resnet50-tuned.safetensors": _TUNED},
}

# Folders of Hugging Face models, and the texts beside them.
FOLDERS = {"docs/models.md": {"my-bert": "classifier"}}
TEXTS = "reviews.jsonl"


@dataclass(frozen=True)
class Block:
    """One block of code on a page.

    Attributes:
        page: Path of the page in the repository.
        line: Where it begins.
        language: What is behind the fence; "" for an indented block.
        text: Its lines.
    """

    page: str
    line: int
    language: str
    text: str


def _text(page: str) -> str:
    return (REPOSITORY / page).read_text()


def blocks(page: str) -> list[Block]:
    """Return all blocks of code on a page, in their order."""
    return [
        Block(page, token.map[0] + 1, token.info.strip(), token.content)
        for token in MarkdownIt().parse(_text(page))
        if token.type in ("fence", "code_block")
    ]


def links(page: str) -> list[str]:
    """Return where all links and pictures of a page lead."""
    inside = [token.children or [] for token in MarkdownIt().enable("table").parse(_text(page))]
    found = [child.attrs.get("href", child.attrs.get("src")) for each in inside for child in each]
    return [str(link) for link in found if link]


def commands(page: str) -> Iterator[list[str]]:
    """Return the commands of a page as words, in their order; of a workflow, the program's."""
    for block in blocks(page):
        lines = block.text.replace("\\\n", " ").splitlines()
        if block.language == "yaml":
            lines = [line for line in lines if line.lstrip().startswith("fastplastic ")]
        elif block.language != "sh":
            continue
        for line in lines:
            words = shlex.split(line, comments=True)
            while "&&" in words:
                at = words.index("&&")
                yield words[:at]
                words = words[at + 1 :]
            if words:
                yield words


def apply_changes(page: str, folder: Path) -> list[str]:
    """Apply the changes that a page shows to a copy; return the files that they are of.

    A change begins with "+++ FILE", and each of its parts with "@@".
    """
    changed = []
    for block in blocks(page):
        if block.language == "diff":
            for change in block.text.split("+++ ")[1:]:
                file, *parts = change.split("@@\n")
                changed.append(file.strip())
                for part in parts:
                    _apply(part, folder / changed[-1])
    return changed


def _apply(part: str, file: Path) -> None:
    lines = part.splitlines(keepends=True)
    old = "".join(line[1:] for line in lines if not line.startswith("+")).rstrip("\n")
    new = "".join(line[1:] for line in lines).rstrip("\n")
    if not old:
        assert not file.exists(), file
        file.write_text(f"{new}\n")
        return
    text = file.read_text()
    assert text.count(old) == 1, (file, old)
    file.write_text(text.replace(old, new))


def replace_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have timm make the small models in the place of those that the pages name.

    Their random weights are taken for those of the hub.
    """
    monkeypatch.setattr("fastplastic.sources.models.find_weights", Source)
    entries = timm.models._registry._model_entrypoints
    for name, make in STAND_INS.items():

        def entry(pretrained: bool = False, make: Any = make, **options: Any) -> torch.nn.Module:
            # What says where the weights of the large one are.
            for key in ("pretrained_cfg", "pretrained_cfg_overlay"):
                options.pop(key, None)
            return make(**options)

        monkeypatch.setitem(entries, name, entry)


def prepare(page: str, where: Path) -> None:
    """Write the images and files that a page takes as given, and the files of options it shows."""
    for name in IMAGES:
        folder(where / name, CLASSES)
    for block in blocks(page):
        if block.language == "toml":
            # Its first line says which file it is; there is no GPU where it asks for one.
            text = block.text.replace('device = "cuda"', 'device = "cpu"')
            (where / text.splitlines()[0].removeprefix("# ")).write_text(text)
    for name, kind in FOLDERS.get(page, {}).items():
        save_folder_model(where / name, kind)
        write_texts(where / TEXTS)
    for name, options in GIVEN.get(page, {}).items():
        model = timm.create_model(options["model"], num_classes=options["num_classes"])
        if Path(name).suffix:
            save_file(model.state_dict(), where / name)
        else:
            save_sharded(where / name, model.state_dict())
