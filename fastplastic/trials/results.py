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
from typing import Any

from fastplastic.errors import FileError
from fastplastic.files import plain
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
        header = json.loads(json.dumps({_KEY: _VERSION, **settings}))
        if path is None:
            return
        with _writing(path):
            content = path.read_bytes() if path.exists() else b""
        if _line(header).startswith(content):
            # Nothing is there yet, or the very first line was cut off.
            with _writing(path):
                path.write_bytes(b"")
            self._append(header)
        else:
            self._take(path, content, header)

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
        if self.path is None or os.name != "posix":
            yield
            return
        import fcntl

        with self.path.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise FileError(
                    f"{self.path}: another trial is writing to it: wait for its end, or give "
                    "another file"
                ) from None
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
        lines = [_entry(path, number, line) for number, line in enumerate(whole.split(b"\n"), 1)]
        if not newline or _KEY not in lines[0]:
            raise FileError(f"{path}: not a file of trial results: give another name")
        found = list(differences(lines[0], lines[0] if header is None else header))
        if found:
            raise FileError(
                f"{path}: has results of other settings ({'; '.join(found[:3])}): repeat those, or "
                "give another file"
            )
        runs = [_run(path, number, line) for number, line in enumerate(lines[1:], 2)]
        # The first of two, as of files that were put together.
        self.runs = list({(run.arm, run.seed): run for run in reversed(runs)}.values())[::-1]
        if rest and header is not None:
            with _writing(path):
                os.truncate(path, len(whole) + 1)
            self.note = f"{path}: the last line was cut off and is taken away; {_KEPT}"


def _entry(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except ValueError:
        entry = None
    if not isinstance(entry, dict):
        raise FileError(
            f"{path}: line {number} is no JSON object, expected results of a trial: repair that "
            "line or give another file"
        )
    return entry


def _run(path: Path, number: int, entry: dict[str, Any]) -> TrialRun:
    try:
        run = TrialRun(**entry)
        # What the comparison reads has to be there in this form.
        assert run.accuracy and len(run.accuracy) == len(run.steps) == len(run.loss)
        assert all(isinstance(value, (int, float)) for value in (*run.accuracy, run.total))
    except (TypeError, AssertionError) as error:
        raise FileError(
            f"{path}: line {number} is no run of a trial ({error or 'curves do not fit'}): repair "
            "or remove that line"
        ) from error
    return run


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
