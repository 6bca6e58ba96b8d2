"""Run the study in pieces that can be broken off at any moment; see README.md beside this.

    python benchmarks/transfer/study.py all --small
    python benchmarks/transfer/study.py tune
    python benchmarks/transfer/study.py screen --shard 1/2
    python benchmarks/transfer/study.py final --minutes 8 --only 'mlp-*'

Each trial has one file of results in the folder `results`; finished runs are never run again.
"""

import argparse
import sys
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from data import Target, target
from networks import NETWORKS, load, seeded
from torch import Tensor
from torch.utils.data import TensorDataset

from fastplastic.errors import FastPlasticError
from fastplastic.trials import (
    BASELINE,
    Arm,
    Progress,
    Results,
    Task,
    TrainSettings,
    TrialData,
    TrialRun,
    outcome_of,
    parse_arm,
    run_trial,
    with_controls,
)

HERE = Path(__file__).parent
RESULTS = HERE / "results"
_BUDGET = ("opt", "weight_decay", "sched", "epochs", "evals", "profile_images")
# Networks of other damage, or other pretraining, that seeds take turns with.
_MADE = 2
_EVAL_BATCH = 250


class Batches:
    """Tensors in batches, shuffled by torch's global random state or in order.

    Args:
        images: The data.
        size: Images in a batch.
        shuffled: Whole batches in random order, as for training.
    """

    def __init__(self, images: TensorDataset, size: int, *, shuffled: bool) -> None:
        self._tensors, self._size, self._shuffled = images.tensors, size, shuffled

    def __len__(self) -> int:
        n = len(self._tensors[0])
        return n // self._size if self._shuffled else -(-n // self._size)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        n = len(self._tensors[0])
        order = torch.randperm(n) if self._shuffled else torch.arange(n)
        for number in range(len(self)):
            part = order[number * self._size : (number + 1) * self._size]
            yield tuple(tensor[part] for tensor in self._tensors)


@dataclass(frozen=True)
class Pair:
    """A network on a target.

    Attributes:
        network: Name in NETWORKS.
        target: Name in TARGETS.
        config: The whole of study.toml.
        results: Folder of the result files.
    """

    network: str
    target: str
    config: dict[str, Any]
    results: Path = RESULTS

    @property
    def name(self) -> str:
        """Return what its files are called after."""
        return f"{self.network}.{self.target}"

    @property
    def first(self) -> "Pair":
        """Return the network on its first target, on which everything is screened."""
        own = self.config["networks"][self.network]
        return Pair(self.network, own["targets"][0], self.config, self.results)

    def get(self, key: str, default: Any = None) -> Any:
        """Return an entry of the pair, of the network, or of the training."""
        network = self.config["networks"][self.network]
        places = (network.get("on", {}).get(self.target, {}), network, self.config["training"])
        return next((place[key] for place in places if key in place), default)

    def settings(self, lr: float) -> TrainSettings:
        """Return the budget at a learning rate."""
        norms_first = self.get("norms_first", True)
        return TrainSettings(
            lr=lr, norms_first=norms_first, **{key: self.get(key) for key in _BUDGET}
        )

    def task(self, cache: Path) -> Task:
        """Return what is fine-tuned on what."""
        network = NETWORKS[self.network]
        facts = {
            "network": self.network, "made": network.arguments, "target": self.target,
            "batch_size": self.get("batch_size"),
            "train_size": self.get("train_size", 2000), "test_size": self.get("test_size", 2000),
        }  # fmt: skip

        def data(seed: int) -> TrialData:
            found: Target = target(
                self.target, seed=seed, train_size=facts["train_size"],
                test_size=facts["test_size"], form=network.form,
            )  # fmt: skip
            train = Batches(found.train, facts["batch_size"], shuffled=True)
            plain = Batches(found.train, 128, shuffled=False)
            return TrialData(train, Batches(found.test, _EVAL_BATCH, shuffled=False), plain)

        return Task(
            model=lambda seed: load(self.network, cache, seed % _MADE),
            data=data,
            fresh=lambda seed: seeded(network.build, 3000 + seed),
            facts=facts,
        )

    def file(self, stage: str, lr: float) -> Path:
        """Return where the runs of a stage are kept."""
        return self.results / stage / f"{self.name}.lr{lr:g}.jsonl"


