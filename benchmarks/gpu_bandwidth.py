"""How much of a card's read bandwidth each kernel reaches.

    python benchmarks/gpu_bandwidth.py -o results.jsonl

Calls are captured in a CUDA graph and replayed, so that Python and launches are left out, over
as many inputs in turns as do not fit into the caches together. `sum` of torch on the same inputs in
the same way is what a plain read reaches. One line of JSON for each case, written at once.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from fastplastic import kernels

# Bytes that no cache holds.
_BEYOND_CACHES = 512 * 2**20
_REPLAYS = 20
# (channels, height, width) of ResNet-50, channels last, and (tokens, channels) of ViT-B.
_PLANES = ((64, 112, 112), (256, 56, 56), (1024, 14, 14), (2048, 7, 7))
_TOKENS = ((197, 768), (197, 3072))
_FUNCTIONS = ("identity", "relu", "gelu", "silu")


def inputs(shape: tuple[int, ...]) -> list[Tensor]:
    """Return different tensors of a shape in bfloat16, together beyond the caches."""
    generator = torch.Generator("cuda").manual_seed(0)
    bytes_of_one = 2 * torch.Size(shape).numel()
    tensors = []
    for _ in range(max(2, -(-_BEYOND_CACHES // bytes_of_one))):
        x = torch.randn(shape, generator=generator, device="cuda").bfloat16()
        tensors.append(x.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else x)
    return tensors


def seconds_of(calls: list[Callable[[], object]]) -> tuple[float, bool]:
    """Return the seconds that all calls take, in the median, and whether they were a graph."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        replay, captured = graph.replay, True
    except RuntimeError as error:
        print(f"not captured, timed call by call: {str(error).splitlines()[0]}")
        torch.cuda.synchronize()

        def replay() -> None:
            for call in calls:
                call()

        captured = False
    replay()
    times = []
    for _ in range(_REPLAYS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return median(times), captured


def cases(batches: list[int]) -> Iterator[tuple[str, tuple[int, ...], int]]:
    """Yield kernel (with its function), shape and axis of the units."""
    for batch in batches:
        for shape in _PLANES + _TOKENS:
            axis = 1 if len(shape) == 3 else 2
            for name in _FUNCTIONS:
                yield f"activation_stats {name}", (batch, *shape), axis
            yield "gradient_stats", (batch, *shape), axis


def measure(kernel: str, shape: tuple[int, ...], axis: int) -> dict[str, object]:
    """Return the bandwidth of a kernel and of torch's sum on the same tensors, in GB/s."""
    tensors = inputs(shape)
    name, _, activation = kernel.partition(" ")
    if name == "activation_stats":
        out = kernels.activation_stats(tensors[0], axis, activation)
        calls = [partial(kernels.activation_stats, x, axis, activation, out=out) for x in tensors]
    else:
        out = kernels.gradient_stats(tensors[0], axis)
        calls = [partial(kernels.gradient_stats, x, axis, out=out) for x in tensors]
    ours, captured = seconds_of(calls)
    plain, _ = seconds_of([x.sum for x in tensors])
    total = sum(x.nbytes for x in tensors)
    return {
        "kernel": kernel, "shape": shape, "MB": round(tensors[0].nbytes / 1e6, 1),
        "GB/s": round(total / ours / 1e9), "sum GB/s": round(total / plain / 1e9),
        "of sum": round(plain / ours, 3), "graph": captured,
    }  # fmt: skip


def main() -> None:
    """Measure all cases and write them as they come."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, required=True, help="file of JSON lines")
    parser.add_argument("--batch", type=int, nargs="+", default=[256, 32])
    parser.add_argument("--minutes", type=float, default=1.0, help="stop after so long")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("There is no GPU that torch can use: nothing is done.")
    end = time.monotonic() + 60 * options.minutes
    with options.output.open("w") as file:
        for kernel, shape, axis in cases(options.batch):
            if time.monotonic() > end:
                print("out of time: the other cases are left out")
                return
            found = measure(kernel, shape, axis)
            found["device"] = torch.cuda.get_device_name()
            print(json.dumps(found), file=file, flush=True)
            print(found, flush=True)


if __name__ == "__main__":
    main()
