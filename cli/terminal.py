"""Where output goes: data to stdout, everything else to stderr, progress to a terminal only."""

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from fastplastic.errors import FileError

if TYPE_CHECKING:
    from rich.console import Console

    from fastplastic.trials import Progress

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


def can_print(text: str, out: "Console") -> bool:
    """Tell whether the encoding of a console has these characters; many code pages have not."""
    try:
        text.encode(out.encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def printable(text: str) -> str:
    """Return a text in one line, without what a terminal would obey: names of files may have it."""
    line = " ".join(text.split())
    return "".join(x if x.isprintable() else x.encode("unicode_escape").decode() for x in line)


def warn(message: str) -> None:
    """Print one line on stderr that cannot be missed."""
    from rich.text import Text

    text = Text.assemble(("fastplastic: warning: ", "bold"), printable(message), style="red")
    console(sys.stderr).print(text, soft_wrap=True)


def say(message: str) -> None:
    """Print one line on stderr."""
    print(f"fastplastic: {message}", file=sys.stderr, flush=True)


def follow(out: "Console", command: str) -> None:
    """Print the command to type next, unbroken so that it can be copied; nothing for ""."""
    from rich.text import Text

    if command:
        out.print()
        out.print(Text.assemble(("next: ", "bold"), command), soft_wrap=True)


@contextmanager
def waiting(text: str, *, quiet: bool) -> Iterator[None]:
    """Say on a terminal what is being done, as long as it takes."""
    if quiet or not sys.stderr.isatty():
        yield
        return
    # A spinner of ASCII characters: all code pages have them.
    with console(sys.stderr).status(text, spinner="line"):
        yield


@contextmanager
def progress(
    total: int, *, quiet: bool, text: str = "profiling", before: str = ""
) -> Iterator[Callable[[int], None] | None]:
    """Give what to call with the number of batches done: None unless stderr is a terminal.

    `before` is what is done before the first batch is.
    """
    if quiet or not total or not sys.stderr.isatty():
        yield None
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    described = TextColumn("{task.description}")
    columns = (described, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console(sys.stderr), transient=True) as bar:
        task = bar.add_task(before or text, total=total)
        yield lambda done: bar.update(task, completed=done, description=text)


@contextmanager
def run_progress(*, quiet: bool) -> "Iterator[Callable[[Progress], None]]":
    """Give what to tell of a trial's progress: a bar on a terminal, else one line for each run."""
    if quiet:
        yield lambda state: None
        return
    if not sys.stderr.isatty():
        yield _say_run
        return
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
    with Bars(*columns, console=console(sys.stderr), transient=True) as bars:
        task = bars.add_task("loading", total=1.0)

        def tell(state: "Progress") -> None:
            left = "" if state.left is None else f", {_minutes(state.left)} left"
            text = f"run {min(state.done + 1, state.total)} of {state.total}: {state.arm}{left}"
            part = 0.0 if state.run else state.share
            bars.update(task, description=text, completed=(state.done + part) / state.total)

        yield tell


@contextmanager
def share_progress(*, quiet: bool) -> Iterator[Callable[[float], None]]:
    """Give what to tell of the share of a training that is done."""
    if quiet or not sys.stderr.isatty():
        yield lambda share: None
        return
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("training"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Bars(*columns, console=console(sys.stderr), transient=True) as bars:
        task = bars.add_task("training", total=1.0)
        yield lambda share: bars.update(task, completed=share)


def _say_run(state: "Progress") -> None:
    if state.run is None:
        return
    left = f", about {_minutes(state.left)} left" if state.left else ""
    end = f"{100 * state.run.accuracy[-1]:.1f} %"
    if state.run.diverged_at is not None:
        end = f"diverged at update {state.run.diverged_at}"
    text = f"run {state.done} of {state.total}: {state.arm}, seed {state.seed}: {end}{left}"
    print(text, file=sys.stderr, flush=True)


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds > 90 else f"{seconds:.0f} s"


class Counted:
    """Batches that say how many have been read, over all the times that they are read.

    Args:
        batches: What can be read again and again.
        done: Called with the number; None for nobody to tell.
    """

    def __init__(self, batches: Iterable[Any], done: Callable[[int], None] | None) -> None:
        self._batches, self._done = batches, done
        self._number = 0

    def __iter__(self) -> Iterator[Any]:
        for batch in self._batches:
            yield batch
            self._number += 1
            if self._done is not None:
                self._done(self._number)


def require_writable(path: Path, *, force: bool) -> None:
    """Raise FileError unless a file can be written at `path`."""
    if path.is_dir():
        raise FileError(f"cannot write {path}: it is a folder: name a file in it")
    if path.exists() and not force:
        raise FileError(f"{path} exists: give another name, or --force to overwrite it")
    if not path.parent.is_dir():
        raise FileError(f"cannot write {path}: there is no folder {path.parent}: make it first")
    if not os.access(path.parent, os.W_OK):
        raise FileError(f"cannot write {path}: no permission in {path.parent}: give another folder")