def smaller(config: dict[str, Any]) -> dict[str, Any]:
    """Return the study with a few pairs, few seeds and one learning rate."""
    small, networks = config["small"], {}
    for name in small["pairs"]:
        network, _, target_name = name.partition(".")
        entry = networks.setdefault(network, config["networks"][network] | {"targets": []})
        entry["targets"].append(target_name)
        entry |= {"seeds": min(entry["seeds"], small["seeds"]), "factors": [1.0]}
    return config | {"networks": networks}


def pairs_of(
    config: dict[str, Any], only: Sequence[str] = (), results: Path = RESULTS
) -> list[Pair]:
    """Return the pairs whose names match."""
    found = [
        Pair(network, name, config, results)
        for network, entry in config["networks"].items()
        for name in entry["targets"]
    ]
    return [p for p in found if not only or any(fnmatchcase(p.name, text) for text in only)]


def runs_of(file: Path) -> list[TrialRun]:
    """Return the runs of a file."""
    return Results.read(file) if file.exists() else []


def best_rate(pair: Pair) -> float:
    """Return the learning rate at which the baseline of the tuning ends best."""
    rates = pair.get("rates", pair.config["tune"]["rates"])
    means = {}
    for lr in rates:
        runs = runs_of(pair.file("tune", lr))
        if runs:
            means[lr] = sum(run.accuracy[-1] for run in runs) / len(runs)
    if len(means) < len(rates):
        raise FastPlasticError(f"{pair.name}: not tuned yet: run study.py tune")
    return max(means, key=means.__getitem__)


def tune(pair: Pair) -> Iterator[tuple[float, list[Arm], list[int]]]:
    """Yield the trials that find the learning rate."""
    entry = pair.config["tune"]
    for lr in pair.get("rates", entry["rates"]):
        yield lr, [Arm(BASELINE)], entry["seeds"]


def grid(pair: Pair) -> list[Arm]:
    """Return every criterion, dose and treatment of the screening."""
    entry = pair.config["screen"][pair.get("screen")]
    ratios = entry["ratios"]
    units = [
        f"{criterion}@{ratio}:{outgoing}"
        for criterion in entry["criteria"]
        for ratio in ratios
        for outgoing in entry["outgoing"]
    ]
    weights = [f"{c}@{ratio}:weight" for c in entry["weight_criteria"] for ratio in ratios]
    if pair.get("norms"):
        units = [f"{text}+recalibrate" for text in units]
    return [parse_arm(text) for text in [*units, *weights, *entry["extra"]]]


def screen(pair: Pair) -> Iterator[tuple[float, list[Arm], list[int]]]:
    """Yield the trial that compares everything, on the first target of the network only."""
    if pair == pair.first and pair.get("screen"):
        yield best_rate(pair), everything(pair), pair.config["screen"]["seeds"]


def everything(pair: Pair) -> list[Arm]:
    """Return the arms of the screening."""
    return [Arm(BASELINE), Arm("fresh"), *grid(pair)]


def finalists(pair: Pair) -> list[str]:
    """Return the best of the screening of the network, one for each criterion.

    Raises:
        FastPlasticError: It has not been screened.
    """
    first = pair.first
    runs = runs_of(first.file("screen", best_rate(first)))
    arms, seeds = everything(first), pair.config["screen"]["seeds"]
    missing = {(arm.name, seed) for arm in arms for seed in seeds} - {
        (run.arm, run.seed) for run in runs
    }
    if missing:
        raise FastPlasticError(f"{first.name}: not screened yet: run study.py screen")
    arms = [arm for arm in arms if arm.dose and arm.dose.criterion != "random"]
    trial = outcome_of(arms, runs, {})
    ranked = sorted(trial.arms, key=lambda arm: -(arm.area.mean + arm.final.mean))
    found: dict[str, str] = {}
    for arm in ranked:
        family = arm.name.partition("@")[0] + ":weight" * ("weight" in arm.name)
        found.setdefault(family, arm.name)
    return list(found.values())[: pair.get("finalists", pair.config["final"]["finalists"])]


