"""The runs of a trial divided among the processes of torch.distributed, each made by one of them.

The first process reads and writes the results, and makes runs as the others do. They send it each
run when it is finished, and hear in return whether the trial goes on.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from itertools import pairwise
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any

import torch

from fastplastic.errors import ProcessError
from fastplastic.processes import Processes
from fastplastic.trials.engine import Engine, Listener, Made, Pending, Trainer
from fastplastic.trials.failures import Failure, attempt
from fastplastic.trials.results import TrialRun

# Nobody knows how long a run takes. Of a process that has ended it is known at once.
_WAIT = timedelta(days=365)
# Seconds in which the others are told of an error.
_PATIENCE = 2.0

# What a trial comes to: its runs, and what is to be said of the file.
Answer = tuple[list[TrialRun], str]


def divided(
    processes: Processes,
    facts: Mapping[str, str],
    trainer: Trainer,
    lead: Callable[[Engine], Answer],
) -> Answer:
    """Divide the runs of a trial among the processes, and return what it comes to in each.

    Args:
        processes: All of them.
        facts: What has to be the same in all.
        trainer: Makes runs in this one.
        lead: Called in the first process: makes the missing runs with an engine.

    Raises:
        ProcessError: The processes differ, or one is gone.
        FastPlasticError: What a run or the results raised, the same in all processes.
    """
    threads = {"the number of threads of torch": str(torch.get_num_threads())}
    processes.meet("trial", {**facts, **threads})
    line = _Line(processes)
    if processes.rank:
        answer = _follow(line, trainer)
    else:
        with _Lead(line, trainer) as engine:
            answer = engine.answer = lead(engine)
    line.close()
    return answer


class _Line:
    """By which the first process and the others talk to each other.

    Args:
        processes: All of them, which come here at the same time.
    """

    def __init__(self, processes: Processes) -> None:
        self.rank, self.size = processes.rank, processes.size
        self._group: Any = torch.distributed.new_group(backend="gloo", timeout=_WAIT)

    def send(self, message: object, rank: int) -> None:
        """Send what can be pickled to a process; ProcessError where it is gone."""
        with _expecting(rank):
            torch.distributed.send_object_list([message], group=self._group, group_dst=rank)

    def receive(self, rank: int) -> Any:
        """Wait for what a process sends; ProcessError where it is gone."""
        found: list[Any] = [None]
        with _expecting(rank):
            torch.distributed.recv_object_list(found, group=self._group, group_src=rank)
        return found[0]

    def close(self) -> None:
        """End it, in all processes."""
        torch.distributed.destroy_process_group(self._group)


@contextmanager
def _expecting(rank: int) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError):  # the latter when this process has left the others
        raise ProcessError(
            f"trial: process {rank} is gone: finished runs are kept, the same command goes on"
        ) from None


class _Lead:
    """The engine of the first process, which gives the others their part.

    Args:
        line: To the others.
        trainer: Makes runs here.

    Attributes:
        answer: What all are told at the end.
    """

    def __init__(self, line: _Line, trainer: Trainer) -> None:
        self._line, self._trainer = line, trainer
        self.answer: Answer | Failure = ([], "")
        self._over, self._threads = Event(), list[Thread]()
        self._inbox: SimpleQueue[Made | Failure | None] = SimpleQueue()
        # How many of the others are at their part.
        self._busy = 0

    def __enter__(self) -> "_Lead":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        interrupted = error is not None and not isinstance(error, Exception)
        if error is not None:
            told = ProcessError("process 0 was interrupted") if interrupted else error
            self.answer = Failure.of(told)
        if not self._threads:
            self._begin([()] * (self._line.size - 1))
        self._over.set()
        # After an error some are in the middle of a run, and after Ctrl-C there is no time.
        until = time.monotonic() + (0.0 if interrupted else _PATIENCE)
        for thread in self._threads:
            thread.join(None if error is None else max(0.0, until - time.monotonic()))

    def run(self, pending: Sequence[Pending], listener: Listener) -> None:
        """Make runs, as any `Engine` does."""
        own, *others = _parts(pending, self._line.size)
        self._begin(others)
        for item in own:
            tell = partial(self._tell, listener, item)
            try:
                made = attempt(self._trainer, item, "process 0", tell)
            except _Elsewhere as stop:
                raise stop.error from None
            self._take(made, listener)
        while self._busy:
            self._take(self._inbox.get(), listener)

    def _tell(self, listener: Listener, item: Pending, share: float) -> None:
        """Hear how far a run is, and take what the others have sent meanwhile."""
        try:
            listener.share(item, share)
            while not self._inbox.empty():
                self._take(self._inbox.get(), listener)
        except Exception as error:
            raise _Elsewhere(error) from None

    def _take(self, message: Made | Failure | None, listener: Listener) -> None:
        """Take a run that is finished, or raise what it raised; None of who has made its part."""
        if isinstance(message, Failure):
            raise message.error()
        if message is None:
            self._busy -= 1
        else:
            listener.finished(message)

    def _begin(self, parts: Sequence[Sequence[Pending]]) -> None:
        """Give the others their parts; threads hear what they send while this one trains."""
        for rank, part in enumerate(parts, 1):
            self._busy += 1
            self._threads.append(Thread(target=self._serve, args=(rank, part), daemon=True))
            self._threads[-1].start()

    def _serve(self, rank: int, part: Sequence[Pending]) -> None:
        try:
            self._line.send(part, rank)
            while isinstance(message := self._line.receive(rank), Made):
                self._inbox.put(message)
                stop = self.answer if self._over.is_set() else None
                self._line.send(stop, rank)
                if stop is not None:
                    return
            self._inbox.put(message)
            self._over.wait()
            self._line.send(self.answer, rank)
        except ProcessError as error:
            self._inbox.put(Failure.of(error))


class _Elsewhere(BaseException):
    """What stops a run that has nothing to do with it."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error


def _follow(line: _Line, trainer: Trainer) -> Answer:
    """Make the part of this process, and return what the trial comes to."""
    message: Made | Failure | None
    for item in line.receive(0):
        message = attempt(trainer, item, f"process {line.rank}")
        if isinstance(message, Failure):
            break
        line.send(message, 0)
        stop = line.receive(0)
        if stop is not None:
            raise stop.error()
    else:
        message = None
    # What all are told then is this failure, too.
    line.send(message, 0)
    answer: Answer | Failure = line.receive(0)
    if isinstance(answer, Failure):
        raise answer.error()
    return answer


def _parts(pending: Sequence[Pending], number: int) -> list[Sequence[Pending]]:
    """Return parts of one size, or one more: neighbours, which share where they start from."""
    least, more = divmod(len(pending), number)
    ends = [least * part + min(part, more) for part in range(number + 1)]
    return [pending[begin:end] for begin, end in pairwise(ends)]
