"""What 1,000 processes cost: constants measured on this machine, and the sums made of them.

    python benchmarks/scale.py [-o FILE.json] [--layers 80] [--processes 1000]

The model is a transformer of 70B parameters (the sizes of Llama 2, 70B), of which no weight is ever
made: its wiring is read from fake tensors. Measured are that wiring, a plan of all its units, one
process's share of the weights, and messages between processes of one machine over gloo. Times of a
network are assumed and printed as such.
"""

import argparse
import json
import multiprocessing
import resource
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaConfig, LlamaForCausalLM

import fastplastic
from fastplastic.graph import build_graph
from fastplastic.kernels import Law, WeightShard, resample_, select
from fastplastic.measure import LayerProfile, Profile
from fastplastic.processes import Processes
from fastplastic.stats import STATISTICS, LayerStats
from fastplastic.wiring import UnitGraph

# A group of that many parameters stands for one process's share.
SHARE = 1 << 24
MEGABYTE = 1 << 20


def seconds(function: Callable[[], object], times: int = 3) -> float:
    """Return how long a call takes, the median of some."""
    found = []
    for _ in range(times):
        start = perf_counter()
        function()
        found.append(perf_counter() - start)
    return median(found)


def wiring(layers: int) -> tuple[UnitGraph, int, dict[str, Any]]:
    """Return the wiring of the transformer, its number of parameters, and what that took."""
    config = LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=layers,
        num_attention_heads=64, num_key_value_heads=8, vocab_size=32000,
    )  # fmt: skip
    with FakeTensorMode():
        model = LlamaForCausalLM(config).eval()
        tokens = torch.ones(2, 16, dtype=torch.long)
    start = perf_counter()
    graph = build_graph(model, {"input_ids": tokens})
    took = perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    parameters = sum(parameter.numel() for parameter in model.parameters())
    facts = {"wiring s": took, "wiring peak bytes": peak}
    return graph, parameters, facts


def planning(graph: UnitGraph) -> dict[str, Any]:
    """Plan a tenth of all units by made-up statistics."""
    generator = torch.Generator().manual_seed(0)
    layers = []
    for layer in graph.layers:
        table = torch.rand(len(STATISTICS), layer.n_units, dtype=torch.float64, generator=generator)
        for row, name in enumerate(STATISTICS):
            if name.startswith("n_nonfinite"):
                table[row] = 0
        layers.append(LayerProfile(layer, LayerStats(table)))
    profile = Profile(
        layers=tuple(layers), coverage=(), mode="train", samples=1, batches=1, backend="numba",
        device="cpu", dtype="bfloat16", seed=0, fingerprint="0" * 64,
    )  # fmt: skip
    took = seconds(lambda: fastplastic.plan(profile, criterion="gradient", ratio=0.1))
    return {"unit plan s": took}


