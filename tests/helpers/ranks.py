"""What tests of parts of weights share: backends, cuts, and processes that are threads."""

import importlib
import threading

import numpy as np
import torch
from torch import Tensor

from fastplastic.kernels import WeightShard

Box = tuple[slice, ...]


class Twin:
    """The three functions of a backend, on its device."""

    def __init__(self, folder: str) -> None:
        gpu = folder == "gpu" and torch.cuda.is_available()
        self.device = "cuda" if gpu else "cpu"
        stem = f"fastplastic.kernels.{folder}"
        self.resample_ = importlib.import_module(f"{stem}.resample").resample_
        self.select = importlib.import_module(f"{stem}.select").select
        self.selection_masks = importlib.import_module(f"{stem}.select").selection_masks


def chunks(size: int, n: int) -> list[slice]:
    """Cut a dimension as torch.chunk does: the last ones are shorter, or empty."""
    step = max(1, -(-size // n))
    return [slice(min(i * step, size), min((i + 1) * step, size)) for i in range(n)]


def boxes(shape: tuple[int, ...], *counts: int) -> list[Box]:
    """Cut the first dimensions of a weight into so many parts each: one box for each process."""
    cut: list[Box] = [()]
    for size, count in zip(shape, counts, strict=False):
        cut = [(*box, part) for box in cut for part in chunks(size, count)]
    return cut


def shard_of(shape: tuple[int, ...], box: Box, counted: bool = True) -> WeightShard:
    offsets = [part.start for part in box] + [0] * (len(shape) - len(box))
    return WeightShard(shape, tuple(offsets), counted)


class Ranks:
    """Processes that add their tables up, as threads that wait for each other."""

    def __init__(self, n: int) -> None:
        self.tables: list[Tensor | None] = [None] * n
        self.shapes: list[tuple[int, ...]] = []
        self._sum = torch.empty(0)
        self._met = threading.Barrier(n, self._add, timeout=60)
        self._results: list[object] = [None] * n

    def run(self, work) -> list:
        """Return what work(rank, reduce) gives on each rank."""
        threads = [
            threading.Thread(target=self._work, args=(work, rank))
            for rank in range(len(self.tables))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for result in self._results:
            if isinstance(result, BaseException):
                raise result
        return self._results

    def _work(self, work, rank: int) -> None:
        try:
            with np.errstate(all="ignore"):
                self._results[rank] = work(rank, lambda table: self._reduce(rank, table))
        except BaseException as error:
            self._results[rank] = error
            if not isinstance(error, ValueError):
                self._met.abort()

    def _reduce(self, rank: int, table: Tensor) -> None:
        assert table.dtype == torch.int64
        self.tables[rank] = table
        self._met.wait()
        table.copy_(self._sum)

    def _add(self) -> None:
        self._sum = torch.stack(self.tables).sum(0)
        self.shapes.append(tuple(self._sum.shape))


def on_ranks(
    twin, weights, gradients, names, count, shards, *, criterion, masks=None, shapes=None, **options
):
    """Select on ranks, each with its weights, gradients and shards; return their selection."""
    ranks = Ranks(len(weights))

    def work(rank, reduce):
        slopes = None if gradients is None else gradients[rank]
        own = {"criterion": criterion, "shards": shards[rank], "reduce": reduce, **options}
        found = twin.select(weights[rank], slopes, names, count, **own)
        marked = twin.selection_masks(found, weights[rank], slopes, shards=shards[rank])
        return found, marked

    results = ranks.run(work)
    assert all(found == results[0][0] for found, _ in results)
    if masks is not None:
        masks += [marked for _, marked in results]
    if shapes is not None:
        shapes += ranks.shapes
    return results[0][0]
