"""Every Python snippet of the README and of docs is run as it stands, page by page."""

import ast
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import timm
import torch
from helpers.documents import PAGES, Block, blocks, replace_models
from safetensors.torch import save_file

# Sides of images, and the smaller ones that they are run with.
SMALLER = "224, 224", "32, 32"
# What snippets load, and what else has to be installed for it. CI has all of it; elsewhere these
# snippets are only parsed.
FRAMEWORKS = {
    "lightning": "lightning",
    "accelerate": "accelerate",
    "fastplastic.integrations.transformers": "accelerate",
    "fastplastic.integrations.lightning": "lightning",
    "torch.utils.tensorboard": "tensorboard",
}
# Pages whose frameworks warn of things that a reader may leave as they are.
WARNED = {
    "docs/checkpoints.md": "torch saves in this process alone",
    "docs/howto/lightning.md": "few workers, and an old name of torch's",
    "docs/howto/hugging-face.md": "memory cannot be pinned without an accelerator",
}
# Pages with a test of their own.
LOOKED_AT = ("docs/kernels.md", "docs/training.md", "docs/plain-pytorch.md")


def python_of(page: str) -> list[Block]:
    return [block for block in blocks(page) if block.language == "python"]


WITH_PYTHON = [page for page in PAGES if python_of(page)]


def lacks(block: Block) -> bool:
    """Tell whether a snippet loads a framework that is not installed."""
    loaded = {
        name
        for node in ast.walk(ast.parse(block.text))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in (
            [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else [alias.name.partition(".")[0] for alias in node.names]
        )
    }
    needed = {what for name, what in FRAMEWORKS.items() if name in loaded}
    return any(find_spec(name) is None for name in needed)


def snippets(page: str) -> Iterator[dict[str, object]]:
    """Run the snippets of a page one after the other, and give their names after each."""
    names: dict[str, object] = {"__name__": "snippet"}
    for block in python_of(page):
        text = block.text.replace(*SMALLER)
        # Line numbers of the page, for tracebacks.
        code = compile("\n" * block.line + text, page, "exec")
        if not lacks(block):
            exec(code, names)
        yield names


@pytest.fixture(autouse=True)
def workplace(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Go to an empty folder, with small models in the place of large ones."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    replace_models(monkeypatch)
    torch.manual_seed(0)


@pytest.fixture
def fresh_accelerator() -> Iterator[None]:
    """Accelerate keeps its settings for the whole process."""
    yield
    if find_spec("accelerate"):
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("page", [page for page in WITH_PYTHON if page not in LOOKED_AT])
def test_the_snippets_of_a_page_run(page, capfd, fresh_accelerator):
    # What the command before it wrote.
    tuned = timm.create_model("tf_efficientnet_lite0", num_classes=10).state_dict()
    save_file(tuned, "tuned.safetensors")
    with warnings.catch_warnings():
        if page in WARNED:
            warnings.simplefilter("ignore")
        assert len(list(snippets(page))) == len(python_of(page))


def test_plain_pytorch_finds_the_units_that_it_killed(capsys):
    (names,) = snippets("docs/plain-pytorch.md")
    assert names["plan"].count == 8
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "tensor(8) dead units" and lines[-1] == "tensor(0) dead units"


def test_the_kernels_are_used_as_shown():
    *_, names = snippets("docs/kernels.md")
    assert sum(int(mask.sum()) for mask in names["masks"]) == 1000
    assert names["table"].shape == (9, 3072)
    assert [tuple(table.shape) for table in (names["rows"], names["columns"])] == [
        (8, 266),
        (6, 384),
    ]


def test_shards_are_drawn_as_the_whole_weight():
    *_, names = snippets("docs/kernels.md")
    whole = torch.empty(256, 512)
    names["resample_"]([whole], ["head"], [names["Law"]("normal", 0.0, 0.02)])
    assert torch.equal(names["weight"], whole)


def test_a_recycler_is_used_as_shown(capsys):
    parts = snippets("docs/training.md")
    recycler = next(parts)["recycler"]
    assert recycler.steps == 300 and not recycler.skipped
    assert capsys.readouterr().out.startswith("[")
    next(parts)
    assert Path("resets.png").stat().st_size
    in_a_loop_of_timm(dict(next(parts)), capsys)
    next(parts)
    assert find_spec("tensorboard") is None or list(Path("runs").iterdir())
    names = next(parts)
    before = names["pull"].state_dict()
    now = names["model"].state_dict()
    # The head is left out of both.
    assert not torch.equal(now["0.weight"], before["0.weight"])
    assert torch.equal(now["2.weight"], before["2.weight"])


def in_a_loop_of_timm(names, capsys):
    recycler, ema = names["recycler"], names["ema"]
    # Four batches an epoch, and the schedule's epochs of cooling down.
    assert recycler.steps == 4 * names["epochs"] and not recycler.skipped
    assert capsys.readouterr().out.startswith("[Reset(step 4: ")
    saved = torch.load("last.pt", weights_only=True)
    assert saved["recycler"]["steps"] == recycler.steps
    last = recycler.log[-1]
    assert last.step == recycler.steps
    for name, units in last.units.items():
        fresh = names["model"].get_parameter(f"{name}.weight")[units]
        moved = ema.module.get_parameter(f"{name}.weight")[units]
        # The average was moved on before the reset of the last step, which it shares.
        assert torch.equal(moved, fresh)
