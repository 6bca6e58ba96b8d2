"""The file of results: a line of settings, then one line of JSON for each finished run.

A line is appended and synced when its run is done, so a kill at any moment costs the run that was
going on and nothing else. A last line that was cut off is taken away when the file is opened.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from fastplastic.errors import FileError
from fastplastic.files import plain
from fastplastic.trials.lines import check_run, entry_of
from fastplastic.trials.settings import differences

_VERSION = 1
_KEY = "fastplastic_trial"
_KEPT = "finished runs are kept"


@dataclass(frozen=True, kw_only=True)
class TrialRun:
    """One finished run of one arm and seed.

    Attributes:
        arm: Name of the arm.
        seed: The seed.
        total: Updates of a whole run.
        steps: Updates after which the curve has points, 0 first.
        accuracy: Share of right answers on the test images at each.
        loss: Mean cross-entropy on them at each.
        train_loss: Mean training loss between one point and the next.
        validation: Accuracy on the images that arms are chosen by, at the end; None without any.
        diverged_at: Update at which the loss was not finite, or None.
        seconds: What each part took: probe, profile, plan, reinit, train.
        count: Units or weights that were treated.
        layers: Of them, those of each layer.
        reset_loss: Loss on the profiled images before and after, where it was measured.
        notes: What is to be said about the run.
        figures: Of the profile of the model before it was treated: see `trials.figures`.
    """

    arm: str
    seed: int
    total: int
    steps: list[int]
    accuracy: list[float]
    loss: list[float | None]
    train_loss: list[float]
    validation: float | None = None
    diverged_at: int | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    count: int = 0
    layers: dict[str, int] = field(default_factory=dict)
    reset_loss: list[float | None] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)


class Results:
    """The results of a trial, in memory and in a file that grows by one line for each.

    Args:
        path: The file; None keeps them in memory only.
        settings: What has to be the same for all runs in the file.

    Raises:
        FileError: The file is another one, was made with other settings, is damaged before its last
            line, or cannot be read or written.
    """

    def __init__(self, path: Path | None, settings: Mapping[str, Any]) -> None:
        self.path = path
        self.runs: list[TrialRun] = []
        self.note = ""
        # As it comes back from a file: tuples are lists there.
        self._header = json.loads(json.dumps({_KEY: _VERSION, **settings}))
        self._size = -1
        if path is not None:
            with self._alone(path):
                self._open(path)

    def _open(self, path: Path) -> None:
        """Read the runs that are there; begin the file where nothing is, or half of a line."""
        self.runs = []
        with _writing(path):
            content = path.read_bytes()
        if _line(self._header).startswith(content):
            # Nothing is there yet, or the very first line was cut off.
            with _writing(path):
                os.truncate(path, 0)
            self._append(self._header)
        else:
            self._take(path, content, self._header)
        self._size = path.stat().st_size

    @classmethod
    def read(cls, path: Path) -> list[TrialRun]:
        """Return the runs in a file, whatever its settings; FileError when it is another one."""
        found = cls(None, {})
        with _writing(path):
            content = path.read_bytes()
        found._take(path, content, None)
        return found.runs

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Let nobody else write to the file inside the block.

        Raises:
            FileError: Another trial is writing to it.
        """
        if self.path is None:
            yield
            return
        with self._alone(self.path):
            # What another trial has written since it was read.
            if self.path.stat().st_size != self._size:
                self._open(self.path)
            yield

    @contextmanager
    def _alone(self, path: Path) -> Iterator[None]:
        with _writing(path):
            file = path.open("ab")
        with file:
            if os.name == "posix":
                _lock(path, file)
            yield

    def find(self, arm: str, seed: int) -> TrialRun | None:
        """Return the run of an arm and a seed if it is finished."""
        return next((run for run in self.runs if (run.arm, run.seed) == (arm, seed)), None)

    def add(self, run: TrialRun) -> None:
        """Keep a finished run; FileError, and a file as before, when it cannot be written."""
        self._append(asdict(run))
        self.runs.append(run)

    def _append(self, entry: Mapping[str, Any]) -> None:
        if self.path is None:
            return
        line = _line(entry)
        with _writing(self.path):
            before = self.path.stat().st_size if self.path.exists() else 0
            try:
                with self.path.open("ab") as file:
                    file.write(line)
                    file.flush()
                    os.fsync(file.fileno())
            except OSError:
                # Half a line may be there, as on a full disk.
                if self.path.exists():
                    os.truncate(self.path, before)
                raise

    def _take(self, path: Path, content: bytes, header: Mapping[str, Any] | None) -> None:
        """Take the runs of a file's content; without a header, whatever its settings."""
        whole, newline, rest = content.rpartition(b"\n")
        lines = [entry_of(path, number, line) for number, line in enumerate(whole.split(b"\n"), 1)]
        if not newline or _KEY not in lines[0]:
            raise FileError(f"{path}: not a file of trial results: give another name")
        found = list(differences(lines[0], lines[0] if header is None else header))
        if found:
            raise FileError(
                f"{path}: has results of other settings ({'; '.join(found[:3])}): repeat those, or "
                "give another file"
            )
        for number, line in enumerate(lines[1:], 2):
            check_run(path, number, line)
        runs = [TrialRun(**line) for line in lines[1:]]
        # The first of two, as of files that were put together.
        self.runs = list({(run.arm, run.seed): run for run in reversed(runs)}.values())[::-1]
        if rest and header is not None:
            with _writing(path):
                os.truncate(path, len(whole) + 1)
            self.note = f"{path}: the last line was cut off and is taken away; {_KEPT}"


def _lock(path: Path, file: IO[bytes]) -> None:
    """Lock a file until it is closed; FileError where another trial has it."""
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise FileError(
            f"{path}: another trial is writing to it: wait for its end, or give another file"
        ) from None
    except OSError:  # some network file systems have no locks
        return


def _line(entry: Mapping[str, Any]) -> bytes:
    return (json.dumps(plain(entry), allow_nan=False) + "\n").encode()


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise FileError(
            f"{path}: cannot be read or written ({error.strerror or error}): {_KEPT}; make room or "
            "give another file"
        ) from error
