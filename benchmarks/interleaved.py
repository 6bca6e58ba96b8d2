"""Time a function and its rivals in turns, so that what disturbs one disturbs all."""

import os
import time
import tracemalloc
from collections.abc import Callable
from itertools import accumulate
from statistics import median
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GPU = DEVICE.type == "cuda"
# Shorter rounds for trying the benchmarks out.
SECONDS = float(os.environ.get("FASTPLASTIC_BENCH_SECONDS", "3"))


def clock() -> float:
    """Return the time in seconds, when the device is done with everything."""
    if GPU:
        torch.cuda.synchronize()
    return time.perf_counter()


def compare(
    benchmark: Any,
    ours: Callable[[], object],
    rivals: dict[str, Callable[[], object]],
    *,
    rounds: int = 5,
) -> None:
    """Let pytest-benchmark time `ours`, and time each rival before each of its (least) rounds.

    Medians of the rivals and the ratios ours / rival, of medians and of the fastest rounds, go to
    `extra_info`.
    """
    times: dict[str, list[float]] = {name: [] for name in rivals}

    def run_rivals() -> None:
        for name, rival in rivals.items():
            start = clock()
            rival()
            times[name].append(clock() - start)

    ours()
    run_rivals()
    begin = clock()
    ours()
    run_rivals()
    once = clock() - begin
    for values in times.values():
        values.clear()
    # Of what takes minutes, three rounds.
    rounds = max(rounds if once < 20 else 3, min(200, int(SECONDS / max(once, 1e-6))))

    def timed() -> None:
        ours()
        if GPU:
            torch.cuda.synchronize()

    benchmark.pedantic(timed, setup=run_rivals, rounds=rounds, iterations=1)
    _note(benchmark, times)


def _note(benchmark: Any, times: dict[str, list[float]]) -> None:
    """Write the times of the rivals, and the ratios to them, beside the result."""
    mine, fastest = benchmark.stats.stats.median, benchmark.stats.stats.min
    benchmark.extra_info["device"] = device_name()
    for name, values in times.items():
        benchmark.extra_info[f"{name} ms"] = round(median(values) * 1e3, 4)
        benchmark.extra_info[f"/ {name}"] = round(mine / median(values), 3)
        # What else runs on the machine disturbs the fastest rounds least.
        benchmark.extra_info[f"fastest / {name}"] = round(fastest / min(values), 3)


def device_name() -> str:
    """Return what the benchmark ran on."""
    if GPU:
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads"


def noise(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return normal numbers on the device."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    return torch.randn(*shape, generator=generator, device=DEVICE).to(dtype)


def extra_memory(function: Callable[[], object]) -> float:
    """Return how many MB are allocated, at the peak, while a function runs: by torch and NumPy."""
    if GPU:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    # What Python and NumPy allocate is traced apart, so the two peaks are added.
    tracemalloc.start()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    _, python = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return (max(accumulate((e.nbytes() for e in events), initial=0)) + python) / 1e6
