"""The processes that train one model together: they agree on what they do, and add up tables.

All goes through groups of its own (gloo, on the host), so that what the training sends is never
mixed with it: tables through one, by which each process waits for its neighbours, and words through
another, by which all talk to the first one. Before anything is added up all processes meet: one
that is elsewhere, has other options or is gone is named on all of them, instead of letting them
wait for ever. Who fails later breaks the first group off, which ends all waiting, and says so
through the second.
"""

import json
import logging
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from traceback import clear_frames
from typing import Any

import torch
from torch import Tensor

from fastplastic.errors import InputError, ProcessError

# How long one waits for another. Of one that has ended it is known at once.
WAIT = timedelta(minutes=10)
# How long before this is said.
_HINT = 30.0
_log = logging.getLogger("fastplastic")


@dataclass(frozen=True)
class _Message:
    """What a process says when it meets the others.

    Attributes:
        step: What it is about to do.
        facts: What has to be the same in all processes.
        failed: Whether it has failed at that.
    """

    step: str
    facts: Mapping[str, str]
    failed: bool = False


class Processes:
    """The processes of torch.distributed, one of which this is.

    Attributes:
        rank: Number of this process.
        size: Number of processes.
        step: What they met for last.
    """

    def __init__(self) -> None:
        distributed = torch.distributed
        self.rank, self.size = distributed.get_rank(), distributed.get_world_size()
        self._words: Any = distributed.new_group(backend="gloo", timeout=WAIT)
        self._tables: Any = distributed.new_group(backend="gloo", timeout=WAIT)
        self.step = ""
        self._awaited = 0

    def meet(self, step: str, facts: Mapping[str, str]) -> None:
        """Wait until all processes are about to do the same.

        Args:
            step: What that is, in words.
            facts: What else has to be the same in all: names and values.

        Raises:
            ProcessError: One does something else, is gone or did not come in time; the same error
                in all processes.
        """
        self.step = step
        self._exchange(_Message(step, dict(facts)))
        if self._tables is None:
            self._tables = torch.distributed.new_group(backend="gloo", timeout=WAIT)

    def agree(self) -> None:
        """Wait until all have come as far as this one; ProcessError if one fails before."""
        self._exchange(_Message(self.step, {}))

    def fail(self) -> None:
        """Tell the others, whatever they wait for, that this process has failed since they met.

        They get a ProcessError that names it, and can meet again.
        """
        self._break_off()
        with suppress(ProcessError):
            self._exchange(_Message(self.step, {}, failed=True))

    def abandon(self) -> None:
        """Leave the others for good, as they may wait for what torch sends, and cannot hear.

        Where they wait for this one here, they get an error that names it.
        """
        self._break_off()
        group, self._words = self._words, None
        if group is not None:
            with suppress(RuntimeError, ValueError):
                torch.distributed.destroy_process_group(group)

    def add_(self, table: Tensor) -> None:
        """Add up a table over all processes, in place; each gets the same bits."""
        self._call(torch.distributed.all_reduce, table)

    def least_(self, table: Tensor) -> None:
        """Take the least of all processes, element by element, in place."""
        self._call(torch.distributed.all_reduce, table, torch.distributed.ReduceOp.MIN)

    def share(self, value: Any) -> list[Any]:
        """Return what each process passes, by its number; anything that can be pickled."""
        found: list[Any] = [None] * self.size
        self._call(torch.distributed.all_gather_object, found, value)
        return found

    def hear(self, value: Any, rank: int) -> Any:
        """Return what the process with a number passes, in all of them."""
        found = [value if self.rank == rank else None]
        self._call(torch.distributed.broadcast_object_list, found, group_src=rank)
        return found[0]

    def _call(self, function: Callable[..., object], *arguments: Any, **options: Any) -> None:
        """Call what all processes call; where it fails here, it fails in all of them."""
        if self._tables is None:
            raise ProcessError(
                f"{self.step}: the processes have lost each other by an error before, expected "
                "them to meet again"
            )
        reason = ""
        try:
            function(*arguments, group=self._tables, **options)
        except RuntimeError as error:
            reason = _reason(error)
        except BaseException as error:  # KeyboardInterrupt, or out of memory
            # Who waits for this process would wait on: the frames hold on to the connections.
            _forget_frames(error)
            raise
        # Not before the error is gone, which holds on to the connections.
        if reason:
            self._break_off()
            # Who is gone or has failed is known here.
            self.agree()
            raise ProcessError(f"{self.step}: another process {reason}")

    def _break_off(self) -> None:
        """Let whoever waits for a table of this process get an error at once."""
        group, self._tables = self._tables, None
        if group is not None:
            # The world itself may have been ended before.
            with suppress(RuntimeError, ValueError):
                torch.distributed.destroy_process_group(group)

    def _exchange(self, message: _Message) -> None:
        """Tell the first process, and hear from it whether all is well."""
        if self._words is None:
            raise ProcessError(
                f"{message.step}: this process has left the others by an error before, expected "
                "all of them to be started anew"
            )
        text = json.dumps([message.step, dict(message.facts), message.failed])
        with self._hinting(message.step):
            verdict = self._collect(text) if self.rank == 0 else self._ask(text)
        if verdict:
            self._break_off()
            raise ProcessError(f"{message.step}: {verdict}")

    @contextmanager
    def _hinting(self, step: str) -> Iterator[None]:
        """Say for whom this process waits, when that takes long."""

        def hint() -> None:
            _log.warning(
                "%s: waiting for process %d, which has to call it too", step, self._awaited
            )

        timer = threading.Timer(_HINT, hint)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _ask(self, text: str) -> str:
        """Tell the first process, and return what it says is wrong, "" for nothing."""
        try:
            self._send(text, 0)
            return self._receive(0)
        except RuntimeError as error:
            return f"process 0 {_reason(error)}"

    def _collect(self, own: str) -> str:
        """Hear all other processes, and tell them what is wrong, "" for nothing."""
        heard, gone = {0: own}, {}
        for rank in range(1, self.size):
            self._awaited = rank
            try:
                heard[rank] = self._receive(rank)
            except RuntimeError as error:
                gone[rank] = _reason(error)
        said = {rank: _Message(*json.loads(text)) for rank, text in heard.items()}
        verdict = "; ".join(f"process {rank} {why}" for rank, why in gone.items())
        verdict = verdict or _difference(said)
        for rank in set(said) - {0}:
            # Who is gone by now will not miss it.
            with suppress(RuntimeError):
                self._send(verdict, rank)
        return verdict

    def _send(self, text: str, rank: int) -> None:
        values = torch.frombuffer(bytearray(text.encode() or b" "), dtype=torch.uint8)
        for tensor in (torch.tensor([len(values)]), values):
            torch.distributed.send(tensor, group=self._words, group_dst=rank)

    def _receive(self, rank: int) -> str:
        length = torch.zeros(1, dtype=torch.int64)
        torch.distributed.recv(length, group=self._words, group_src=rank)
        values = torch.zeros(int(length), dtype=torch.uint8)
        torch.distributed.recv(values, group=self._words, group_src=rank)
        return bytes(values.tolist()).decode().strip()


