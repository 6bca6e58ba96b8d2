"""The program in several processes, as torchrun starts it: functions that another process finds."""

import io
import os
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from fastplastic.cli.agreement import average_norms
from fastplastic.cli.main import main
from fastplastic.processes import leave
from helpers.processes import Pool


@dataclass(frozen=True)
class Start:
    """What torchrun tells the processes that it starts."""

    size: int
    port: int
    attempt: int
    folder: str

    def variables(self, rank):
        return {
            "RANK": rank, "WORLD_SIZE": self.size, "LOCAL_RANK": rank,
            "LOCAL_WORLD_SIZE": self.size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": self.port,
            "TORCHELASTIC_RUN_ID": "test", "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": self.attempt, "HF_ENDPOINT": "http://127.0.0.1:9",
            "HF_HUB_CACHE": f"{self.folder}/hub",
        }  # fmt: skip


def program(rank, start, lines):
    """Run the program with the arguments of this process; return its exit code and what it says."""
    os.environ |= {name: str(value) for name, value in start.variables(rank).items()}
    os.environ.pop("COLUMNS", None)
    os.chdir(start.folder)
    if dist.is_initialized():
        # The pool has made one by other means.
        dist.destroy_process_group()
    output, error = io.StringIO(), io.StringIO()
    with redirect_stdout(output), redirect_stderr(error):
        code = main([str(word) for word in lines[rank]])
    assert not dist.is_initialized()
    return code, output.getvalue(), error.getvalue()


def averaged(rank, store, size):
    """Return the statistics of a norm that each process measured over its share of 5 batches."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    norm = measured(range(rank, 5, size))
    average_norms(torch.nn.Sequential(norm, torch.nn.ReLU()))
    leave()
    return norm.state_dict()


def measured(numbers):
    """Return a norm that has seen some batches."""
    norm = torch.nn.BatchNorm1d(3, momentum=None)
    for number in numbers:
        norm(torch.randn(4, 3, generator=torch.Generator().manual_seed(number)) + number)
    return norm


class Launcher:
    """Starts the program in several processes that stay, as each takes seconds to load torch.

    Args:
        size: How many.
        folder: Where they work.
    """

    def __init__(self, size, folder):
        self.size, self._folder, self._attempt = size, folder, 0
        self._pool = Pool(size, str(folder / "store"))
        self._store = dist.TCPStore(
            "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60)
        )

    def __call__(self, *arguments, others=None):
        """Run it with these arguments, or with `others` in all but the first process."""
        start = Start(self.size, self._store.port, self._attempt, str(self._folder))
        self._attempt += 1
        lines = [arguments, *[others or arguments] * (self.size - 1)]
        return self._pool.run(program, start, lines)

    def averaged(self):
        """Return what `averaged` does in each process."""
        return self._pool.run(averaged, str(self._folder / "norms"), self.size)

    def close(self):
        self._pool.close()
