"""Draw what the program printed on a terminal, as the picture of the README.

What this draws is printed by `COMMAND` with FORCE_COLOR=1 and COLUMNS=100:

    ... | python docs/picture.py docs/images/profile.svg
"""

import io
import sys
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import DIMMED_MONOKAI
from rich.text import Text

WIDTH = 100
COMMAND = "fastplastic profile tf_efficientnet_lite0 --checkpoint lite0.safetensors --img-size 64"
# What follows in the report is the fine print: how it was measured.
LAST = "Bars: "


def draw(printed: str) -> str:
    """Return an SVG of a terminal with the beginning of a report."""
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True)
    console.print(Text(f"$ {COMMAND}", style="bold"))
    for line in printed.splitlines():
        text = Text.from_ansi(line)
        if text.plain.startswith(LAST):
            break
        console.print(text, no_wrap=True, crop=True)
    return console.export_svg(title="fastplastic", theme=DIMMED_MONOKAI)


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(draw(sys.stdin.read()))