def _difference(said: Mapping[int, _Message]) -> str:
    """Return what the processes do not have in common, in words; "" for nothing."""
    failed = [str(rank) for rank, message in said.items() if message.failed]
    if failed:
        return f"process {', '.join(failed)} failed: see the error there"
    first = said[0]
    for rank, message in said.items():
        if message.step != first.step:
            return (
                f"process {rank} is at {message.step!r}, process 0 at {first.step!r}, expected the "
                "same calls in the same order in all processes"
            )
        # In their order: others may follow from the first.
        for name in dict.fromkeys([*first.facts, *message.facts]):
            own, others = first.facts.get(name), message.facts.get(name)
            if own != others:
                return (
                    f"{name} is {others} in process {rank} and {own} in process 0, expected the "
                    "same in all"
                )
    return ""


def _reason(error: RuntimeError) -> str:
    # gloo begins with a line of its source in brackets.
    text = re.sub(r"^\[\S*\] ", "", str(error).partition("\n")[0])
    if "imed out" in text or "imeout" in text:
        return f"did not come within {WAIT.total_seconds():g} s: each has to make the same calls"
    return f"is gone ({text.partition('. ')[0][:120]})"


def _forget_frames(error: BaseException) -> None:
    """Free what the functions held that were called from here and raised an error."""
    here = error.__traceback__
    clear_frames(here.tb_next if here is not None else None)


@contextmanager
def all_or_nothing(
    together: Processes | None, step: str, facts: Callable[[], Mapping[str, str]]
) -> Iterator[None]:
    """Let a block end well in all processes or in none.

    Where it fails in one, the others get a ProcessError that names it, also while they wait for
    tables in the block, and at its end at the latest.

    Args:
        together: The processes; None where this is the only one.
        step: What they are about to do, in words.
        facts: Returns what has to be the same in all; it may fail.

    Raises:
        ProcessError: In all processes; in the one that failed the error is its own.
    """
    if together is None:
        yield
        return
    together.step = step
    try:
        together.meet(step, facts())
        yield
        together.agree()
    except ProcessError:
        # All of them know.
        raise
    except BaseException:  # also KeyboardInterrupt and MemoryError
        together.fail()
        raise


_known: dict[Any, Processes] = {}
_alone: ContextVar[bool] = ContextVar("alone", default=False)


@contextmanager
def alone() -> Iterator[None]:
    """Let this process work by itself, though others train with it.

    What is called in the `with` block waits for no other process and adds nothing of theirs: for
    calls that one process makes, such as of a model that the first one prepares for all.
    """
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


def is_alone() -> bool:
    """Tell whether this is within `alone()`."""
    return _alone.get()


def all_processes() -> Processes | None:
    """Return the processes of torch.distributed; None where this is the only one, or is `alone`.

    Raises:
        InputError: They cannot talk to each other on the host.
    """
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return None
    if _alone.get() or distributed.get_world_size() == 1:
        return None
    if not distributed.is_gloo_available():
        raise InputError(
            "torch was built without gloo, by which processes agree with each other on the host: "
            "expected a build with it, as from PyPI"
        )
    world = distributed.group.WORLD
    if world not in _known:
        _known.clear()
        _known[world] = Processes()
    return _known[world]


def leave() -> None:
    """Leave the group of all processes: who waits for this one is told that it is gone."""
    for found in _known.values():
        # Whoever still holds it: connections end with their last owner.
        found._words = found._tables = None
    _known.clear()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
