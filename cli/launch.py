"""Several processes that torchrun started for one command: the first one prints and writes.

The others work along in silence. At the end each tells the first how it came out, so that an error
is said once, whoever has it, and nobody ends while another still works. Nothing here loads torch
before a command works together.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import wraps
from typing import Any

from fastplastic.cli.outcomes import SIGNALS, Outcome, Say, settle
from fastplastic.errors import InputError

# How long the processes wait for each other at the start, and after how many seconds the first one
# says so. How many one waits to be ended that did not come so far.
_START, _HINT, _APART = timedelta(minutes=5), 10.0, 5.0


@dataclass(frozen=True)
class LaunchPlace:
    """Which of the processes this one is.

    Attributes:
        rank: Its number among all.
        size: How many there are.
        local_rank: Its number among those on this machine.
        local_size: How many of them are on this machine.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int


def place() -> LaunchPlace | None:
    """Return the place of this process; None where it works by itself.

    Taken from what torchrun sets, or whoever sets the same. RANK alone means nothing: other
    programs have variables of that name.
    """
    rank, size = _number("RANK"), _number("WORLD_SIZE")
    found = "TORCHELASTIC_RUN_ID" in os.environ or {"MASTER_ADDR", "MASTER_PORT"} <= {*os.environ}
    if not found or rank is None or size is None or not 0 <= rank < size or size == 1:
        return None
    local_rank, local_size = _number("LOCAL_RANK"), _number("LOCAL_WORLD_SIZE")
    return LaunchPlace(
        rank, size, rank if local_rank is None else local_rank, local_size if local_size else size
    )


def _number(name: str) -> int | None:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else None


def is_first() -> bool:
    """Tell whether this process prints and writes."""
    found = place()
    return found is None or found.rank == 0


def own_gpu(count: int) -> str:
    """Return the name of the GPU of this process where it sees so many.

    Raises:
        InputError: There are some, but fewer than processes on this machine.
    """
    found = place()
    if found is None:
        return "cuda"
    if count == 1:
        # Schedulers show each process its own GPU alone.
        return "cuda:0"
    if found.local_size > count:
        raise InputError(
            f"{found.local_size} processes and {count} GPUs on this machine, expected a GPU for "
            f"each: pass --nproc-per-node {count} to torchrun, or --device cpu"
        )
    return f"cuda:{found.local_rank}"


def heard_of_all(value: Any) -> list[Any]:
    """Return what each process passes, by its number: all have to call this."""
    from fastplastic.processes import all_processes

    others = all_processes()
    return [value] if others is None else others.share(value)


# Of the command that runs: by which the processes tell how they came out.
_stores: list[Any] = []


def together(run: Callable[[Any], None]) -> Callable[[Any], None]:
    """Let all processes work at a command, in a group of torch.distributed."""

    @wraps(run)
    def in_group(options: Any) -> None:
        found = place()
        if found is not None:
            _begin(found, getattr(options, "device", None))
        run(options)

    return in_group


def by_first(run: Callable[[Any], None]) -> Callable[[Any], None]:
    """Let the first process alone do what takes no model and no data; the others have nothing."""

    @wraps(run)
    def in_first(options: Any) -> None:
        if is_first():
            run(options)

    return in_first


def by_itself(run: Callable[[Any], None]) -> Callable[[Any], None]:
    """Refuse to work at a command in several processes: InputError."""

    @wraps(run)
    def in_one(options: Any) -> None:
        if (found := place()) is not None:
            raise InputError(
                f"{found.size} processes, expected one for this command: start it without torchrun"
            )
        run(options)

    return in_one


def _begin(found: LaunchPlace, device: str | None) -> None:
    """Join the other processes. InputError where they do not come."""
    import torch

    from fastplastic.processes import all_processes

    distributed: Any = torch.distributed
    if not (distributed.is_available() and distributed.is_gloo_available()):
        raise InputError(
            f"{found.size} processes, and torch was built without gloo, by which they talk to each "
            "other: expected a build with it, as from PyPI: start the command without torchrun"
        )
    hint = threading.Timer(_HINT, _say_waiting, [found])
    hint.daemon = True
    hint.start()
    try:
        store, rank, size = next(distributed.rendezvous("env://", timeout=_START))
        # Of its own: a program that starts this one, and may do so again, can have the same store.
        start = store.add(f"fastplastic {rank}", 1)
        store = distributed.PrefixStore(f"fastplastic start {start}", store)
        store.set_timeout(_START)
        distributed.init_process_group(
            _backend(found, device), store=store, rank=rank, world_size=size
        )
        # The group of ours is made while all are here: who fails can be missed from now on.
        all_processes()
    except RuntimeError as error:
        reason = str(error).partition("\n")[0][:120]
        raise InputError(
            f"process {found.rank} of {found.size}: the others did not come within "
            f"{_START.total_seconds():g} s ({reason}), expected torchrun to start all of them: "
            "unset RANK and WORLD_SIZE to work without others"
        ) from None
    finally:
        hint.cancel()
    _stores.append(store)


def _say_waiting(found: LaunchPlace) -> None:
    if found.rank == 0:
        others = f"{found.size - 1} other process{'es' * (found.size > 2)}"
        text = f"fastplastic: waiting for {others}, as WORLD_SIZE says"
        print(text, file=sys.stderr, flush=True)


def _backend(found: LaunchPlace, device: str | None) -> str:
    """Return by what tensors travel; take the GPU of this process as the current one."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count or not (device is None or device.startswith("cuda")):
        return "gloo"
    name = own_gpu(count) if device in (None, "cuda") else device
    torch.cuda.set_device(name)
    return "cpu:gloo,cuda:nccl" if torch.distributed.is_nccl_available() else "gloo"


@contextmanager
def others_silent() -> Iterator[None]:
    """Let all but the first process print nothing."""
    if is_first():
        yield
        return
    with open(os.devnull, "w") as nothing, redirect_stdout(nothing), redirect_stderr(nothing):
        yield


def end(own: Outcome, say: Say) -> int:
    """End a command in all processes alike: say what went wrong once, and return the exit code.

    Args:
        own: How it came out in this process.
        say: Prints a line.
    """
    found, store = place(), _stores.pop() if _stores else None
    if found is None:
        own.say(say)
        return own.code
    if store is None:
        return _end_apart(own, found, say)
    from fastplastic.processes import leave

    if own.code:
        # Who waits for this one is told, and comes here, too.
        leave()
    whole = settle(own, store, found.rank, found.size, say)
    leave()
    return _code(whole, found)


def _end_apart(own: Outcome, found: LaunchPlace, say: Say) -> int:
    """End what came to its end before this process met the others."""
    if found.rank == 0:
        own.say(say)
    elif own.code and own.code < SIGNALS and found.rank >= found.local_size:
        # Another machine, with other files. What is wrong here may be wrong in the first process,
        # too, which says it: then torchrun ends this one meanwhile.
        time.sleep(_APART)
        if found.local_rank == 0:
            own.of(found.rank).say(say)
    return _code(own, found)


def _code(whole: Outcome, found: LaunchPlace) -> int:
    """Return the exit code of this process.

    torchrun has a page to say of each that fails: one of each machine is enough.
    """
    if found.local_rank and found.rank:
        return 0
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if whole.code and path:
        # What that page ends with.
        text = "\n".join(whole.lines)
        more = {"py_callstack": text, "timestamp": int(time.time())}
        with suppress(OSError), open(path, "w") as file:
            json.dump({"message": {"message": text, "extraInfo": more}}, file)
    return whole.code
