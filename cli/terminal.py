"""Where output goes: data to stdout, everything else to stderr, progress to a terminal only."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import Console

# A pipe or a file has no width: enough for every column, and lines that can still be read.
_WIDTH_OF_A_PIPE = 120


def console(stream: TextIO) -> "Console":
    """Return a rich console on `stream` that knows the width, NO_COLOR and whether it is a pipe."""
    from rich.console import Console

    terminal = stream.isatty() or "COLUMNS" in os.environ
    return Console(
        file=stream,
        width=None if terminal else _WIDTH_OF_A_PIPE,
        highlight=False,
        emoji=False,
    )


def warn(message: str) -> None:
    """Print one line on stderr that cannot be missed."""
    from rich.text import Text

    text = Text.assemble(("fastplastic: warning: ", "bold"), message, style="red")
    console(sys.stderr).print(text, soft_wrap=True)


def follow(out: "Console", command: str) -> None:
    """Print the command to type next, unbroken so that it can be copied; nothing for ""."""
    from rich.text import Text

    if command:
        out.print()
        out.print(Text.assemble(("next: ", "bold"), command), soft_wrap=True)


@contextmanager
def progress(total: int, *, quiet: bool) -> Iterator[Callable[[int], None] | None]:
    """Give what to call with the number of batches done: None unless stderr is a terminal."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("profiling"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console(sys.stderr), transient=True) as bar:
        task = bar.add_task("profiling", total=total)
        yield lambda done: bar.update(task, completed=done)
