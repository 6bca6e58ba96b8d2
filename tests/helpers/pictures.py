"""Folders of small images, for tests of what reads them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image


def folder(
    path: Path, classes: Sequence[str] = ("a", "b", "c"), each: int = 8, first: int = 0
) -> Path:
    """Write images, each of one grey of its own."""
    for number, name in enumerate(classes):
        (path / name).mkdir(parents=True, exist_ok=True)
        for i in range(each):
            grey = (first + number * each + i) % 256
            Image.fromarray(np.full((20, 20), grey, np.uint8)).save(path / name / f"{i}.png")
    return path
