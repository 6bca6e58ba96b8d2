"""What the processes of test_processes.py do: functions that another process can find."""

import logging
import os
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from fastplastic import processes as module
from fastplastic.errors import ProcessError
from fastplastic.processes import all_or_nothing, all_processes, alone


def attempt(function):
    """Return what a call raises, in words."""
    try:
        function()
    except ProcessError as error:
        return str(error)
    except ZeroDivisionError as error:
        return repr(error)
    return ""


def sums(rank):
    found = all_processes()
    assert found is not None and found is all_processes()
    table = torch.arange(6, dtype=torch.float64).view(2, 3) / 3 * (rank + 1)
    least = torch.tensor([5.0 - rank, rank])
    found.add_(table)
    found.least_(least)
    return table, least, (found.rank, found.size)


def meeting(rank, steps, facts):
    found = all_processes()
    return attempt(lambda: found.meet(steps[rank], facts[rank])), attempt(
        lambda: found.meet("the end", {})
    )


def dying(rank, late):
    module.WAIT = timedelta(seconds=4)
    found = module.Processes()
    if rank == 1:
        if not late:
            # Without a word to anybody.
            os._exit(1)
        dist.recv(torch.zeros(1), src=0)
    said = attempt(lambda: found.meet("profile", {}))
    if late and rank == 0:
        dist.send(torch.zeros(1), dst=1)
    return said


def by_itself(rank):
    if rank:
        return None
    with alone():
        return all_processes()


def failing(rank, who):
    """Let one process fail among tables that are added up; all go on with the next call."""
    found = all_processes()

    def work():
        with all_or_nothing(found, "work", dict):
            found.add_(torch.ones(3))
            if rank == who:
                raise ZeroDivisionError("by hand")
            found.add_(torch.ones(3))

    def end():
        with all_or_nothing(found, "more", dict):
            found.add_(torch.ones(3))
            if rank == who:
                raise ZeroDivisionError("at the end")

    return attempt(work), attempt(end), attempt(lambda: found.meet("the end", {}))


def dying_within(rank):
    """Let one process end without a word among tables; the others are told who."""
    found = all_processes()

    def work():
        with all_or_nothing(found, "work", dict):
            found.add_(torch.ones(3))
            if rank == 1:
                os._exit(1)
            found.add_(torch.ones(3))

    return attempt(work)


def waiting(rank):
    """Let one process come late; return what the others say meanwhile."""
    found, said = all_processes(), []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logger = logging.getLogger("fastplastic")
    logger.addHandler(handler)
    before, module._HINT = module._HINT, 0.2
    try:
        if rank == 2:
            time.sleep(1)
        found.meet("work", {})
    finally:
        module._HINT = before
        logger.removeHandler(handler)
    return said
