"""Several processes of torch.distributed (gloo), to run functions of the tests in."""

import multiprocessing
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist


def _serve(rank: int, size: int, store: str, path: list[str], pipe: Connection) -> None:
    sys.path[:] = path
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    while True:
        function, arguments = pipe.recv()
        try:
            pipe.send((True, function(rank, *arguments)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))


class Pool:
    """Processes that wait for something to do; each new one takes some seconds.

    Args:
        size: How many.
        store: Path of a file that they find each other by, which is not there yet.
    """

    def __init__(self, size: int, store: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipes, self._processes = [], []
        for rank in range(size):
            mine, theirs = context.Pipe()
            arguments = (rank, size, store, list(sys.path), theirs)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            self._pipes.append(mine)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Call function(rank, *arguments) in all of them, and return what each returned."""
        for pipe in self._pipes:
            pipe.send((function, arguments))
        results = [pipe.recv() for pipe in self._pipes]
        failed = [str(value) for done, value in results if not done]
        assert not failed, "\n".join(failed)
        return [value for _, value in results]

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.join()
