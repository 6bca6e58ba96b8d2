"""Time a function and its rivals in turns, so that what disturbs one disturbs all."""

import os
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

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
    benchmark: Any, ours: Callable[[], object], rivals: dict[str, Callable[[], object]]
) -> None:
    """Let pytest-benchmark time `ours`, and time each rival before each of its rounds.

    Medians of the rivals and the ratios ours / rival go to `extra_info`.
    """
    times: dict[str, list[float]] = {name: [] for name in rivals}

    def run_rivals() -> None:
        for name, rival in rivals.items():
            start = clock()
            rival()
            times[name].append(clock() - start)

    begin = clock()
    for _ in range(2):
        ours()
        run_rivals()
    once = (clock() - begin) / 2
    for values in times.values():
        values.clear()
    rounds = max(5, min(200, int(SECONDS / max(once, 1e-6))))

    def timed() -> None:
        ours()
        if GPU:
            torch.cuda.synchronize()

    benchmark.pedantic(timed, setup=run_rivals, rounds=rounds, iterations=1)
    mine = benchmark.stats.stats.median
    benchmark.extra_info["device"] = device_name()
    for name, values in times.items():
        benchmark.extra_info[f"{name} ms"] = round(median(values) * 1e3, 4)
        benchmark.extra_info[f"/ {name}"] = round(mine / median(values), 3)


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
    """Return how many MB the memory in use rises by, at its peak, while a function runs."""
    function()
    if GPU:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    # Linux: sets the peak of the resident memory back to what it is now.
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = _resident("VmRSS")
    function()
    return (_resident("VmHWM") - before) / 1e3


def _resident(field: str) -> float:
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith(field))
    return float(line.split()[1])
