"""What the engines of trials do in tests: functions that another process can find."""

import io
import json
import os
import signal
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path

import torch

import fastplastic
from fastplastic.errors import FastPlasticError, FileError
from fastplastic.processes import all_processes
from fastplastic.trials import Trainer, parse_arm, run_trial, with_controls
from helpers.tuned import settings as few
from helpers.tuned import small, task

ARM = "dormant@0.2:zero"
SETTINGS = few(epochs=1, evals=2)


def runs_in(path):
    """Return the lines of a file of results by arm and seed, without the times."""
    lines = [json.loads(line) for line in Path(path).read_text().splitlines()[1:]]
    found = {
        (line["arm"], line["seed"]): line | {"seconds": sorted(line["seconds"])} for line in lines
    }
    assert len(found) == len(lines)
    return found


def dying(seed, *, file, times, number):
    """Return the model, after so many processes that came for that of seed 1 have died."""
    if seed == 1:
        tries = int(file.read_text()) if file.exists() else 0
        if tries < times:
            file.write_text(str(tries + 1))
            os.kill(os.getpid(), number)
    return small(seed)


def failing(seed, *, error):
    if seed == 1:
        raise error
    return small(seed)


def failing_here(seed, *, error):
    """Fail in the first process at once, which the others hear after a run of theirs."""
    if torch.distributed.get_rank() == 0:
        raise error
    return small(seed)


def unkept(run, model):
    raise FileError("no room")


def trainer(model=small, facts=None, keep=lambda run, model: None):
    """Return what makes the runs of a small task, in a worker."""
    return Trainer(task(model=model, facts=facts or {}), SETTINGS, keep)


def threads_trainer():
    """Return what makes runs, and says how many threads torch has there."""
    return trainer(facts={"threads": torch.get_num_threads()})


def dying_trainer(file, times):
    return trainer(partial(dying, file=file, times=times, number=signal.SIGKILL))


def failing_trainer(error):
    return trainer(partial(failing, error=error))


def unkept_trainer():
    return trainer(keep=unkept)


# In two processes.


def command(rank, folder, *arguments):
    """Run the program, and return its exit code and what it printed."""
    from fastplastic.cli.main import main

    os.chdir(folder)
    output, error = io.StringIO(), io.StringIO()
    with redirect_stdout(output), redirect_stderr(error):
        code = main([str(argument) for argument in arguments])
    return code, output.getvalue(), error.getvalue()


def compared(rank, path, model=small, seeds=(0, 1)):
    """Make a small trial, and return its runs, what was told, or what it raised."""
    told = []
    try:
        found = run_trial(
            task(model=model), with_controls([ARM]), seeds, SETTINGS, results=path,
            progress=lambda state: told.append((state.done, state.total, state.run is not None)),
        )  # fmt: skip
    except FastPlasticError as error:
        return type(error).__name__, str(error)
    return [(run.arm, run.seed, run.loss, run.train_loss) for run in found.runs], told


def differing(rank, path):
    seeds = (0, 1 + rank)
    return compared(rank, path, seeds=seeds)


def left(rank, path):
    """Make a trial while process 1 dies in a run of its own."""
    file = Path(path).with_name(f"died {rank}")
    return compared(rank, path, partial(dying, file=file, times=rank, number=signal.SIGKILL))


def tuned(rank):
    images = [(torch.randn(4, 6), torch.tensor([0, 1, 2, 0]))]
    try:
        fastplastic.finetune(small(), images, images, arm=parse_arm("baseline"))
    except FastPlasticError as error:
        return str(error), all_processes().size
    return None
