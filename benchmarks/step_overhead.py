"""Watched steps against plain ones, in several processes: one line of JSON for each.

    python benchmarks/step_overhead.py steps.jsonl
    python benchmarks/step_overhead.py steps.jsonl --models resnet50 --processes 3

A file that is there already is gone on with. Where a process lays its memory out, and which cores
it is given, moves a ratio by some percent for as long as it lives, so the median over processes is
what counts.
"""

import argparse
import copy
import json
import subprocess
import sys
from pathlib import Path
from statistics import median

from bench_overhead import MODELS, model_of, step_of
from interleaved import GPU, clock, device_name

import fastplastic

WARM_UP = 3


def ratio(name: str, batch: int, rounds: int) -> dict[str, object]:
    """Time both kinds of step in turns, and return the median of the ratios of neighbours."""
    model, images = model_of(name, batch)
    twin = copy.deepcopy(model)
    steps = {"plain": step_of(model, images), "watched": step_of(twin, images)}
    fastplastic.Monitor(twin, images[:2]).attach()
    for step in steps.values():
        for _ in range(WARM_UP):
            step()
    times: dict[str, list[float]] = {kind: [] for kind in steps}
    for turn in range(rounds):
        # Neither always comes first.
        for kind in sorted(steps, reverse=bool(turn % 2)):
            start = clock()
            steps[kind]()
            times[kind].append(clock() - start)
    plain, watched = times["plain"], times["watched"]
    return {
        "model": name,
        "batch": batch,
        "rounds": rounds,
        "device": device_name(),
        "plain ms": round(median(plain) * 1e3, 1),
        "paired": round(median(b / a for a, b in zip(plain, watched, strict=True)), 4),
        "fastest": round(min(watched) / min(plain), 4),
    }


def summary(lines: list[dict[str, object]]) -> None:
    """Print the median and the range of each model."""
    print("| model | processes | watched / plain | range | fastest rounds |\n|---|--:|--:|--:|--:|")
    for model in dict.fromkeys(str(line["model"]) for line in lines):
        of_model = [line for line in lines if line["model"] == model]
        paired = sorted(float(str(line["paired"])) for line in of_model)
        fastest = median(float(str(line["fastest"])) for line in of_model)
        bounds = f"{paired[0]:.3f} to {paired[-1]:.3f}"
        print(f"| {model} | {len(paired)} | {median(paired):.3f} | {bounds} | {fastest:.3f} |")


def main() -> None:
    """Run what the file lacks, one process after the other, then print a table."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("results", type=Path, help="JSON lines, one for each process")
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--processes", type=int, default=5)
    parser.add_argument("--batch", type=int, default=32 if GPU else 8)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        line = ratio(options.models[0], options.batch, options.rounds)
        with options.results.open("a") as file:
            file.write(json.dumps(line) + "\n")
        return
    wanted = [name for _ in range(options.processes) for name in options.models]
    for line in read(options.results):
        if line["model"] in wanted:
            wanted.remove(str(line["model"]))
    for name in wanted:
        print(f"{name} ...", file=sys.stderr, flush=True)
        same = ["--batch", str(options.batch), "--rounds", str(options.rounds)]
        command = [sys.executable, __file__, str(options.results), "--models", name, "--one", *same]
        if subprocess.run(command).returncode:
            sys.exit(f"{name}: no result, see above")
    summary(read(options.results))


def read(path: Path) -> list[dict[str, object]]:
    """Return what a file holds so far."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


if __name__ == "__main__":
    main()
