"""Trace one watched training step with torch.profiler, and draw where its time goes.

    python benchmarks/trace_step.py -o benchmarks/results/step.trace.json.gz

The file opens in Perfetto or chrome://tracing. In the picture beside it, what the network does is
blue, and what hooks read red.
"""

import argparse
import gzip
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from torch.profiler import ProfilerActivity, profile, record_function

import fastplastic
from fastplastic.measure import observer, reader

# What hooks call, by the name under which it is in the trace.
READS = {
    "activations": (observer.Observer, "_read_activations"),
    "gradients": (observer.Observer, "_see_gradient"),
    "weights": (observer.Observer, "_see_parameter"),
    "end of the pass": (reader.Reader, "_end_backward"),
}
MARK = "fastplastic: "
# record_function takes 80 microseconds while a profiler runs, as long as many a read.
mark = torch._C._profiler._RecordFunctionFast


def name_reads() -> None:
    """Let what hooks read show in traces."""

    def named(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            with mark(MARK + name):
                return function(*arguments)

        return call

    for name, (owner, method) in READS.items():
        setattr(owner, method, named(name, getattr(owner, method)))


def trace(model: str, batch: int, size: int, path: Path) -> None:
    """Trace some steps, and write the fastest of them to a file."""
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = timm.create_model(model).to(device).train()
    images = torch.randn(batch, 3, size, size, device=device)
    optimizer = torch.optim.SGD(network.parameters(), 1e-3)

    def step() -> None:
        optimizer.zero_grad()
        with record_function("forward"):
            loss = network(images).square().mean()
        with record_function("backward"):
            loss.backward()
        with record_function("optimizer"):
            optimizer.step()

    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    traces = {}
    with fastplastic.Monitor(network, images[:2]):
        for _ in range(3):
            step()
        for _ in range(7):
            start = time.perf_counter()
            with profile(activities=activities) as profiler:
                step()
            traces[time.perf_counter() - start] = profiler
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "trace.json"
        traces[min(traces)].export_chrome_trace(str(plain))
        content = json.loads(plain.read_text())
    kept = {key: content[key] for key in ("schemaVersion", "displayTimeUnit", "traceEvents")}
    with gzip.open(path, "wt") as out:
        json.dump(kept, out)


def spans(path: Path) -> list[tuple[int, str, float, float]]:
    """Return thread, name, begin and length in ms of what is shown, from the begin of the step."""
    with gzip.open(path) as file:
        events = json.load(file)["traceEvents"]
    kept = [
        (event["tid"], event["name"], event["ts"] / 1e3, event["dur"] / 1e3)
        for event in events
        if event.get("ph") == "X" and event.get("cat") in ("cpu_op", "user_annotation")
    ]
    first = min(begin for _, name, begin, _ in kept if name == "forward")
    return [(thread, name, begin - first, length) for thread, name, begin, length in kept]


def lanes_of(found: list[tuple[int, str, float, float]]) -> dict[str, list[tuple[float, float]]]:
    """Return begin and length of phases, of operators outside of hooks, and of reads in hooks."""
    reads = [MARK + name for name in READS]
    lanes: dict[str, list[tuple[float, float]]] = {
        name: [] for name in ("forward", "backward", "optimizer", "operators", *reads)
    }
    until = dict.fromkeys((thread for thread, *_ in found), -1.0)
    for thread, name, begin, length in sorted(found, key=lambda span: (span[2], -span[3])):
        if name in lanes:
            lanes[name].append((begin, length))
        elif name.startswith("aten::") and begin >= until[thread]:
            lanes["operators"].append((begin, length))
        # What is inside of another operator or of a read is not drawn.
        if name in reads or name.startswith("aten::"):
            until[thread] = max(until[thread], begin + length)
    return {name: bars for name, bars in lanes.items() if bars}


def draw(path: Path, picture: Path) -> float:
    """Draw a trace, the whole step and a part of it, and return the share that is in hooks."""
    import matplotlib.pyplot as plt

    lanes = lanes_of(spans(path))
    spent = {name: sum(length for _, length in bars) for name, bars in lanes.items()}
    passes = spent["forward"] + spent["backward"]
    share = sum(time for name, time in spent.items() if name.startswith(MARK)) / passes
    figure, panels = plt.subplots(2, figsize=(10, 0.7 * len(lanes) + 1.5))
    for axes in panels:
        for row, (name, bars) in enumerate(lanes.items()):
            color = "#c0504d" if name.startswith(MARK) else "#4f81bd"
            # The edge lets what is shorter than a pixel be seen.
            axes.broken_barh(bars, (-row - 0.4, 0.8), color=color, edgecolor=color, linewidth=0.8)
        names = [f"{name} {spent[name]:.1f} ms" for name in lanes]
        axes.set_yticks([-row for row in range(len(lanes))], names)
    panels[1].set_xlim(0.2 * passes, 0.25 * passes)
    panels[1].set_xlabel("milliseconds")
    panels[0].set_title(f"A watched step: {share:.1%} of its forward and backward pass is in hooks")
    figure.tight_layout()
    figure.savefig(picture, dpi=100)
    return share


def main() -> None:
    """Trace, then draw."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, required=True, help="FILE.trace.json.gz")
    parser.add_argument("--model", default="resnet50", help="name of a timm model (resnet50)")
    parser.add_argument("--batch", type=int, default=8, help="images in a step (8)")
    parser.add_argument("--size", type=int, default=224, help="their side in pixels (224)")
    options = parser.parse_args()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    name_reads()
    trace(options.model, options.batch, options.size, options.output)
    picture = options.output.with_name(options.output.name.split(".")[0] + ".png")
    print(
        f"{draw(options.output, picture):.1%} of forward and backward pass is in hooks: {picture}"
    )


if __name__ == "__main__":
    main()
