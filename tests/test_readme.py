"""Examples of the documents that take no model of a hub, as they stand there."""

import re
from pathlib import Path

import torch

DOCS = Path(__file__).parent.parent / "docs"


def run(
    document: str, number: int = 0, known: dict[str, object] | None = None
) -> dict[str, object]:
    """Run an example of a document, behind others whose names are known; return its names."""
    examples = re.findall(r"```python\n(.*?)```", (DOCS / document).read_text(), re.DOTALL)
    names: dict[str, object] = dict(known or {})
    exec(examples[number], names)
    return names


def test_the_kernels_are_used_as_shown():
    names = run("kernels.md")
    assert sum(int(mask.sum()) for mask in names["masks"]) == 1000
    assert names["table"].shape == (9, 3072)
    assert [tuple(table.shape) for table in (names["rows"], names["columns"])] == [
        (8, 266),
        (6, 384),
    ]


def test_models_that_return_no_logits_are_used_as_shown():
    names = run("models.md")
    assert names["profile"].coverage.skipped == ()
    names = run("models.md", 1, names)
    assert any("could not be traced" in note for note in names["profile"].notes)


def test_a_recycler_is_used_as_shown(capsys):
    names = run("training.md")
    recycler = names["recycler"]
    assert recycler.steps == 300 and not recycler.skipped
    assert capsys.readouterr().out.startswith("[")
    before = [p.detach().clone() for p in names["model"].parameters()]
    names |= run("training.md", 2, names)
    head = names["model"][4].weight
    assert not torch.equal(names["model"][0].weight, before[0]) and torch.equal(head, before[4])


def test_a_recycler_in_a_loop_of_timm(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = run("training.md", 1)
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
