"""Watched steps against plain ones, by one process and by two that train together, side by side.

    python benchmarks/monitor_ddp.py
    python benchmarks/monitor_ddp.py --models resnet50 --batch 32 --rounds 41

In each round both kinds of step are taken in turns, by the first process alone, by both at once with
a model for each, and by both together (DistributedDataParallel, gloo). The last two share the
machine alike, so that they differ in what training together costs.
"""

import argparse
import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles

import torch
from bench_overhead import model_of, step_of
from interleaved import clock, device_name
from torch import distributed, multiprocessing
from torch.nn.parallel import DistributedDataParallel

import fastplastic

WARM_UP = 3
KINDS = ("alone", "at once", "together")


def measure(rank: int, store: str, name: str, batch: int, rounds: int) -> None:
    """Time all kinds of steps; the first process prints a table row for each."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    steps, monitors = steps_of(name, batch)
    times: dict[tuple[str, str], list[float]] = {key: [] for key in steps}
    for turn in range(WARM_UP + rounds):
        # Neither always comes first.
        for key in sorted(steps, reverse=bool(turn % 2)):
            distributed.barrier()
            start = clock()
            if rank == 0 or key[0] != "alone":
                steps[key]()
            if turn >= WARM_UP:
                times[key].append(clock() - start)
    start = clock()
    monitors["together"].compute()
    seconds = clock() - start
    if rank == 0:
        for kind in KINDS:
            print_row(name, kind, times[kind, "plain"], times[kind, "watched"])
        print(f"compute() of {name}, both processes: {seconds * 1e3:.0f} ms")
    distributed.destroy_process_group()


def steps_of(
    name: str, batch: int
) -> tuple[dict[tuple[str, str], Callable[[], None]], dict[str, fastplastic.Monitor]]:
    """Return the steps and the monitors, by their kinds."""
    steps: dict[tuple[str, str], Callable[[], None]] = {}
    monitors = {}
    model, images = model_of(name, batch)
    for kind in KINDS:
        for watched in ("plain", "watched"):
            own = copy.deepcopy(model)
            run = DistributedDataParallel(own) if kind == "together" else own
            steps[kind, watched] = step_of(run, images)
            if watched == "watched":
                with fastplastic.alone() if kind != "together" else fastplastic_together():
                    monitors[kind] = fastplastic.Monitor(own, images[:2])
                monitors[kind].attach()
    return steps, monitors