def usual(pair: Pair) -> list[str]:
    """Return the settings that are the same for all networks, a mild one first."""
    return list(pair.get("usual", pair.config["final"]["usual"]))


def final(pair: Pair) -> Iterator[tuple[float, list[Arm], list[int]]]:
    """Yield the trials of the finalists: with all controls, and at other learning rates."""
    entry, lr = pair.config["final"], best_rate(pair)
    chosen = pair.get("best") or finalists(pair)
    seeds = list(range(pair.get("seeds")))
    alone = pair.get("alone", entry["alone"])
    is_first = pair == pair.first
    doubted = pair.get("doubted", chosen[0] if is_first else None)
    # What is removed cannot be read again.
    removed = [f"remove:{doubted.replace('+refit', '')}"] if doubted else []
    wanted = list(dict.fromkeys([*chosen, *usual(pair), *alone, *removed]))
    for factor in pair.get("factors", entry["rates"] if is_first else [1.0]):
        texts = wanted if factor == 1 else [doubted, *(name for name in alone if name == "fresh")]
        yield lr * factor, list(with_controls(texts)), seeds


STAGES: dict[str, Callable[[Pair], Iterator[tuple[float, list[Arm], list[int]]]]] = {
    "tune": tune, "screen": screen, "final": final,
}  # fmt: skip


class OutOfTime(Exception):
    """The time that was given is over; what is finished is kept."""


def told(name: str, until: float) -> Callable[[Progress], None]:
    """Return what prints each finished run, and ends when the time is over."""

    def tell(state: Progress) -> None:
        if state.run is not None:
            left = "" if state.left is None else f", {state.left / 60:.1f} min left"
            text = f"{name} {state.done}/{state.total} {state.arm} {state.seed}"
            print(f"{text}: {state.run.accuracy[-1]:.3f}{left}", flush=True)
            if time.monotonic() > until:
                raise OutOfTime

    return tell


def main() -> None:
    """Run a stage."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=[*STAGES, "all"])
    parser.add_argument("--small", action="store_true", help="a few pairs and seeds")
    parser.add_argument("--only", action="append", default=[], help="pattern of NETWORK.TARGET")
    parser.add_argument("--shard", default="0/1", help="K/N: every Nth network from the Kth on")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after so long")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of result files")
    parser.add_argument("--cache", type=Path, default=HERE / "cache", help="of made networks")
    options = parser.parse_args()
    torch.set_num_threads(1)
    config = tomllib.loads((HERE / "study.toml").read_text())
    number, of = map(int, options.shard.split("/"))
    until = time.monotonic() + 60 * options.minutes
    config = smaller(config) if options.small else config
    own = list(config["networks"])[number::of]
    pairs = [p for p in pairs_of(config, options.only, options.results) if p.network in own]
    stages = list(STAGES) if options.stage == "all" else [options.stage]
    try:
        for pair in pairs:
            for stage in stages:
                run_stage(pair, stage, options.cache, until)
    except OutOfTime:
        sys.exit("out of time: the same command goes on")
    except FastPlasticError as error:
        sys.exit(str(error))


def options_beside(doc: str) -> tuple[argparse.Namespace, dict[str, Any]]:
    """Return the options of a script beside this one, one thread set, and the study."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--only", default="*", help="pattern of NETWORK.TARGET")
    parser.add_argument("--cache", type=Path, default=HERE / "cache", help="of made networks")
    torch.set_num_threads(1)
    return parser.parse_args(), tomllib.loads((HERE / "study.toml").read_text())


def run_stage(pair: Pair, stage: str, cache: Path, until: float) -> None:
    """Run what is missing of a stage of a pair."""
    (pair.results / stage).mkdir(parents=True, exist_ok=True)
    for lr, arms, seeds in STAGES[stage](pair):
        file = pair.file(stage, lr)
        run_trial(
            pair.task(cache), arms, seeds, pair.settings(lr), results=file,
            progress=told(f"{stage} {file.stem}", until),
        )  # fmt: skip


if __name__ == "__main__":
    main()