def share_of_weights(dtype: torch.dtype) -> dict[str, Any]:
    """Select from one process's rows of a large weight, and draw a tenth of them afresh."""
    rows, columns, processes = SHARE // 8192, 8192, 1000
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator).to(dtype)
    shard = WeightShard((processes * rows, columns), (processes // 2 * rows, 0))
    tables: list[Tensor] = []

    def reduce(table: Tensor) -> None:
        """Stand for all others, which hold the same numbers."""
        tables.append(table.clone())
        table *= processes

    def choose() -> None:
        tables.clear()
        # A multiple, so that the copies of one number are not cut in two.
        select(
            [weight], None, ["w"], processes * (SHARE // 10), criterion="magnitude",
            shards=[shard], reduce=reduce,
        )  # fmt: skip

    mask = torch.zeros(rows, columns, dtype=torch.bool)
    mask[: rows // 10] = True
    law = [Law("normal", 0.0, 0.02)]
    chosen = seconds(choose)
    drawn = seconds(lambda: resample_([weight], ["w"], law, masks=[mask], shards=[shard]))
    return {
        "select ns a weight": chosen / SHARE * 1e9,
        "histograms": len(tables),
        "histogram bytes a tensor": max(table[0].numel() * 8 for table in tables),
        "draw ns a weight": drawn / int(mask.sum()) * 1e9,
    }


def _serve(rank: int, size: int, store: str, answers: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size,
        timeout=timedelta(minutes=5),
    )  # fmt: skip
    together = Processes()
    small, large = torch.zeros(1, dtype=torch.int64), torch.zeros(4 * MEGABYTE, dtype=torch.float64)
    for tensor in (small, large):
        together.add_(tensor)
    found = {
        "meet s": seconds(lambda: together.meet("scale", {"the model": "0" * 12}), 21),
        "small s": seconds(lambda: together.add_(small), 21),
        "large s": seconds(lambda: together.add_(large), 5),
        "large bytes": large.numel() * 8,
    }
    if rank == 0:
        answers.put(found)
    dist.destroy_process_group()


def messages(size: int) -> dict[str, float]:
    """Let processes of this machine meet and add up tables."""
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        arguments = (size, str(Path(folder) / "store"), answers)
        started = [context.Process(target=_serve, args=(rank, *arguments)) for rank in range(size)]
        for process in started:
            process.start()
        found: dict[str, float] = answers.get(timeout=300)
        for process in started:
            process.join()
    return found


def estimate(
    graph: UnitGraph, parameters: int, measured: dict[str, Any], options: argparse.Namespace
) -> list[tuple[str, str]]:
    """Return what a process of many would take, each with how it comes about."""
    n, units = options.processes, sum(layer.n_units for layer in graph.layers)
    table = len(STATISTICS) * units * 8
    wire = 2 * table * (n - 1) / n
    network = options.network * 1e9 / options.per_node
    tensors = len({layer.weight for layer in graph.layers})
    kernels = measured["bfloat16"]
    histograms = kernels["histograms"] * tensors * kernels["histogram bytes a tensor"]
    mine = parameters / n
    meeting = measured["messages"][-1]["meet s"] / measured["messages"][-1]["processes"]
    return [
        ("parameters; layers; units; that can be re-initialised",
         f"{parameters / 1e9:.1f} G; {len(graph.layers)}; {units:,}; "
         f"{sum(int(layer.hidden.sum()) for layer in graph.layers):,}"),
        ("table of statistics, in each process", f"{table / 1e9:.2f} GB"),
        ("its own share of the weights, bf16", f"{mine * 2 / 1e9:.2f} GB"),
        ("sent by each process at compute, once", f"{wire / 1e9:.2f} GB"),
        ("time of that, at the assumed network", f"{wire / network:.1f} s"),
        ("steps of a ring, at the assumed latency", f"{2 * (n - 1) * options.latency:.2f} s"),
        ("histograms of a plan of single weights, all together", f"{histograms / 1e6:.1f} MB"),
        ("select, its own share, one core", f"{mine * kernels['select ns a weight'] / 1e9:.2f} s"),
        ("draw a tenth of its share, one core",
         f"{mine / 10 * kernels['draw ns a weight'] / 1e9:.2f} s"),
        ("a meeting: the first process hears one after the other", f"{n * meeting:.2f} s"),
    ]  # fmt: skip


def main() -> None:
    """Measure, and print what follows."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("-o", "--output", type=Path, help="write what was measured here, as JSON")
    parser.add_argument("--layers", type=int, default=80, help="blocks of the transformer")
    parser.add_argument("--processes", type=int, default=1000)
    parser.add_argument("--per-node", type=int, default=8, help="processes that share a network")
    parser.add_argument("--network", type=float, default=50.0, help="GB/s of a node, assumed")
    parser.add_argument("--latency", type=float, default=5e-5, help="s a message, assumed")
    options = parser.parse_args()
    # First, while no process has had the memory before.
    graph, parameters, measured = wiring(options.layers)
    measured |= planning(graph)
    for dtype in (torch.float32, torch.bfloat16):
        measured[str(dtype).removeprefix("torch.")] = share_of_weights(dtype)
    measured["messages"] = [{"processes": size, **messages(size)} for size in (2, 4, 8)]
    print(json.dumps(measured, indent=2))
    for what, value in estimate(graph, parameters, measured, options):
        print(f"| {what} | {value} |")
    if options.output:
        options.output.write_text(json.dumps(measured, indent=2) + "\n")


if __name__ == "__main__":
    main()
