"""How a command came out in several processes: each tells the first one, which says it once."""

import json
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

# Seconds that one waits which is done: for the others, and for the first one, which may be writing;
# and one that has failed. And between two looks.
_DONE, _WRITING, _FAILED, _BETWEEN = 600.0, 3600.0, 5.0, 0.02
# Exit codes above are those of signals.
SIGNALS = 128

Say = Callable[[str], None]


@dataclass(frozen=True)
class Outcome:
    """How a command came out.

    Attributes:
        code: Exit code.
        lines: What went wrong, to be printed.
        follows: Whether it went wrong only since another process failed.
    """

    code: int
    lines: tuple[str, ...] = ()
    follows: bool = False

    @classmethod
    def read(cls, text: str) -> "Outcome":
        """Return what `written` gave."""
        code, lines, follows = json.loads(text)
        return cls(code, tuple(lines), follows)

    def written(self) -> str:
        """Return it as a text to be sent."""
        return json.dumps([self.code, self.lines, self.follows])

    def of(self, *ranks: int) -> "Outcome":
        """Return the same with the numbers of the processes in each line."""
        names = ", ".join(map(str, ranks))
        return Outcome(self.code, tuple(f"process {names}: {line}" for line in self.lines))

    def say(self, say: Say) -> None:
        """Print the lines."""
        for line in self.lines:
            say(line)


def verdict(outcomes: Mapping[int, Outcome | None]) -> Outcome:
    """Return how a command came out as a whole.

    Args:
        outcomes: By the number of the process, that of the first one before the others; None of a
            process of which nothing was heard.
    """
    failed = {rank: own for rank, own in outcomes.items() if own is not None and own.code}
    causes = {rank: own for rank, own in failed.items() if not own.follows}
    gone = [str(rank) for rank, own in outcomes.items() if own is None]
    if gone and not causes:
        text = f"process {', '.join(gone)} ended without a word: see what torchrun says of it"
        return Outcome(1, (text,))
    if not causes:
        # They differ from each other: all say the same.
        return next(iter(failed.values()), Outcome(0))
    by_lines: dict[tuple[str, ...], list[int]] = {}
    for rank, own in causes.items():
        by_lines.setdefault(own.lines, []).append(rank)
    # What the first one says, too, is said as if it were alone.
    parts = [
        causes[ranks[0]] if 0 in ranks else causes[ranks[0]].of(*ranks)
        for ranks in by_lines.values()
    ]
    return Outcome(parts[0].code, tuple(line for part in parts for line in part.lines))


def settle(own: Outcome, store: Any, rank: int, size: int, say: Say) -> Outcome:
    """Return how a command came out in all processes; the first one says what went wrong.

    Args:
        own: How it came out in this one.
        store: Of torch.distributed, which all of them share.
        rank: Number of this process.
        size: Number of processes.
        say: Prints a line.
    """
    with suppress(RuntimeError):
        store.set(f"outcome {rank}", own.written())
    if own.code >= SIGNALS:
        # Who interrupts one interrupts all: nobody waits.
        if rank == 0:
            own.say(say)
        return own
    if rank:
        return _follow(own, store, rank, say)
    until = time.monotonic() + (_FAILED if own.code else _DONE)
    texts = {other: _heard(store, f"outcome {other}", until) for other in range(1, size)}
    heard = {other: None if text is None else Outcome.read(text) for other, text in texts.items()}
    whole = verdict({0: own, **heard})
    whole.say(say)
    with suppress(RuntimeError):
        store.set("end", whole.written())
    # The store may end with this process, and they have to read it.
    until = time.monotonic() + _FAILED
    for other in [other for other, its in heard.items() if its and its.code < SIGNALS]:
        _heard(store, f"left {other}", until)
    return whole


def _follow(own: Outcome, store: Any, rank: int, say: Say) -> Outcome:
    """Return what the first process makes of it; without that one, say it here."""
    # The first one hears all others before.
    text = _heard(store, "end", time.monotonic() + (2 * _FAILED if own.code else _WRITING))
    if text is None:
        own = own if own.code else Outcome(1, ("process 0 did not come to its end",))
        own.of(rank).say(say)
        return own
    with suppress(RuntimeError):
        store.set(f"left {rank}", "")
    return Outcome.read(text)


def _heard(store: Any, key: str, until: float) -> str | None:
    """Return what a process has told, or None when it does not come in time."""
    try:
        # Not by `wait`, which sees no Ctrl-C, and tells the user of torch's sockets in the end.
        while not store.check([key]):
            if time.monotonic() > until:
                return None
            time.sleep(_BETWEEN)
        return str(store.get(key).decode())
    except RuntimeError:  # the store is gone
        return None
