"""Examples of the README that take no model of a hub."""

import re
from pathlib import Path

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_kernels_are_used_as_shown():
    (example,) = re.findall(r"## Kernels\n.*?```python\n(.*?)```", README, re.DOTALL)
    names: dict[str, object] = {}
    exec(example, names)
    assert sum(int(mask.sum()) for mask in names["masks"]) == 1000
    assert names["table"].shape == (9, 3072)
    assert [tuple(table.shape) for table in (names["rows"], names["columns"])] == [
        (8, 266),
        (6, 384),
    ]
