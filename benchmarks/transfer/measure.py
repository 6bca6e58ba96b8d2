"""Measure the figures of every network of the finals, before anything is done to it.

    python benchmarks/transfer/measure.py --only 'mlp-*'

One line for each seed in `results/figures`: those of `fastplastic.trials.figures`, and some that
need more than a profile. After a change here the files are to be removed and made again.
"""

import json
import os
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from statistics import geometric_mean, mean

from study import RESULTS, Pair, best_rate, options_beside, pairs_of, runs_of
from torch import Tensor

from fastplastic.errors import FastPlasticError
from fastplastic.measure import LayerProfile
from fastplastic.trials import BASELINE, evaluate, figures
from fastplastic.trials.prepare import Start

# Enough for a mean over images; networks are two.
_SEEDS = 4


def file_of(pair: Pair) -> Path:
    """Return where the figures of a pair are kept."""
    return RESULTS / "figures" / f"{pair.name}.jsonl"


def measured(pair: Pair) -> dict[str, float]:
    """Return the figures of a pair, means over the seeds; empty where it was not measured."""
    file = file_of(pair)
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    names = set.intersection(*(set(line["figures"]) for line in lines)) if lines else set()
    return {name: mean(line["figures"][name] for line in lines) for name in sorted(names)}


def seeds_of(pair: Pair) -> list[int]:
    """Return the seeds of the baseline in the final, so many at most."""
    try:
        runs = runs_of(pair.file("final", best_rate(pair)))
    except FastPlasticError:
        return []
    return sorted(run.seed for run in runs if run.arm == BASELINE)[:_SEEDS]


def measure(pair: Pair, seed: int, cache: Path) -> dict[str, float]:
    """Return the figures of a pair for one seed: of the profile, and the loss behind the head."""
    settings, task = pair.settings(best_rate(pair)), pair.task(cache)
    start = Start(task, settings, seed)
    found = start.profile()
    assert task.fresh is not None
    fresh = dict(task.fresh(seed).named_parameters())
    layers = [layer for layer in found if bool(layer.hidden.any())]
    return {
        **figures(found),
        "sparsity": mean(_sparsity(layer) for layer in layers),
        "growth": geometric_mean(_growth(layer, fresh) for layer in layers),
        "relative_gradient": geometric_mean(_relative_gradient(layer) for layer in layers),
        "loss": evaluate(start.model, start.data.test, settings)["loss"],
        "train_loss": evaluate(start.model, start.data.plain, settings)["loss"],
    }


def _sparsity(layer: LayerProfile) -> float:
    """Return the standard deviation of h over mean abs(h), of a hidden unit on average."""
    return float((layer.stats.std_h / layer.stats.mean_abs_h)[layer.hidden].nanmean())


def _growth(layer: LayerProfile, fresh: Mapping[str, Tensor]) -> float:
    """Return the root mean square of the weights over that of a fresh network."""
    total, count = (layer.stats[name][layer.hidden].sum() for name in ("sum_sq_w", "n_in"))
    own = fresh[layer.wiring.weight].detach().double().square().mean()
    return float((total / count / own).sqrt())


def _relative_gradient(layer: LayerProfile) -> float:
    """Return the norm of the gradient over that of the weights."""
    dw, w = (layer.stats[name][layer.hidden].sum() for name in ("sum_sq_dw", "sum_sq_w"))
    return float((dw / w).sqrt())


def main() -> None:
    """Measure what is missing."""
    options, config = options_beside(__doc__)
    for pair in pairs_of(config):
        if not fnmatchcase(pair.name, options.only):
            continue
        file = file_of(pair)
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = file.read_text().splitlines() if file.exists() else []
        done = [json.loads(line)["seed"] for line in lines]
        for seed in seeds_of(pair):
            if seed not in done:
                found = measure(pair, seed, options.cache)
                with file.open("a") as out:
                    out.write(json.dumps({"seed": seed, "figures": found}) + "\n")
                    os.fsync(out.fileno())
                print(pair.name, seed, found, flush=True)


if __name__ == "__main__":
    main()
