"""Examples of the documents that take no model of a hub, as they stand there."""

import re
from pathlib import Path

DOCS = Path(__file__).parent.parent / "docs"


def run(document: str) -> dict[str, object]:
    """Run the one example of a document; return its names."""
    (example,) = re.findall(r"```python\n(.*?)```", (DOCS / document).read_text(), re.DOTALL)
    names: dict[str, object] = {}
    exec(example, names)
    return names


def test_the_kernels_are_used_as_shown():
    names = run("kernels.md")
    assert sum(int(mask.sum()) for mask in names["masks"]) == 1000
    assert names["table"].shape == (9, 3072)
    assert [tuple(table.shape) for table in (names["rows"], names["columns"])] == [
        (8, 266),
        (6, 384),
    ]


def test_a_recycler_is_used_as_shown(capsys):
    recycler = run("training.md")["recycler"]
    assert recycler.steps == 300 and not recycler.skipped
    assert capsys.readouterr().out.startswith("[")
