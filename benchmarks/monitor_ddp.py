"""Watched steps against plain ones, by one process and by two that train together, side by side.

    python benchmarks/monitor_ddp.py
    python benchmarks/monitor_ddp.py --models resnet50 --batch 32 --rounds 41

In each round both kinds of step are taken in turns, by the first process alone, by both at once
with a model for each, and by both together (DistributedDataParallel, gloo). The last two share the
machine alike, so that they differ in what training together costs. Where others use the machine
too, the time that the process itself computed (CPU) is disturbed least.
"""

import argparse
import copy
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from statistics import median, quantiles
from time import process_time

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
    times: dict[tuple[str, str], list[tuple[float, float]]] = {key: [] for key in steps}
    for turn in range(WARM_UP + rounds):
        # Neither always comes first.
        for key in sorted(steps, reverse=bool(turn % 2)):
            distributed.barrier()
            start = clock(), process_time()
            if rank == 0 or key[0] != "alone":
                steps[key]()
            if turn >= WARM_UP:
                times[key].append((clock() - start[0], process_time() - start[1]))
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
                with nullcontext() if kind == "together" else fastplastic.alone():
                    monitors[kind] = fastplastic.Monitor(own, images[:2])
                monitors[kind].attach()
    return steps, monitors


def print_row(
    name: str, kind: str, plain: list[tuple[float, float]], watched: list[tuple[float, float]]
) -> None:
    """Print the time of a plain step, and medians and quartiles of the ratios of neighbours."""
    cells = []
    for values in zip(zip(*plain, strict=True), zip(*watched, strict=True), strict=True):
        low, middle, high = quantiles([b / a for a, b in zip(*values, strict=True)], n=4)
        cells.append(f"{middle:.3f} ({low:.3f} to {high:.3f})")
    ms = median(seconds for seconds, _ in plain) * 1e3
    print(f"| {name} | {kind} | {ms:.0f} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Measure each model in two new processes."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["resnet18", "vit_tiny_patch16_224"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=21)
    options = parser.parse_args()
    print(f"{device_name()}, 2 processes of 1 thread, torch {torch.__version__}\n")
    print("| model | steps | plain ms | watched / plain (quartiles) | the same, CPU |")
    print("|---|---|--:|--:|--:|", flush=True)
    for name in options.models:
        with tempfile.TemporaryDirectory() as folder:
            store = str(Path(folder, "store"))
            arguments = (store, name, options.batch, options.rounds)
            multiprocessing.spawn(measure, arguments, nprocs=2)


if __name__ == "__main__":
    main()
