"""The program in several processes, as torchrun starts it: functions that another process finds."""

import io
import os
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from fastplastic.cli.main import main
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
    if start.attempt == 0:
        # The pool has made one by other means.
        dist.destroy_process_group()
    output, error = io.StringIO(), io.StringIO()
    with redirect_stdout(output), redirect_stderr(error):
        code = main([str(word) for word in lines[rank]])
    assert not dist.is_initialized()
    return code, output.getvalue(), error.getvalue()


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

    def close(self):
        self._pool.close()
